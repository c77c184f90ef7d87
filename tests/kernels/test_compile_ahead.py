"""Which kernels calls may need, and that they are compiled before the first of them: on the CPU, as a list."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tma_moe
from tma_moe import support
from tma_moe.launcher import Launch, compile_ahead, instead_of_launching

triton = pytest.importorskip("triton")
if support.interpreting():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tma_moe.recipe import _Buckets, call_ends  # noqa: E402

META = torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, tma_moe.FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("card", "backend"),
    [
        ("NVIDIA H100 80GB HBM3", "tma"),
        ("NVIDIA H200", "tma"),
        ("NVIDIA H200", "triton"),
        ("a card without a file", "tma"),
        ("a card without a file", "triton"),
    ],
)
@pytest.mark.parametrize("most", [1, 200, 4100, 8320])
def test_calls_of_a_few_sizes_launch_all_that_any_call_launches(monkeypatch, card, backend, most, dtype):
    E, K, H, I = 128, 8, 2048, 768  # noqa: E741
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    buckets = _Buckets(META, E, K, H, I, dtype == tma_moe.FP8, backend)
    experts = tma_moe.ExpertWeights(E, H, I, device=META, dtype=dtype)

    def launched(sizes) -> set[Launch]:
        met: set[Launch] = set()
        with instead_of_launching(lambda launch, grid, args: met.add(launch)):
            for T in sizes:
                ids = torch.empty(T, K, dtype=torch.int32, device=META)
                x = torch.empty(T, H, dtype=torch.bfloat16, device=META)
                buckets.recipe(T).run(x, ids, ids.float(), experts)
        return met

    ends = buckets.ends(K, most)
    assert ends[-1] == most
    assert len(ends) < 25
    # Around every power of two and every limit, where what is launched may change, and a few between.
    around = {n + d for n in (*(1 << i for i in range(14)), *ends) for d in (-1, 0, 1)} | set(range(1, most, 97))
    assert launched(sorted(n for n in around if 1 <= n <= most)) == launched(ends)


def test_a_kernel_is_compiled_ahead_once_and_not_launched():
    class Kernel:
        compiled = 0
        ran = 0

        def warmup(self, *args, grid, **options):
            Kernel.compiled += 1

        def __getitem__(self, grid):
            def run(*args, **options):
                Kernel.ran += 1

            return run

    launch, seen = Launch(Kernel(), (), pdl=False), []
    with compile_ahead(lambda done, asked: seen.append((done, asked))):
        launch(0, (1, 1, 1), 3)
        launch(0, (2, 1, 1), 4)
    assert (Kernel.compiled, Kernel.ran) == (1, 0)
    launch(0, (1, 1, 1), 3)
    assert (Kernel.compiled, Kernel.ran) == (1, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_compiled_ahead_are_not_compiled_again(tmp_path, monkeypatch):
    """In an empty cache: all are compiled in threads, and launching them compiles nothing."""
    compiled = []
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["repr"]))
    experts = tma_moe.ExpertWeights(16, 256, 128, device="cuda", dtype=torch.bfloat16)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)

    def run(T: int) -> torch.Tensor:
        x = torch.ones(T, 256, device="cuda", dtype=torch.bfloat16)
        ids, weights = tma_moe.route(torch.randn(T, 16, device="cuda"), 4)
        y = tma_moe.fused_moe(x, ids, weights, experts)
        assert isinstance(y, torch.Tensor)
        return y

    counts = []
    with compile_ahead(lambda done, asked: counts.append((done, asked))):
        for T in call_ends(experts, 4, 3000, "tma"):
            run(T)
    assert counts[-1] == (len(compiled), len(compiled))
    compiled.clear()
    for T in (1, 3, 17, 100, 513, 1500, 3000):
        assert run(T).isfinite().all()
    assert compiled == []
