"""Add to the residual stream and norm it, in one launch: a tensor, or the sum over a token's experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import row_block, run_kept
from tma_moe import Uncombined
from tma_moe.combine import weighted_sum
from tma_moe.pdl import take_turn


@triton.jit
def _add_norm(
    x_ptr,  # [T, H], becomes x + y
    y_ptr,  # [T, H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    out_ptr,  # [T, H]
    eps,
    H: tl.constexpr,
    HAS_Y: tl.constexpr,
    CENTRE: tl.constexpr,  # LayerNorm, with a bias; else RMSNorm
    BLOCK: tl.constexpr,  # H, rounded up to a power of two
    PDL: tl.constexpr,
):
    """One program per row."""
    take_turn(PDL)
    # The last rows first: they were written last, and are more likely to be in L2 still.
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    inside = i < H
    x = tl.load(x_ptr + at + i, mask=inside, other=0.0)
    if HAS_Y:
        # Rounded as the residual stream is stored, so that the norm sees what later layers will add to.
        total = x.to(tl.float32) + tl.load(y_ptr + at + i, mask=inside, other=0.0).to(tl.float32)
        x = total.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at + i, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if CENTRE:
        x = tl.where(inside, x - tl.sum(x) / H, 0.0)
    out = x * tl.rsqrt(tl.sum(x * x) / H + eps) * weight
    if CENTRE:
        out += tl.load(bias_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + i, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(x_TH: Tensor, y_TH: Tensor | None, weight_H: Tensor, eps: float, bias_H: Tensor | None = None) -> Tensor:
    """The norm of x + y, in one launch: RMSNorm, or LayerNorm where there is a bias.

    x [T, H] becomes x + y in place; y None means 0. The result is new memory.
    """
    out_TH = torch.empty_like(x_TH)
    if len(x_TH):
        width = x_TH.shape[1]
        block, warps = row_block(width)
        y, bias = x_TH if y_TH is None else y_TH, weight_H if bias_H is None else bias_H
        constants = width, y_TH is not None, bias_H is not None, block
        run_kept(_add_norm, (len(x_TH), 1, 1), (x_TH, y, weight_H, bias, out_TH), (eps,), constants, warps)
    return out_TH


@triton.jit
def _combine_add_norm(
    x_ptr,  # [T, H], becomes x + the sum
    rows_ptr,  # [T, TOPK, H], what each expert made of the token
    ids_ptr,  # [T, TOPK]: E and above are no expert, and add nothing
    weights_ptr,  # [T, TOPK] fp32
    norm_ptr,  # [H]
    out_ptr,  # [T, H]
    eps,
    H: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,  # TOPK and H, rounded up to powers of two
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,  # "evict_first" if the rows are in L2 and nobody reads them again
    PDL: tl.constexpr,
):
    """One program per token."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < H
    x = tl.load(x_ptr + t * H + i, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
    x += weighted_sum(rows_ptr, ids_ptr, weights_ptr, t, i, H, E, TOPK, BLOCK_TOPK, EVICT)
    stored = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + t * H + i, stored, mask=inside)
    x = stored.to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x) / H + eps) * norm
    tl.store(out_ptr + t * H + i, out.to(out_ptr.dtype.element_ty), mask=inside)


def combine_add_norm(x_TH: Tensor, y: Uncombined, weight_H: Tensor, eps: float) -> Tensor:
    """As :func:`add_norm`, where y is the weighted sum over each token's experts, which is still to be taken."""
    out_TH = torch.empty_like(x_TH)
    (T, H), K = x_TH.shape, y.ids_TK.shape[1]
    if T:
        block, warps = row_block(H)
        sizes = H, y.num_experts, K, triton.next_power_of_2(K), block, "evict_first" if y.kept else ""
        operands = x_TH, y.rows_TKH, y.ids_TK, y.weights_TK, weight_H, out_TH
        run_kept(_combine_add_norm, (T, 1, 1), operands, (eps,), sizes, warps)
    return out_TH
