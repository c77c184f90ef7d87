"""The weighted sum over a token's experts, in float32 and in a fixed order."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.support import has_pdl


@triton.jit
def weighted_sum(
    rows_ptr,  # [T * K, H]: the down products, by slot
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    t,  # int64 scalar
    cols,  # [BLOCK_H]
    H: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Columns of token t's sum, in float32."""
    k = tl.arange(0, BLOCK_TOPK)
    ids = tl.load(ids_ptr + t * TOPK + k, mask=k < TOPK, other=-1)
    # A pair whose id is no expert has no product: its row of the buffer was never written.
    real = (ids >= 0) & (ids < E)
    weights = tl.load(weights_ptr + t * TOPK + k, mask=real, other=0.0).to(tl.float32)
    at = (t * TOPK + k)[:, None] * H + cols[None, :]
    inside = real[:, None] & (cols < H)[None, :]
    rows = tl.load(rows_ptr + at, mask=inside, other=0.0, eviction_policy=EVICT)
    return tl.sum(weights[:, None] * rows.to(tl.float32), axis=0)


@triton.jit
def combine(
    rows_ptr,  # as in weighted_sum
    ids_ptr,
    weights_ptr,
    y_ptr,  # [T, H]
    H: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_H columns of one token's sum."""
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    take_turn(PDL)
    y = weighted_sum(rows_ptr, ids_ptr, weights_ptr, t, cols, H, E, TOPK, BLOCK_TOPK, EVICT)
    tl.store(y_ptr + t * H + cols, y.to(y_ptr.dtype.element_ty), mask=cols < H)


def combine_rows(
    stream: int, rows: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, kept: bool, y_TH: Tensor
) -> None:
    """Writes the sums to y, with its device current.

    Args:
        stream: handle of the stream.
        rows: [T * K, H], the down products by slot; for the rest, see `Uncombined`.
    """
    (T, K), H, device = ids_TK.shape, y_TH.shape[1], y_TH.device
    launch, columns = _launch(device, (y_TH.dtype, ids_TK.dtype, weights_TK.dtype), H, num_experts, K, kept)
    launch(stream, (T, columns, 1), rows, ids_TK, weights_TK, y_TH)


@functools.cache
def _launch(
    device: torch.device, dtypes: tuple[torch.dtype, ...], H: int, E: int, K: int, kept: bool
) -> tuple[Launch, int]:
    """The launch of `combine`, and how many programs share a token."""
    # Dtypes are only part of the key: a compiled kernel belongs to them, and to the device.
    pdl = has_pdl(device)
    # 256 columns per warp: each thread loads 16 bytes of each row, and no thread shares a column with another.
    block_topk = triton.next_power_of_2(K)
    cols = min(triton.next_power_of_2(H), max(256, 8192 // block_topk))
    constants = (H, E, K, block_topk, cols, "evict_first" if kept else "", pdl)
    return Launch(combine, constants, warps=max(1, min(8, cols // 256)), pdl=pdl), triton.cdiv(H, cols)
