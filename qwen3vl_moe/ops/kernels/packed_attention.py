"""Attention of packed sequences (flash attention, arXiv 2307.08691), for prefill and the vision tower.

One program takes a tile of queries of one sequence and head, and walks over that sequence's keys with a running
softmax. Keys are packed like the queries, or lie in the blocks of the cache. Boundaries and block tables are read on
the device and the grid depends on the number of tokens and of sequences only, so a launch can be captured in a CUDA
graph for a bucket of shapes.

A head is cut into two parts whose widths are powers of two: 128 = 128, and the vision tower's 72 = 64 + 8 (padded to
16), so that its products are not padded to 128.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import cache_operands, cached, run_kept, softmax_scale
from tma_moe.support import multiplies_from_shared_memory

_SEQUENCES = 128  # whose lengths a program looks at together, to find the one that its tile lies in
# Queries, keys, warps, stages. On Hopper the first measured best, for the decoder and the tower. Where products take
# their operands from registers (mma.sync), blocks of 64 keys do not fit beside the sums.
TILE, TILE_IN_REGISTERS = (64, 64, 4, 3), (64, 32, 4, 2)


@triton.jit
def _visit(
    q1, q2, k_at, v_at, k_scales, v_scales, table_at, token, row_max, row_sum, acc1, acc2, limit, kv_len, scale,
    stride_k, stride_v, G: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one block of keys into the running softmax of a tile of queries.

    q1 [QUERIES, WIDTH1] and q2 [QUERIES, WIDTH2] are the two parts of a head, as are acc1 and acc2 of the output;
    row_max, row_sum and limit are [QUERIES], token [KEYS].
    """
    d1 = tl.arange(0, WIDTH1)
    inside = (token < kv_len)[:, None]
    row = token
    if BLOCK_SIZE > 0:
        block = tl.load(table_at + token // BLOCK_SIZE, mask=token < kv_len, other=0).to(tl.int64)
        row = block * BLOCK_SIZE + token % BLOCK_SIZE
    rows_k, rows_v = k_at + row[:, None] * stride_k, v_at + row[:, None] * stride_v
    if FP8:
        # Behind a block's values lie its scales.
        rows_k += (block * (BLOCK_SIZE * G * 4))[:, None]
        rows_v += (block * (BLOCK_SIZE * G * 4))[:, None]
        scale_at = block * (BLOCK_SIZE * G * (D + 4) // 4) + BLOCK_SIZE * G * D // 4 + token % BLOCK_SIZE * G
    k1 = tl.load(rows_k + d1[None, :], mask=inside, other=0.0) if MASKED else tl.load(rows_k + d1[None, :])
    scores = tl.dot(q1, cached(k1, q1.dtype).T)
    if WIDTH2 > 0:
        d2 = WIDTH1 + tl.arange(0, WIDTH2)
        part = (d2 < D)[None, :] & inside if MASKED else (d2 < D)[None, :]
        k2 = tl.load(rows_k + d2[None, :], mask=part, other=0.0)
        scores = tl.dot(q2, cached(k2, q1.dtype).T, scores)
    if FP8:
        scores *= tl.load(k_scales + scale_at, mask=token < kv_len, other=0.0)[None, :]
    if MASKED:
        scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, axis=1)
    v1 = tl.load(rows_v + d1[None, :], mask=inside, other=0.0) if MASKED else tl.load(rows_v + d1[None, :])
    if FP8:
        p *= tl.load(v_scales + scale_at, mask=token < kv_len, other=0.0)[None, :]
    p = p.to(q1.dtype)
    acc1 = tl.dot(p, cached(v1, q1.dtype), acc1 * rescale[:, None])
    if WIDTH2 > 0:
        v2 = tl.load(rows_v + d2[None, :], mask=part, other=0.0)
        acc2 = tl.dot(p, cached(v2, q1.dtype), acc2 * rescale[:, None])
    return new_max, row_sum, acc1, acc2


# What changes from step to step is not specialised on: compiling takes a second. Strides are eighths, so that loads are
# known to begin at 16 bytes: without that, ptxas 12.8 (triton 3.6) miscompiles the second part's products, whose
# descriptors it adds up from a register that nothing has written.
@triton.jit(do_not_specialize=["S", "table_width", "stride_q", "stride_k", "stride_v"])
def _attend_packed(
    q_ptr,  # [T, N, D], rows 8 * stride_q apart
    k_ptr,  # [U, G, D], rows 8 * stride_k apart
    v_ptr,  # as k
    k_scales_ptr,  # of an FP8 cache
    v_scales_ptr,
    out_ptr,  # [T, N, D], contiguous
    q_starts_ptr,  # int32 [S + 1]
    kv_starts_ptr,  # int32 [S + 1]
    tables_ptr,  # [S, B] where keys are in the cache
    stride_q,
    stride_k,
    stride_v,
    table_width,
    S,
    scale,  # 1 / sqrt(D) * log2(e)
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # of the cache; 0: keys are packed
    SKIP_SINGLE: tl.constexpr,  # leave sequences with one new token alone
    CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,  # of a tile
    KEYS: tl.constexpr,  # of a block
    SEQUENCES: tl.constexpr,  # that are looked at together
    FP8: tl.constexpr,  # the cache
):
    """One program per head and tile of queries."""
    stride_q, stride_k, stride_v = stride_q * 8, stride_k * 8, stride_v * 8
    # Which tile of which sequence: the grid has one program for each, and a few more than there turn out to be.
    n, place = tl.program_id(0), tl.program_id(1)
    s, tiles_before, end = 0, 0, 0x7FFFFFFF
    for at in range(0, S, SEQUENCES):
        each = at + tl.arange(0, SEQUENCES)
        starts = tl.load(q_starts_ptr + each, mask=each < S, other=0)
        lens = tl.load(q_starts_ptr + 1 + each, mask=each < S, other=0) - starts
        tiles = (lens + QUERIES - 1) // QUERIES
        if SKIP_SINGLE:
            tiles = tl.where(lens == 1, 0, tiles)
        ends = tiles_before + tl.cumsum(tiles, axis=0)
        s += tl.sum((ends <= place).to(tl.int32))
        end = tl.minimum(end, tl.min(tl.where(ends > place, ends, 0x7FFFFFFF)))
        tiles_before += tl.sum(tiles)
    if s >= S:
        return
    # The last tile of a causal sequence has the most keys: it starts first.
    tile = end - 1 - place
    q_start, kv_start = tl.load(q_starts_ptr + s).to(tl.int64), tl.load(kv_starts_ptr + s).to(tl.int64)
    q_len = (tl.load(q_starts_ptr + s + 1) - q_start).to(tl.int32)
    kv_len = (tl.load(kv_starts_ptr + s + 1) - kv_start).to(tl.int32)
    first = tile * QUERIES
    past = kv_len - q_len
    query = first + tl.arange(0, QUERIES)
    inside = (query < q_len)[:, None]
    d1 = tl.arange(0, WIDTH1)
    q_at = q_ptr + (q_start + query)[:, None] * stride_q + n * D
    q1 = tl.load(q_at + d1[None, :], mask=inside, other=0.0)
    q2, acc2 = q1, tl.zeros([QUERIES, 16], tl.float32)
    if WIDTH2 > 0:
        d2 = WIDTH1 + tl.arange(0, WIDTH2)
        q2 = tl.load(q_at + d2[None, :], mask=inside & (d2 < D)[None, :], other=0.0)
        acc2 = tl.zeros([QUERIES, WIDTH2], tl.float32)
    g = n // (N // G)
    k_at, v_at = k_ptr + g * D, v_ptr + g * D
    k_scales, v_scales = k_scales_ptr + g, v_scales_ptr + g
    table_at = tables_ptr + s.to(tl.int64) * table_width
    if BLOCK_SIZE == 0:
        k_at, v_at = k_at + kv_start * stride_k, v_at + kv_start * stride_v

    row_max = tl.full([QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([QUERIES], tl.float32)
    acc1 = tl.zeros([QUERIES, WIDTH1], tl.float32)
    # Keys that every query of the tile sees need no mask; those at the diagonal or the end do.
    limit = past + query + 1 if CAUSAL else tl.zeros_like(query) + kv_len
    stop = tl.minimum(kv_len, past + first + QUERIES) if CAUSAL else kv_len
    whole = (past + first + 1 if CAUSAL else kv_len) // KEYS * KEYS
    for at in range(0, whole, KEYS):
        row_max, row_sum, acc1, acc2 = _visit(
            q1, q2, k_at, v_at, k_scales, v_scales, table_at, at + tl.arange(0, KEYS), row_max, row_sum, acc1, acc2,
            limit, kv_len, scale, stride_k, stride_v, G, WIDTH1, WIDTH2, D, BLOCK_SIZE, FP8, False,
        )  # fmt: skip
    for at in range(whole, stop, KEYS):
        row_max, row_sum, acc1, acc2 = _visit(
            q1, q2, k_at, v_at, k_scales, v_scales, table_at, at + tl.arange(0, KEYS), row_max, row_sum, acc1, acc2,
            limit, kv_len, scale, stride_k, stride_v, G, WIDTH1, WIDTH2, D, BLOCK_SIZE, FP8, True,
        )  # fmt: skip
    out_at = out_ptr + ((q_start + query) * N + n)[:, None] * D
    tl.store(out_at + d1[None, :], (acc1 / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    if WIDTH2 > 0:
        tl.store(
            out_at + d2[None, :],
            (acc2 / row_sum[:, None]).to(out_ptr.dtype.element_ty),
            mask=inside & (d2 < D)[None, :],
        )


def head_parts(D: int) -> tuple[int, int]:
    """Two powers of two that cover a head: 128 -> (128, 0), 72 -> (64, 16), 24 -> (16, 16).

    The first is whole, so that its loads need no mask; a matrix product takes at least 16 channels.
    """
    if D < 16 or D % 8:
        raise ValueError(f"packed attention needs heads of a multiple of 8 channels, at least 16, got {D}")
    first = 1 << (D.bit_length() - 1)
    return first, 0 if first == D else max(16, triton.next_power_of_2(D - first))


@functools.cache
def _tile(device: torch.device) -> tuple[int, int, int, int]:
    return TILE if multiplies_from_shared_memory(device) else TILE_IN_REGISTERS


def packed_attention(
    q_TND: Tensor,
    k_UGD: Tensor,
    v_UGD: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    *,
    causal: bool,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Softmax attention within each sequence, scaled by 1/sqrt(D).

    Args:
        q_TND, k_UGD, v_UGD: bf16 or fp16 (fp32 in the interpreter); heads contiguous, rows at any stride.
        q_starts, kv_starts: int32 [S + 1] cumulative lengths; the last query of a sequence sees all of its keys.
        tile: (queries, keys, warps, stages) of a program; None: what suits the device.

    Returns:
        [T, N, D], contiguous. A sequence may be empty; one with queries has at least as many keys if causal.
    """
    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    keys = k_UGD, v_UGD, k_UGD, v_UGD
    strides = k_UGD.stride(0), v_UGD.stride(0)
    _launch(q_TND, keys, strides, k_UGD.shape[1], out_TND, q_starts, kv_starts, q_starts, 0, causal, False, tile)
    return out_TND


def paged_attention(
    q_TND: Tensor,
    layer_cache: Tensor,
    out_TND: Tensor,
    q_starts: Tensor,
    kv_starts: Tensor,
    block_tables: Tensor,
    *,
    tile: tuple[int, int, int, int] | None = None,
) -> None:
    """Causal attention of new tokens over their sequences' cache, themselves included, written into ``out_TND``.

    Sequences with one new token are left to :func:`qwen3vl_moe.ops.kernels.paged_decode.paged_decode`.

    Args:
        layer_cache: [2, blocks, block_size, G, D], or FP8, contiguous, with the new tokens' keys and values in it.
        block_tables: int32 [S, B], contiguous. The rest is as in :func:`packed_attention`.
    """
    *cache, fp8_block = cache_operands(layer_cache)
    (_, _, block_size, G, _), D = layer_cache.shape, q_TND.shape[2]
    operands = out_TND, q_starts, kv_starts, block_tables
    _launch(q_TND, cache, (G * D, G * D), G, *operands, block_size, True, fp8_block > 0, tile)


def _launch(q_TND, keys, strides, G, out_TND, q_starts, kv_starts, tables, block_size, causal, fp8, tile) -> None:
    (_, N, D), S = q_TND.shape, len(q_starts) - 1
    queries, block, warps, stages = tile or _tile(q_TND.device)
    run_kept(
        _attend_packed,
        (N, triton.cdiv(len(q_TND), queries) + S, 1),
        (q_TND, *keys, out_TND, q_starts, kv_starts, tables),
        (q_TND.stride(0) // 8, strides[0] // 8, strides[1] // 8, tables.stride(0), S, softmax_scale(D)),
        (N, G, D, *head_parts(D), block_size, block_size > 0, causal, queries, block, _SEQUENCES, fp8),
        warps,
        early=False,
        stages=stages,
    )
