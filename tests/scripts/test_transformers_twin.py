"""The twin is transformers' model over our weights, and its fp32 evaluation is one."""

import pytest
import torch

from benchmarking.random_weights import in_fp8
from benchmarking.transformers_twin import in_float32, transformers_twin
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from tests.model.prompts import assert_close_to_scale, make_prompt, oracle_logits


def test_the_twin_is_the_oracle_and_shares_memory(tiny):
    model = Qwen3VLMoe.from_pretrained(tiny.published, progress=False)
    twin = transformers_twin(model, experts="eager")
    prompt = make_prompt(tiny.oracle.config, [(3, 4), (2, 5)])
    assert_close_to_scale(oracle_logits(twin, prompt), oracle_logits(tiny.oracle, prompt), tolerance=1e-6)
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    theirs = {parameter.untyped_storage().data_ptr() for parameter in twin.parameters()}
    assert theirs == ours


def test_float32_evaluation_of_bfloat16_weights(plain):
    model = Qwen3VLMoe.from_pretrained(plain.path, dtype=torch.bfloat16, progress=False)
    exact = Qwen3VLMoe.from_pretrained(plain.path, dtype=torch.bfloat16, progress=False).float()
    prompt = make_prompt(plain.oracle.config, [(3, 4)])
    yardstick = oracle_logits(in_float32(transformers_twin(model)), prompt)
    assert yardstick.dtype == torch.float32
    assert_close_to_scale(yardstick, exact.logits(*prompt.our_inputs()), tolerance=1e-5)
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="largest difference"):
        assert_close_to_scale(model.logits(*prompt.our_inputs()).float(), yardstick, tolerance=1e-5)


def test_weights_in_fp8_are_refused(plain):
    with torch.device("meta"):
        model = Qwen3VLMoe(in_fp8(Qwen3VLMoeConfig.from_pretrained(plain.path)))
    with pytest.raises(OptionError, match="FP8 cannot be compared"):
        transformers_twin(model)
