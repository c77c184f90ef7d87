"""What a caller may get wrong, and what is missing: one clear line each, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tma_moe
from tma_moe import FP8, op, support

ROOT = Path(__file__).resolve().parents[2]


def operands(**changes):
    given = {
        "x_TH": torch.randn(3, 16),
        "topk_ids_TK": torch.zeros(3, 2, dtype=torch.int32),
        "topk_weights_TK": torch.ones(3, 2),
        "experts": tma_moe.ExpertWeights(4, 16, 8, dtype=torch.float32),
    }
    return {**given, **changes}


WRONG = [
    ({"x_TH": torch.randn(3, 24)}, ValueError, r"x must be \[T, H\] with H = 16, got shape \(3, 24\)"),
    ({"topk_ids_TK": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"must both be \[T, K\] with T = 3"),
    ({"topk_weights_TK": torch.ones(3, 1)}, ValueError, r"got shapes \(3, 2\) and \(3, 1\)"),
    ({"topk_ids_TK": torch.zeros(3, 2)}, TypeError, "topk_ids must be int32 or int64, got torch.float32"),
    ({"x_TH": torch.randn(3, 16).half()}, TypeError, "must share one floating dtype, got x torch.float16"),
    ({"topk_weights_TK": torch.ones(3, 2).half()}, TypeError, "topk_weights must be float32"),
    ({"topk_ids_TK": torch.zeros(3, 2, dtype=torch.int32, device="meta")}, ValueError, "topk_ids on meta"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_operands(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        tma_moe.fused_moe(**operands(**{"backend": "reference", **changes}))
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_belong_together():
    given = operands()
    given["experts"].gate_up = torch.nn.Parameter(torch.empty(4, 20, 16), requires_grad=False)
    with pytest.raises(ValueError, match=r"gate_up \(4, 20, 16\) and experts.down \(4, 16, 8\) do not belong together"):
        tma_moe.fused_moe(**given, backend="reference")


@pytest.mark.parametrize(
    ("logits", "k", "error", "message"),
    [
        (torch.randn(3), 1, ValueError, r"logits must be \[T, E\]"),
        (torch.zeros(3, 4, dtype=torch.int32), 1, TypeError, "must be floating point"),
        (torch.randn(3, 4), 5, ValueError, "k must be between 1 and the 4 experts, got 5"),
        (torch.randn(3, 4), 0, ValueError, "got 0"),
    ],
)
def test_wrong_logits(logits, k, error, message):
    with pytest.raises(error, match=message):
        tma_moe.route(logits, k, backend="reference")


@pytest.mark.parametrize("backend", op.BACKENDS)
@pytest.mark.parametrize(
    ("skip", "got"),
    [
        (torch.zeros(3, dtype=torch.int32), r"torch.int32 of shape \(3,\) on cpu"),
        (torch.zeros(4, dtype=torch.bool), r"torch.bool of shape \(4,\) on cpu"),
        (torch.zeros(3, 4, dtype=torch.bool), r"torch.bool of shape \(3, 4\) on cpu"),
        (torch.zeros(3, dtype=torch.bool, device="meta"), r"torch.bool of shape \(3,\) on meta"),
    ],
)
def test_wrong_skip(skip, got, backend):
    with pytest.raises(ValueError, match=rf"skip must be bool \[T\] on cpu with T = 3, got {got}") as caught:
        tma_moe.route(torch.randn(3, 4), 2, skip_T=skip, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(support.interpreting(), reason="the interpreter runs backend 'tma' on the CPU")
def test_backend_tma_names_what_is_missing_on_a_cpu():
    assert "Hopper GPU is needed, the device is cpu" in tma_moe.unavailable("cpu", torch.bfloat16)
    with pytest.raises(RuntimeError, match=r'backend "tma" cannot run here: .*cpu; use backend="reference"'):
        tma_moe.fused_moe(**operands())
    with pytest.raises(RuntimeError, match='route: backend "tma" cannot run here'):
        tma_moe.route(torch.randn(3, 4), 2)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A CUDA GPU of some capability, as far as `unavailable` can tell."""

    def pretend(capability):
        support._problem.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    yield pretend
    support._problem.cache_clear()


