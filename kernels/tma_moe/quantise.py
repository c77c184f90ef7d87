"""Activations to FP8 on the GPU: inside a kernel that has read them, or in a launch of its own.

The arithmetic is that of `block_fp8.quantize_rows`, but for a product with the inverse where that divides: a value that
lies within float32's rounding of the middle of two FP8 numbers may go to the other one.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tma_moe import block_fp8
from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.support import has_pdl

BLOCK = tl.constexpr(block_fp8.BLOCK)
LARGEST = tl.constexpr(block_fp8.LARGEST)
SMALLEST_AMAX = tl.constexpr(block_fp8.SMALLEST_AMAX)


@triton.jit
def quantised(x):
    """FP8 values and float32 scales of groups, which are the rows of x [R, 128]."""
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST_AMAX) / LARGEST
    return (x * (1.0 / scale)[:, None]).to(tl.float8e4nv), scale


@triton.jit
def rounded(x):
    """What groups, the rows of x [R, 128], are in FP8: values times scales, in float32."""
    x8, scale = quantised(x)
    return x8.to(tl.float32) * scale[:, None]


@triton.jit
def quantise_rows(
    x_ptr,  # [T, K]
    x8_ptr,  # [T, K] FP8
    scale_ptr,  # [T, B]
    K: tl.constexpr,
    GROUPS: tl.constexpr,  # B, rounded up to a power of two
    PDL: tl.constexpr,
):
    """One program per row."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    groups: tl.constexpr = (K + BLOCK - 1) // BLOCK
    b = tl.arange(0, GROUPS)
    k = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + t * K + k, mask=k < K, other=0.0)
    x8, scale = quantised(x)
    tl.store(x8_ptr + t * K + k, x8, mask=k < K)
    tl.store(scale_ptr + t * groups + b, scale, mask=b < groups)


@functools.cache
def _launch(device: torch.device, dtype: torch.dtype, K: int) -> Launch:
    # Device and dtype are only part of the key: a compiled kernel belongs to both.
    groups = triton.next_power_of_2(block_fp8.blocks(K))
    pdl = has_pdl(device)
    return Launch(quantise_rows, (K, groups, pdl), warps=max(1, min(8, groups // 4)), pdl=pdl)


def quantize_rows(stream: int, x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """`block_fp8.quantize_rows` in one launch, with the device of x (contiguous) current."""
    T, K = x_TK.shape
    x8_TK = torch.empty(T, K, dtype=block_fp8.FP8, device=x_TK.device)
    scale_TB = torch.empty(T, block_fp8.blocks(K), dtype=torch.float32, device=x_TK.device)
    if T:
        _launch(x_TK.device, x_TK.dtype, K)(stream, (T, 1, 1), x_TK, x8_TK, scale_TB)
    return x8_TK, scale_TB
