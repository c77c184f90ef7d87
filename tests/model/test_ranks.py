"""A model that several ranks compute together gives what one computes alone, from either layout of the files."""

import dataclasses

import pytest
import torch

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.model.part import Part, divides_width
from qwen3vl_moe.ops import ALONE
from qwen3vl_moe.weights import columns, shards
from qwen3vl_moe.weights.placement import require_division
from qwen3vl_moe.weights.table import expand_table
from tests.fp8 import write_fp8
from tests.model.prompts import CASES, make_prompt
from tests.ranks import on_ranks

PUBLISHED = Qwen3VLMoeConfig.qwen3_vl_30b_a3b().text


def load(path, ranks, **more):
    return Qwen3VLMoe.from_pretrained(path, dtype=torch.float32, moe="reference", ranks=ranks, progress=False, **more)


def logits_of(path, size, prompt):
    """On one rank of ``size``; the others have none."""
    return on_ranks(size, lambda ranks: load(path, ranks).logits(*prompt.our_inputs()))[0]


@pytest.mark.parametrize("layout", ["transformers5", "published"])
@pytest.mark.parametrize(("name", "size"), [("plain", 2), ("plain", 4), ("wide", 2), ("wide", 4), ("odd", 2)])
def test_logits_do_not_depend_on_the_number_of_ranks(make_tiny, name, size, layout):
    """Only the order of sums differs, so the error is about that of one rank: both against float64."""
    tiny = make_tiny(name)
    for case in ("text", "three odd images"):
        prompt = make_prompt(tiny.oracle.config, CASES[case])
        alone = Qwen3VLMoe.from_pretrained(tiny.paths[layout], dtype=torch.float32, progress=False)
        single = alone.logits(*prompt.our_inputs())
        pixels = None if prompt.pixels is None else prompt.pixels.double()
        exact = alone.double().logits(prompt.ids, pixels, prompt.grids or None)
        several = logits_of(tiny.paths[layout], size, prompt)
        assert (several - exact).abs().max() <= 2 * (single - exact).abs().max()


@pytest.mark.parametrize("layout", ["transformers5", "published"])
@pytest.mark.parametrize("name", ["ranks, width", "ranks, experts"])
def test_fp8_weights_and_scales_are_divided_by_whole_blocks(make_tiny, tmp_path, name, layout):
    tiny = make_tiny(name)
    write_fp8(tiny.paths[layout], tmp_path, published=layout == "published")
    config = Qwen3VLMoeConfig.from_pretrained(tmp_path)
    assert divides_width(config.text, 2) == (name == "ranks, width")
    prompt = make_prompt(tiny.oracle.config, CASES["one image"])
    single = load(tmp_path, ALONE).logits(*prompt.our_inputs())
    several = logits_of(tmp_path, 2, prompt)
    # An activation beside a rounding step of FP8, which is 1/16 of itself, may fall to its other side.
    assert (several - single).abs().max() <= 0.02 * single.abs().max()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_parts_of_all_ranks_are_the_whole(size):
    parts = [Part.of(PUBLISHED, rank, size) for rank in range(size)]
    for name, whole in (("heads", 32), ("vocabulary", 151936), ("width", 768)):
        assert [n for part in parts for n in getattr(part, name)] == list(range(whole)), name
    queries_each = 32 // 4
    for part in parts:
        assert {head // queries_each for head in part.heads} == set(part.kv_heads)
        assert len(part.experts) == 128


def test_fp8_blocks_of_experts_are_not_cut():
    fp8 = dataclasses.replace(PUBLISHED, fp8_experts=frozenset(range(48)))
    assert divides_width(fp8, 2)
    assert divides_width(fp8, 3)
    assert not divides_width(fp8, 4)
    assert [len(Part.of(fp8, rank, 4).experts) for rank in range(4)] == [32] * 4


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        (3, {}, "num_attention_heads=32 is no multiple of it; choose from 1, 2, 4, 8, 16, 32"),
        (8, {"num_kv_heads": 6, "num_heads": 48}, "it neither divides num_key_value_heads=6 nor is a multiple of it"),
        (2, {"vocab_size": 151935}, "vocab_size=151935 is no multiple of it"),
        (2, {"expert_width": 776, "num_experts": 5}, "moe_intermediate_size=776 into multiples of 8 nor num_experts=5"),
        (2, {"num_heads": 2, "head_dim": 96, "fp8_attention": frozenset({0})}, "cuts the FP8 blocks of 2 attention"),
    ],
)
def test_a_number_of_ranks_that_does_not_divide_is_refused_with_the_size_at_fault(size, change, message):
    with pytest.raises(OptionError) as error:
        require_division(dataclasses.replace(PUBLISHED, **change), size)
    assert f"tensor_parallel_size={size}" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("layout", ["transformers5", "published"])
def test_each_rank_reads_its_own_bytes_alone(make_tiny, monkeypatch, layout):
    """Of the decoder each byte is read once, by one rank; norms, routers and the tower by all."""
    tiny, size, read = make_tiny("wide"), 4, {}
    plain_read = shards._read

    def noted(piece, target):
        read.setdefault(piece.stored.file, []).append((piece.offset, piece.nbytes))
        plain_read(piece, target)

    monkeypatch.setattr(shards, "_read", noted)
    on_ranks(size, lambda ranks: load(tiny.paths[layout], ranks))
    stored = shards.read_headers(tiny.paths[layout])
    table = {entry.source: entry for entry in expand_table(load_config(tiny, layout))}
    divided = [
        n
        for n in table
        if (n.endswith(("_proj", "_proj.weight")) and "layers" in n) or "embed_tokens" in n or "lm_" in n
    ]
    for name, tensor in stored.items():
        pieces = sorted(
            (offset, nbytes)
            for offset, nbytes in read[tensor.file]
            if tensor.offset <= offset < tensor.offset + tensor.nbytes
        )
        if name in divided:
            end = tensor.offset
            for offset, nbytes in pieces:
                assert offset == end, name
                end += nbytes
            assert end == tensor.offset + tensor.nbytes
        else:
            assert sum(nbytes for _, nbytes in pieces) == size * tensor.nbytes, name


def load_config(tiny, layout):
    return Qwen3VLMoeConfig.from_pretrained(tiny.paths[layout])


def test_columns_are_exchanged_in_steps_of_a_bounded_size(make_tiny, monkeypatch):
    tiny = make_tiny("wide")
    prompt = make_prompt(tiny.oracle.config, CASES["text"])
    whole = logits_of(tiny.published, 2, prompt)
    monkeypatch.setattr(columns, "_STEP_BYTES", 1)
    assert torch.equal(logits_of(tiny.published, 2, prompt), whole)
