"""Whole models whose every operation goes through its kernel, beside the same models in plain torch.

In Triton's interpreter on a CPU, in fp32: what the kernels compute is tested one by one elsewhere, here it is that each
operation hands its kernel the right things and makes the right thing of what comes back.
"""

import pytest
import torch

from qwen3vl_moe.engine.llm import LLM
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops import attend, mlp, patches, residual, rotation
from tests.interpreted import INTERPRETED
from tests.kernels.test_fp8_values import conversions_as_on_a_gpu  # noqa: F401
from tests.model.prompts import make_prompt
from tests.pictures import noise

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")


@pytest.fixture
def through_kernels(monkeypatch):
    """Every operation takes its kernel, but for the Gluon attention and cuBLAS's GELU, which need a GPU."""
    for door in (attend, patches, residual, rotation):
        monkeypatch.setattr(door, "takes_kernels", lambda x: True)
    monkeypatch.setattr(attend, "gluon_attention_problem", lambda device: "no GPU")
    assert mlp.takes_kernels(torch.empty(0)) is False


@interpreted
@pytest.mark.parametrize(("name", "moe"), [("plain", "tma"), ("dense_routing", "tma"), ("dense_routing", "triton")])
def test_logits_of_text_and_images(make_tiny, name, moe, through_kernels, monkeypatch):
    tiny = make_tiny(name)
    prompt = make_prompt(tiny.oracle.config, [(2, 3), (1, 2)])
    ours = Qwen3VLMoe.from_pretrained(tiny.path, moe=moe, progress=False)
    through = ours.logits(*prompt.our_inputs())
    monkeypatch.undo()
    ours.set_moe("reference")
    plain = ours.logits(*prompt.our_inputs())
    assert (through - plain).abs().max() <= 1e-4 * plain.abs().max()


@interpreted
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_an_engine_that_prefills_in_chunks_and_decodes(plain, through_kernels, monkeypatch, kv_cache_dtype):
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": noise(24, 16)}, {"type": "text", "text": "Who?"}]}],
        [{"role": "user", "content": "Describe the large green triangle above the circle."}],
    ]

    def answers(moe: str) -> list[list[int]]:
        options = {"moe": moe, "progress": False, "max_model_len": 128, "max_prefill_tokens": 16}
        options["kv_cache_dtype"] = kv_cache_dtype
        return [output.outputs[0].token_ids for output in LLM(plain.path, **options).chat(chats, params)]

    through = answers("tma")
    monkeypatch.undo()
    assert through == answers("reference")
