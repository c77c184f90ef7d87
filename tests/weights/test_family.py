"""The sizes of the family: names, shapes and bytes of transformers' own models, none of which is allocated."""

import math

import pytest
import torch

from benchmarking.transformers_twin import transformers_config
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.weights import placement
from qwen3vl_moe.weights.placement import rank_bytes, ranks_that_fit
from qwen3vl_moe.weights.table import expand_table

SIZES = {  # bytes in bf16; of the first, the published checkpoint's own total
    "qwen3_vl_30b_a3b": 62_141_508_064,
    "qwen3_vl_235b_a22b": 471_340_045_792,
}


def config_of(name: str) -> Qwen3VLMoeConfig:
    return getattr(Qwen3VLMoeConfig, name)()


@pytest.mark.parametrize("name", list(SIZES))
def test_names_and_shapes_are_those_of_transformers(name):
    from transformers import Qwen3VLMoeForConditionalGeneration

    config = config_of(name)
    with torch.device("meta"):
        theirs = Qwen3VLMoeForConditionalGeneration(transformers_config(config))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {entry.source: entry.shape_in("transformers5") for entry in expand_table(config)} == shapes
    assert 2 * sum(map(math.prod, shapes.values())) == SIZES[name]


@pytest.mark.parametrize("name", list(SIZES))
def test_our_model_has_as_many_bytes(name):
    config = config_of(name)
    assert rank_bytes(config, torch.bfloat16, 1) == SIZES[name]
    with torch.device("meta"):
        model = Qwen3VLMoe(config)
    assert model.text.layers[-1].moe.experts.num_experts == 128
    assert not list(model.named_buffers())


@pytest.mark.parametrize(
    ("name", "card", "dtype", "expected"),
    [
        ("qwen3_vl_30b_a3b", 80e9, torch.bfloat16, 1),
        ("qwen3_vl_30b_a3b", 40e9, torch.bfloat16, 2),
        ("qwen3_vl_235b_a22b", 80e9, torch.bfloat16, 8),
        ("qwen3_vl_235b_a22b", 141e9, torch.bfloat16, 4),
        ("qwen3_vl_235b_a22b", 5e9, torch.bfloat16, None),
    ],
)
def test_how_many_gpus_a_size_needs(name, card, dtype, expected):
    found = ranks_that_fit(config_of(name), dtype, int(card))
    assert (found and found[0]) == expected
    if found:
        assert found[1] <= card
        assert found[1] * found[0] >= SIZES[name]


def test_the_number_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: 80_000_000_000)
    config = config_of("qwen3_vl_235b_a22b")
    card, needed = torch.device("cuda", 0), SIZES["qwen3_vl_235b_a22b"]
    with pytest.raises(OptionError, match=r"takes 471\.3 GB .* 80\.0 GB free: .*tensor_parallel_size=8, \d\d\.\d GB"):
        placement.require_memory(card, needed, "DIR", torch.bfloat16, divided=config)
    with pytest.raises(OptionError, match=r"use another device$"):  # ranks of a CPU share its memory
        placement.require_memory(torch.device("cpu"), needed, "DIR", torch.bfloat16, divided=config)