@pytest.mark.skipif(support.interpreting(), reason="about real GPUs")
def test_unavailable_by_capability_and_dtype(pretend_gpu):
    pretend_gpu((8, 0))
    assert tma_moe.unavailable("cuda", torch.bfloat16) == (
        "a Hopper GPU (compute capability 9.0) is needed, cuda:0 is Some GPU (8.0)"
    )
    assert tma_moe.unavailable("cuda", torch.bfloat16, backend="triton") is None
    assert tma_moe.unavailable("cuda", torch.bfloat16, (37, 19), FP8, "triton") is None  # any sizes
    pretend_gpu((7, 5))
    assert tma_moe.unavailable("cuda", torch.float16, backend="triton") == (
        "a CUDA GPU (compute capability 8.0 or above) is needed, cuda:0 is Some GPU (7.5)"
    )
    pretend_gpu((9, 0))
    assert tma_moe.unavailable("cuda", torch.bfloat16) is None
    assert tma_moe.unavailable("cuda:0", torch.float16) is None
    assert tma_moe.unavailable("cuda", torch.float32) == "bfloat16 or float16 is needed, not torch.float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.update(x_TH=torch.randn(16, 3).T), "needs x contiguous"),
        (lambda g: g.update(x_TH=torch.randn(3 * 16 + 1)[1:].view(3, 16)), "needs x at a multiple of 16 bytes"),
        (lambda g: g.update(experts=tma_moe.ExpertWeights(4, 16, 6, dtype=torch.float32)), "got H = 16, I = 6"),
    ],
)
def test_layout_that_backend_tma_cannot_read(monkeypatch, change, message):
    monkeypatch.setattr(op, "unavailable", lambda *_, **__: None)
    given = operands()
    change(given)
    with pytest.raises(ValueError, match=message):
        tma_moe.fused_moe(**given)


BLOCK_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed: find_spec says None, an import fails
import torch, tma_moe
experts = tma_moe.ExpertWeights(2, 8, 8, dtype=torch.float32)
experts.gate_up.data.normal_(); experts.down.data.normal_()
ids, weights = tma_moe.route(torch.randn(3, 2), 1, backend="reference")
assert tma_moe.fused_moe(torch.randn(3, 8), ids, weights, experts, backend="reference").isfinite().all()
print(tma_moe.unavailable("cuda", torch.bfloat16))
"""


def test_import_and_reference_without_triton():
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, "-c", BLOCK_TRITON], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "triton >= 3.6 is needed and cannot be imported" in done.stdout


def test_old_triton_is_named(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    support._problem.cache_clear()
    support.triton_problem.cache_clear()
    assert tma_moe.unavailable("cuda", torch.bfloat16) == "triton >= 3.6 is needed, found 3.5.1"
    support._problem.cache_clear()
    support.triton_problem.cache_clear()


@pytest.mark.parametrize("broken", support.GLUON_PRODUCTS)
def test_gluon_that_cannot_be_imported_is_a_reason(monkeypatch, broken):
    """Gluon is experimental: another triton may lack a name that a kernel imports."""
    pytest.importorskip("triton.experimental.gluon")
    right = support.importlib.import_module

    def import_module(name, *package):
        if name == f"tma_moe.gemm.{broken}":
            raise AttributeError("module 'gluon' has no attribute 'mbarrier'")
        return right(name, *package)

    asked = support.gluon_problem.__wrapped__  # what it says is kept for the process
    assert asked() is None
    monkeypatch.setattr(support.importlib, "import_module", import_module)
    assert asked() == "AttributeError: module 'gluon' has no attribute 'mbarrier'"
    monkeypatch.setattr(support, "triton_problem", lambda: "triton >= 3.6 is needed, found 3.5.1")
    assert asked() == "triton >= 3.6 is needed, found 3.5.1"


def test_transformers_imports_beside_the_source_root():
    # `kernels` is also a distribution that transformers looks for: this folder must not pass for it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
