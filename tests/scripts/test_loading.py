"""Random weights in FP8: which are, how they are spread, and that an engine runs on them."""

import json
import shutil

import pytest
import torch

from benchmarking.loading import load_llm
from benchmarking.random_weights import in_fp8, random_model
from qwen3vl_moe import SamplingParams
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.ops import ALONE
from tests.fp8 import CONFIG
from tests.model.prompts import CASES, make_prompt
from tests.ranks import on_ranks
from tma_moe.block_fp8 import FP8


@pytest.fixture(scope="module")
def blocks(make_tiny):
    return make_tiny("blocks")


def test_what_they_stand_for_has_the_spread_of_all_others(blocks):
    """N(0, 0.02): numbers of N(0, 100), rounded, times scales between 1.5e-4 and 2.5e-4."""
    model = random_model(in_fp8(Qwen3VLMoeConfig.from_pretrained(blocks.path)), dtype=torch.bfloat16)
    named = dict(model.named_parameters())
    fp8 = {name: parameter.float() for name, parameter in named.items() if parameter.dtype == FP8}
    assert len(fp8) == 4 * model.config.text.num_layers
    for name, values in fp8.items():
        assert values.isfinite().all()
        # The relative error of a standard deviation of n values is 1 / sqrt(2 n); that of e4m3's rounding is far less.
        assert abs(values.std() / 100 - 1) < 5 / (2 * values.numel()) ** 0.5 + 2**-8, name
        assert values.mean().abs() < 5 * 100 / values.numel() ** 0.5, name
    scales = torch.cat([p.flatten() for name, p in named.items() if name.endswith("scale")])
    assert scales.dtype == torch.float32
    assert 1.5e-4 <= scales.min() < scales.max() <= 2.5e-4
    assert named["lm_head.weight"].dtype == torch.bfloat16


def test_a_seed_gives_the_same_weights(blocks):
    config = in_fp8(Qwen3VLMoeConfig.from_pretrained(blocks.path))
    one, two, other = (random_model(config, seed=seed).text.layers[1].moe.experts.down for seed in (0, 0, 1))
    assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    assert not torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(("load_format", "declared"), [("dummy-fp8", False), ("dummy", True), ("dummy", False)])
def test_an_engine_of_them_answers(blocks, tmp_path, load_format, declared):
    """FP8 because the format says so, or because the config does."""
    shutil.copytree(blocks.published, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    if declared:
        raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": CONFIG}
        (tmp_path / "config.json").write_text(json.dumps(raw))
    llm = load_llm(str(tmp_path), load_format=load_format, device="cpu", max_model_len=256)
    fp8 = {name for name, parameter in llm.engine.model.named_parameters() if parameter.dtype == FP8}
    assert bool(fp8) == (declared or load_format == "dummy-fp8")
    [answer] = llm.generate("A b c", SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 4


@pytest.mark.parametrize(("name", "fp8"), [("wide", False), ("ranks, width", True), ("ranks, experts", True)])
def test_weights_do_not_depend_on_the_number_of_ranks(make_tiny, name, fp8):
    """Ranks that hold parts of the drawn model give its logits, but for the order of sums."""
    tiny = make_tiny(name)
    config = Qwen3VLMoeConfig.from_pretrained(tiny.path)
    config = in_fp8(config) if fp8 else config
    prompt = make_prompt(tiny.oracle.config, CASES["text"])

    def logits(ranks):
        return random_model(config, dtype=torch.float32, moe="reference", ranks=ranks).logits(*prompt.our_inputs())

    alone, several = logits(ALONE), on_ranks(2, logits)[0]
    # FP8: an activation beside a rounding step, which is 1/16 of itself, may fall to its other side.
    tolerance = 0.02 if fp8 else 64 * torch.finfo(torch.float32).eps
    assert (several - alone).abs().max() <= tolerance * alone.abs().max()


def test_several_engines_of_them_answer(blocks):
    """Each engine draws the weights by itself, so greedy answers do not tell which of them made them."""
    llm = load_llm(blocks.published, load_format="dummy", device="cpu", max_model_len=64, data_parallel_size=2)
    try:
        answers = llm.generate(["A b c"] * 4, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert {tuple(answer.outputs[0].token_ids) for answer in answers} == {tuple(answers[0].outputs[0].token_ids)}
    finally:
        llm.close()
