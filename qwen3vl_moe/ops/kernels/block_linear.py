"""A linear layer whose weights are in block-scaled FP8, in Triton: for one row, for some, for all cards and sizes.

Each step along the contraction is one group of 128 channels, as in `tma_moe.gemm.fp8_weights_m`: the tensor cores sum
it by themselves, and the sum, times the scales of both operands, is added up in float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import run_kept
from tma_moe.descriptors import activation_descriptor
from tma_moe.gemm.fp8_gemv import activations, wide_weights
from tma_moe.launcher import Launch, current_stream, device_guard
from tma_moe.pdl import take_turn
from tma_moe.portable.products import load_step
from tma_moe.portable.targets import as_stored
from tma_moe.portable.widen import widened
from tma_moe.quantise import BLOCK, quantize_rows
from tma_moe.support import has_fp8_products, interpreting


@triton.jit
def _one_row(
    x_ptr,  # [T, K]
    w_ptr,  # [N, K] FP8; without A8 as bytes
    scale_ptr,  # [N / SHARED, B]
    y_ptr,  # [T, N]
    N: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,  # rows of weights that have a scale in common
    COLS: tl.constexpr,  # divides SHARED
    BLOCK_K: tl.constexpr,
    A8: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLS channels of one row of y, on the ordinary cores; see `tma_moe.gemm.fp8_gemv`."""
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    t = tl.program_id(1).to(tl.int64)
    w_rows = (w_ptr + n.to(tl.int64) * K)[:, None]
    scales = scale_ptr + tl.program_id(0) * COLS // SHARED * ((K + BLOCK - 1) // BLOCK)
    take_turn(PDL)
    acc = tl.zeros([COLS], tl.float32)
    for at in tl.static_range(0, K, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        w = tl.load(w_rows + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_ptr + t * K + k, mask=k < K, other=0.0)
        x = activations(x, BLOCK_K // BLOCK, A8).reshape([BLOCK_K])
        x = x * tl.load(scales + k // BLOCK, mask=k < K, other=0.0)
        acc += tl.sum(wide_weights(w, A8) * x[None, :], axis=1)
    tl.store(y_ptr + t * N + n, acc.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["T"])
def _some_rows(
    x_desc,  # FP8 [T, K], blocks [ROWS, 128]
    x_scale_ptr,  # [T, B]
    w_desc,  # FP8 [N, K], blocks [COLS, 128]
    scale_ptr,  # [N / SHARED, B]
    y_ptr,  # [T, N]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    COLS: tl.constexpr,  # divides SHARED
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLS channels of ROWS rows of y. The weights are the M operand."""
    take_turn(PDL)
    groups: tl.constexpr = (K + BLOCK - 1) // BLOCK
    first_n, first_t = tl.program_id(0) * COLS, tl.program_id(1) * ROWS
    n, t = first_n + tl.arange(0, COLS), first_t + tl.arange(0, ROWS)
    x_scales = x_scale_ptr + tl.minimum(t, T - 1) * groups
    scales = scale_ptr + first_n // SHARED * groups
    acc = tl.zeros([COLS, ROWS], tl.float32)
    for group in tl.range(0, groups, num_stages=STAGES):
        w = w_desc.load([first_n, group * BLOCK])
        x = x_desc.load([first_t, group * BLOCK])
        scale = tl.load(x_scales + group) * tl.load(scales + group)
        acc += tl.dot(w, x.T) * scale[None, :]
    y_at = y_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty).T, mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def _portable_rows(
    x_ptr,  # [T, K], FP8 with A8
    x_scale_ptr,  # with A8: [T, B]
    w_ptr,  # [N, K] FP8; without A8 as bytes
    scale_ptr,  # [N / SHARED, B]
    y_ptr,  # [T, N]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    A8: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLS channels of ROWS rows of y, whatever the sizes and the card; see `tma_moe.portable.fp8_products`."""
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # Rows past the end repeat the last one, and are not stored.
    clamped_n, clamped_t = tl.minimum(n, N - 1), tl.minimum(t, T - 1).to(tl.int64)
    groups: tl.constexpr = (K + BLOCK - 1) // BLOCK
    w_rows = w_ptr + clamped_n.to(tl.int64)[:, None] * K
    scales = scale_ptr + clamped_n // SHARED * groups
    x_rows = x_ptr + clamped_t[:, None] * K
    acc = tl.zeros([COLS, ROWS], tl.float32)
    take_turn(PDL)
    for group in tl.range(0, groups):
        w = load_step(w_rows, group * BLOCK, BLOCK, K)
        x = load_step(x_rows, group * BLOCK, BLOCK, K)
        if not A8:
            w = widened(w, x.dtype)
        part = tl.dot(w, x.T) * tl.load(scales + group)[:, None]
        if A8:
            part = part * tl.load(x_scale_ptr + clamped_t * groups + group)[None, :]
        acc += part
    y_at = y_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty).T, mask=(t < T)[:, None] & (n < N)[None, :])


def one_row(x_TK: Tensor, weight_NK: Tensor, scale: Tensor, shared: int, a8: bool | None = None) -> Tensor:
    """`x @ weight.T` in block-scaled FP8, rounded to the dtype of x; for a few rows, each by itself.

    Args:
        x_TK: bf16 or fp16, contiguous.
        weight_NK: float8_e4m3fn, contiguous.
        scale: float32 [N / shared, ceil(K / 128)]: a scale for each `shared` rows and 128 columns; 4 divides `shared`.
        a8: quantise x; None: where the card multiplies FP8. Else x stays as it is.
    """
    (T, K), N = x_TK.shape, len(weight_NK)
    a8 = has_fp8_products(x_TK.device) if a8 is None else a8
    y_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    constants = N, K, shared, 4, min(2048, max(BLOCK.value, triton.next_power_of_2(K))), a8
    operands = x_TK, as_stored(weight_NK, a8), scale, y_TN
    run_kept(_one_row, (triton.cdiv(N, 4), T, 1), operands, (), constants, warps=4)
    return y_TN


@functools.cache
def _launch(device: torch.device, dtype: torch.dtype, N: int, K: int, shared: int, cols: int, rows: int) -> Launch:
    # Device and dtype are only part of the key: a compiled kernel belongs to both.
    return Launch(_some_rows, (N, K, shared, cols, rows, 6, not interpreting()), warps=4, stages=6)


def some_rows(x_TK: Tensor, weight_NK: Tensor, scale: Tensor, shared: int) -> Tensor:
    """The same for any number of rows, where 64 divides `shared` and 16 divides K: TMA brings both operands."""
    (T, K), N = x_TK.shape, len(weight_NK)
    y_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    cols = 64  # a warpgroup MMA has as many rows
    rows = min(64, max(16, triton.next_power_of_2(T)))
    while rows > 16 and triton.cdiv(N, cols) * triton.cdiv(T, rows) < 100:  # leaves multiprocessors idle
        rows //= 2
    with device_guard(x_TK.device):
        stream = current_stream(x_TK.device)
        x8_TK, x_scale_TB = quantize_rows(stream, x_TK)
        launch = _launch(x_TK.device, x_TK.dtype, N, K, shared, cols, rows)
        x_desc = activation_descriptor(x8_TK, (rows, BLOCK.value))
        w_desc = activation_descriptor(weight_NK, (cols, BLOCK.value))
        grid = triton.cdiv(N, cols), triton.cdiv(T, rows), 1
        launch(stream, grid, x_desc, x_scale_TB, w_desc, scale, y_TN, T)
    return y_TN


def portable_rows(x_TK: Tensor, weight_NK: Tensor, scale: Tensor, shared: int, a8: bool | None = None) -> Tensor:
    """The same for any sizes, on any card that has kernels; without `a8` (None: as the card is) x is not quantised."""
    (T, K), N = x_TK.shape, len(weight_NK)
    a8 = has_fp8_products(x_TK.device) if a8 is None else a8
    y_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    rows = min(64, max(16, triton.next_power_of_2(T)))
    cols, warps = (32, 4) if T <= 64 else (128, 8)
    if T:
        x = x_TK, scale  # without scales of x a kernel wants an address all the same
        if a8:
            with device_guard(x_TK.device):
                x = quantize_rows(current_stream(x_TK.device), x_TK)
        operands = (*x, as_stored(weight_NK, a8), scale, y_TN)
        grid = triton.cdiv(N, cols), triton.cdiv(T, rows), 1
        run_kept(_portable_rows, grid, operands, (T,), (N, K, shared, cols, rows, a8), warps, stages=3)
    return y_TN
