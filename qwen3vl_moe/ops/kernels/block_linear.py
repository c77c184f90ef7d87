"""A linear layer whose weights are in block-scaled FP8, in Triton: for a few rows, and for all odd sizes.

The weights are the M operand, as in `tma_moe.gemm.fp8_weights_m`, and what that file says of its steps holds here: each
is one group of 128 channels, whose activations are rounded to FP8 by every program that reads them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import run_kept
from tma_moe.pdl import take_turn
from tma_moe.quantise import BLOCK, quantised


@triton.jit(do_not_specialize=["T"])
def _few_rows(
    x_ptr,  # [T, K]
    w_ptr,  # [N, K] FP8
    scale_ptr,  # [N / SHARED, B]
    y_ptr,  # [T, N]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    SHARED: tl.constexpr,  # rows of weights that have a scale in common
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLS channels of ROWS rows of y."""
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w_rows = (w_ptr + n.to(tl.int64) * K)[:, None]
    x_rows = (x_ptr + t.to(tl.int64) * K)[:, None]
    if SHARED % COLS == 0:
        scaled = tl.program_id(0) * COLS + tl.arange(0, 1)
    else:
        scaled = tl.minimum(n, N - 1)
    scales = scale_ptr + scaled // SHARED * ((K + BLOCK - 1) // BLOCK)
    acc = tl.zeros([COLS, ROWS], tl.float32)
    take_turn(PDL)
    for at in tl.range(0, K, BLOCK):
        k = at + tl.arange(0, BLOCK)
        w = tl.load(w_rows + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(x_rows + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
        x8, x_scale = quantised(x)
        acc += tl.dot(w, x8.T) * (tl.load(scales + at // BLOCK)[:, None] * x_scale[None, :])
    y_at = y_ptr + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty).T, mask=(t < T)[:, None] & (n < N)[None, :])


def few_rows(x_TK: Tensor, weight_NK: Tensor, scale: Tensor, shared: int) -> Tensor:
    """`x @ weight.T` in block-scaled FP8, rounded to the dtype of x.

    Args:
        x_TK: bf16 or fp16, contiguous.
        weight_NK: float8_e4m3fn, contiguous; K a multiple of 16.
        scale: float32 [N / shared, ceil(K / 128)]: a scale for each `shared` rows and 128 columns.
    """
    (T, K), N = x_TK.shape, len(weight_NK)
    y_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    if T:
        rows = min(64, max(16, triton.next_power_of_2(T)))
        cols = 32 if N > 4096 else 16  # as many programs as there are multiprocessors, or more
        constants = N, K, shared, cols, rows
        grid = triton.cdiv(N, cols), triton.cdiv(T, rows), 1
        run_kept(_few_rows, grid, (x_TK, weight_NK, scale, y_TN), (T,), constants, warps=4, stages=4)
    return y_TN
