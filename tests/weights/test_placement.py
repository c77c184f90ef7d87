"""Which kernels moe="auto" comes to on which card, and what is said of it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarking.random_weights import in_fp8
from qwen3vl_moe import LLM, Qwen3VLMoeConfig
from qwen3vl_moe.engine import llm as llm_module
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.engine.prepare import prepare
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.ops.dispatch import fp8_cache_problem
from qwen3vl_moe.weights import placement
from qwen3vl_moe.weights.placement import not_taken, resolve_moe
from tma_moe import support

CUDA = torch.device("cuda:0")
TEXT = Qwen3VLMoeConfig.qwen3_vl_30b_a3b().text
FP8_TEXT = in_fp8(Qwen3VLMoeConfig.qwen3_vl_30b_a3b()).text
pytestmark = pytest.mark.skipif(support.interpreting(), reason="about real GPUs")


@pytest.fixture
def card(monkeypatch):
    """A CUDA GPU of some capability, as far as the choice of kernels can tell."""
    caches = support._problem, support.has_fp8_products

    def pretend(*capability: int) -> None:
        for cached in caches:
            cached.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    yield pretend
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("text", [TEXT, FP8_TEXT], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("capability", "taken", "why"),
    [
        ((7, 5), "reference", r"a CUDA GPU \(compute capability 8.0 or above\) is needed, cuda:0 is Some GPU \(7.5\)"),
        ((8, 0), "triton", r"a Hopper GPU .* is needed, cuda:0 is Some GPU \(8.0\)"),
        ((8, 9), "triton", r"a Hopper GPU .* is needed, cuda:0 is Some GPU \(8.9\)"),
        ((9, 0), "tma", None),
        ((10, 0), "triton", r"a Hopper GPU .* is needed, cuda:0 is Some GPU \(10.0\)"),
        ((12, 0), "triton", r"a Hopper GPU .* is needed, cuda:0 is Some GPU \(12.0\)"),
    ],
)
def test_auto_takes_the_fastest_that_runs(card, capability, taken, why, text):
    card(*capability)
    assert resolve_moe("auto", CUDA, torch.bfloat16, text) == taken
    reason = not_taken(taken, CUDA, torch.bfloat16, text)
    if why is None:
        assert reason is None
    else:
        with pytest.raises(AssertionError, match=why):
            raise AssertionError(reason)


def test_asking_for_what_is_missing_is_an_error(card):
    card(8, 6)
    assert resolve_moe("triton", CUDA, torch.float16, TEXT) == "triton"
    with pytest.raises(OptionError, match=r"moe='tma' cannot run here: a Hopper GPU .*; use moe='auto' or"):
        resolve_moe("tma", CUDA, torch.float16, TEXT)
    with pytest.raises(OptionError, match="moe='triton' cannot run here: bfloat16 or float16 is needed"):
        resolve_moe("triton", CUDA, torch.float32, TEXT)
    with pytest.raises(OptionError, match="moe='cuda' is unknown; choose from auto, tma, triton, reference"):
        resolve_moe("cuda", CUDA, torch.float32, TEXT)


def test_sizes_that_tma_cannot_read_go_to_the_portable_kernels(card):
    card(9, 0)
    odd = SimpleNamespace(**{name: getattr(TEXT, name) for name in TEXT.__dataclass_fields__})
    odd.hidden_size = 2044
    assert resolve_moe("auto", CUDA, torch.bfloat16, odd) == "triton"
    assert "no whole 16 bytes" in not_taken("triton", CUDA, torch.bfloat16, odd)


@pytest.mark.parametrize(("moe", "what"), [("triton", "the portable kernels"), ("reference", "plain torch")])
def test_what_was_taken_on_a_card_is_said_once(plain, monkeypatch, moe, what):
    def loaded(**_):
        return SimpleNamespace(moe=moe, device=CUDA, dtype=torch.bfloat16)

    monkeypatch.setattr(llm_module, "load_model", loaded)
    monkeypatch.setattr(llm_module, "not_taken", lambda *_: "no such card")
    monkeypatch.setattr(llm_module, "Engine", lambda *_: SimpleNamespace(max_model_len=128))
    monkeypatch.setattr(llm_module, "Service", lambda _: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert LLM(plain.published, device="cpu", progress=False).moe_fallback == "no such card"
        LLM(plain.published, device="cpu", moe=moe, progress=False)
    assert [str(warning.message) for warning in caught] == [f"moe='auto' runs the experts in {what}: no such card"]


def test_a_cache_in_fp8_needs_a_card_that_knows_it(card):
    card(8, 6)
    assert fp8_cache_problem(torch.device("cpu")) is None
    model = SimpleNamespace(device=CUDA)
    message = (
        "kv_cache_dtype='fp8' cannot be used here: it needs compute capability 8.9 or above, cuda:0 has 8.6; "
        "use kv_cache_dtype='auto'"
    )
    with pytest.raises(OptionError) as caught:
        prepare(model, EngineOptions(kv_cache_dtype="fp8"), False)
    assert str(caught.value) == message
    card(8, 9)
    assert fp8_cache_problem(CUDA) is None


def test_a_gpu_without_triton_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(placement, "triton_problem", lambda: "triton >= 3.6 is needed and cannot be imported")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(device=CUDA))
    with pytest.raises(OptionError, match=r"device 'cuda' cannot be used here: triton .* or choose cpu"):
        placement.parse_device("cuda")
