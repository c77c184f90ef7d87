"""A compiled kernel belongs to the dtypes and the device that it was compiled for: no launch may meet others.

A kept launch skips what triton would find out from its arguments, so other ones would be misread in silence.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import tma_moe
from qwen3vl_moe.ops.kernels import block_linear, hopper_attention, hopper_linear, launch, residual, rotation
from tma_moe import combine, op, quantise, recipe, routing, support, tiles
from tma_moe.block_fp8 import FP8, scale_shape
from tma_moe.launcher import Launch, instead_of_launching

HALVES = torch.bfloat16, torch.float16
E, K, H, I = 8, 4, 256, 128  # noqa: E741


@pytest.fixture
def met(monkeypatch):
    """What each launch was called with, by launch; on tensors without memory that pass for those of two H100s."""
    caches = [
        recipe._buckets,
        routing._route_launch,
        quantise._launch,
        combine._launch,
        launch._kept,
        tiles._warn_untimed,
        *(support.has_pdl, support.has_fp8_products, support.multiplies_from_shared_memory),
        *(module._launch for module in (block_linear, hopper_attention, hopper_linear)),
    ]
    monkeypatch.setattr(op, "unavailable", lambda *_, **__: None)
    monkeypatch.setattr(support, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    found: dict[Launch, set] = {}

    def note(launch: Launch, grid: tuple, args: tuple) -> None:
        tensors = [getattr(arg, "base", arg) for arg in args]
        found.setdefault(launch, set()).add(tuple(x.dtype for x in tensors if isinstance(x, torch.Tensor)))

    for cached in caches:
        cached.cache_clear()
    with torch.device("meta"), instead_of_launching(note):
        yield found
    for cached in caches:
        cached.cache_clear()


def experts(dtype: torch.dtype) -> tma_moe.ExpertWeights:
    if dtype != FP8:
        return tma_moe.ExpertWeights(E, H, I, dtype=dtype)
    weights = [torch.empty(E, 2 * I, H).to(FP8), torch.empty(E, H, I).to(FP8)]
    scales = [torch.empty(scale_shape(weight.shape)) for weight in weights]
    return tma_moe.ExpertWeights.from_checkpoint(*weights, "transformers5", *scales)


@pytest.mark.parametrize("backend", ["tma", "triton"])
def test_the_moe(met, backend):
    kinds = [(half, half) for half in HALVES] + [(half, FP8) for half in HALVES]
    for (x_dtype, dtype), ids_dtype, float32, T in itertools.product(
        kinds, (torch.int32, torch.int64), (True, False), (1, 77, 3000)
    ):
        weights_TK = torch.empty(T, K, dtype=torch.float32 if float32 else x_dtype)
        operands = torch.empty(T, H, dtype=x_dtype), torch.empty(T, K, dtype=ids_dtype), weights_TK, experts(dtype)
        tma_moe.fused_moe(*operands, backend=backend)
        y = tma_moe.fused_moe(*operands, backend=backend, combine=False)
        if not isinstance(y, torch.Tensor):
            y.combined()
        tma_moe.route(torch.empty(T, E, dtype=torch.float32 if float32 else x_dtype), K, backend=backend)
    assert {name for each in met if "combine" in (name := each.kernel.__name__)}
    assert all(len(dtypes) == 1 for dtypes in met.values()), "a launch met several dtypes"


def test_what_the_model_calls_around_it(met):
    norm, starts = torch.nn.RMSNorm(128, eps=1e-6), torch.empty(3, dtype=torch.int32)
    for dtype, ids_dtype in itertools.product(HALVES, (torch.int32, torch.int64)):
        x, wide = torch.empty(300, H, dtype=dtype), torch.empty(300, 6, 128, dtype=dtype)
        weight = torch.empty(H, dtype=dtype)
        rows = torch.empty(300, K, H, dtype=dtype)
        routed = torch.empty(300, K, dtype=ids_dtype), torch.empty(300, K, dtype=torch.float32)
        residual.add_norm(x, x, weight, 1e-6)
        residual.combine_add_norm(x, tma_moe.Uncombined(rows, *routed, E, False), weight, 1e-6)
        hopper_attention.hopper_attention(wide, wide[:, :2], wide[:, :2], starts, starts, causal=True)
        angles = (torch.empty(300, 64),) * 2
        cache = torch.empty(2, 8, 16, 1, 128, dtype=dtype)
        slots = torch.empty(300, dtype=ids_dtype)
        norms = [norm.to(dtype)] * 2
        rotation.norm_rotate_store(torch.empty(300, 6 * 128, dtype=dtype), (4, 1), *angles, norms, slots, cache)
        w8, scale = torch.empty(256, H).to(FP8), torch.empty(2, 2)
        for product in (lambda *a: block_linear.one_row(*a, 128), lambda *a: block_linear.some_rows(*a, 128)):
            product(x[:2], w8, scale)
        hopper_linear.many_rows(x, w8, scale)
    assert all(len(dtypes) == 1 for dtypes in met.values()), "a launch met several dtypes"
