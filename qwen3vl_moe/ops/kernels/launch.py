"""Launching small kernels with little work on the host: a compiled kernel is kept for its dtypes and constants.

Triton's own launch finds out from its arguments, every time, which compiled kernel they need; a
:class:`tma_moe.launcher.Launch` is told once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.fp8_cache import FP8_CACHE
from tma_moe.block_fp8 import FP8
from tma_moe.launcher import Launch, current_stream, device_guard
from tma_moe.support import has_pdl


@triton.jit
def cached(x, dtype: tl.constexpr):
    """Keys or values as products take them. From FP8 by way of fp32: Triton 3.6 has no other way on Ada."""
    if x.dtype == tl.float8e4nv:
        x = x.to(tl.float32)
    return x.to(dtype)


@functools.cache
def _kept(
    kernel, device: torch.device, dtypes: tuple[torch.dtype, ...], constants: tuple, warps: int, stages: int, pdl: bool
) -> Launch:
    # Device and dtypes are only part of the key: a compiled kernel belongs to both.
    return Launch(kernel, constants, warps, stages, pdl)


def run_kept(
    kernel,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple,
    constants: tuple,
    warps: int,
    early: bool = True,
    stages: int = 1,
) -> None:
    """Launch a small kernel with little work on the host.

    Args:
        kernel: it takes tensors, numbers and constants, in this order, and does not specialise on its numbers.
        early: launch it with PDL where the device can. Its last constant, which is added here, tells it so. Not for a
            kernel that follows a copy.
        warps, stages: triton's num_warps and num_stages.
    """
    if early:
        early = has_pdl(tensors[0].device)
        constants = (*constants, early)
    if any(x.data_ptr() % 16 for x in tensors):
        # A kept kernel relies on addresses that are multiples of 16 bytes, as the engine's are.
        kernel[grid](*tensors, *numbers, *constants, num_warps=warps, num_stages=stages)
        return
    device = tensors[0].device
    launch = _kept(kernel, device, tuple(x.dtype for x in tensors), constants, warps, stages, early)
    with device_guard(device):
        launch(current_stream(device), grid, *tensors, *numbers)


def cache_operands(layer_cache: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Keys, values, their scales, and tokens in a block of an FP8 cache (0 of another, whose scales mean nothing).

    Args:
        layer_cache: [2, blocks, block_size, G, D], or an FP8 one (`qwen3vl_moe.ops.fp8_cache`), contiguous.
    """
    k_rows, v_rows = layer_cache[0], layer_cache[-1]
    if layer_cache.dtype != FP8_CACHE:
        return k_rows, v_rows, k_rows, v_rows, 0
    scales = k_rows.view(torch.float32), v_rows.view(torch.float32)
    return k_rows.view(FP8), v_rows.view(FP8), *scales, layer_cache.shape[2]


def softmax_scale(D: int) -> float:
    """1 / sqrt(D), times log2(e): kernels take powers of two, which are one instruction where those of e are two."""
    return D**-0.5 * 1.4426950408889634


def row_block(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds a row of this width."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 8)
