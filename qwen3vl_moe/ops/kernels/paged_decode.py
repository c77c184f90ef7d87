"""Attention of sequences with one new token over their paged cache, split over the cache (flash-decoding).

One sequence's cache is too long for one multiprocessor and a small batch has too few sequences to fill the card, so
each (sequence, key/value head) is cut into spans of the cache; a second kernel joins their partial softmaxes. Where a
sequence is one span, which it is in a large batch, the first kernel writes its output and the second does nothing.
The query heads that share a key/value head are the rows of one matrix product, so the cache is read once. Lengths and
block tables are read on the device and the grid depends on the number of sequences only: the launches can be captured
in a CUDA graph and replayed while sequences grow.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import cache_operands, cached, run_kept, softmax_scale
from tma_moe.support import multiplies_from_shared_memory

_TOKENS = 64  # of a span per pass: 64 rows of 128 channels are 16 KB of keys and as much of values
_LEAST_SPANS, _MOST_SPANS = 8, 64  # of a sequence that is long enough
_TOGETHER = 16  # spans that are joined at a time: more take too many registers


@triton.jit
def _span_of(length, spans, least, TOKENS: tl.constexpr):
    """Tokens of a span, in whole passes, `least` or more: a short sequence fills only the first few of its spans."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, spans), TOKENS) * TOKENS, least)


# What differs from step to step is not specialised on, the number of spans included: compiling takes a second.
@triton.jit(do_not_specialize=["table_width", "least"])
def _attend_span(
    q_ptr,  # [T, N, D]
    q_starts_ptr,  # [S + 1]
    k_rows_ptr,  # [rows, G, D]; of an FP8 cache its values, with those of the blocks apart
    v_rows_ptr,
    k_scales_ptr,  # of an FP8 cache
    v_scales_ptr,
    tables_ptr,  # [S, B]
    kv_starts_ptr,  # [S + 1]
    partial_ptr,  # [S, N, spans, D] fp32
    lse_ptr,  # [S, N, spans] fp32, base 2
    out_ptr,  # [T, N, D]
    table_width,
    least,  # tokens of a span
    scale,  # 1 / sqrt(D) * log2(e)
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # N / G query heads, at least the 16 rows of a matrix product
    WIDTH: tl.constexpr,  # D, rounded up to a power of two
    TOKENS: tl.constexpr,
    FP8: tl.constexpr,
):
    """One program per sequence, key/value head and span of the cache; a span past the sequence's end writes nothing."""
    s, g, split, spans = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    SHARING: tl.constexpr = N // G
    t = tl.load(q_starts_ptr + s)
    if tl.load(q_starts_ptr + s + 1) - t != 1:
        return
    length = tl.load(kv_starts_ptr + s + 1) - tl.load(kv_starts_ptr + s)
    span = _span_of(length, spans, least, TOKENS)
    start = split * span
    stop = tl.minimum(start + span, length)
    if start >= stop:
        return

    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    q_at = q_ptr + (t.to(tl.int64) * N + g * SHARING + row[:, None]) * D + d[None, :]
    q = tl.load(q_at, mask=(row < SHARING)[:, None] & (d < D)[None, :], other=0.0)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(start, stop, TOKENS):
        token = at + tl.arange(0, TOKENS)
        seen = token < stop
        block = tl.load(tables_ptr + s * table_width + token // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        place = token % BLOCK_SIZE * G + g
        where = (block * (BLOCK_SIZE * G * D) + place * D)[:, None] + d[None, :]
        if FP8:
            where += (block * (BLOCK_SIZE * G * 4))[:, None]
            scale_at = block * (BLOCK_SIZE * G * (D + 4) // 4) + BLOCK_SIZE * G * D // 4 + place
        keep = seen[:, None] & (d < D)[None, :]
        k = cached(tl.load(k_rows_ptr + where, mask=keep, other=0.0), q.dtype)
        scores = tl.dot(q, k.T) * scale
        if FP8:
            scores *= tl.load(k_scales_ptr + scale_at, mask=seen, other=0.0)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        v = cached(tl.load(v_rows_ptr + where, mask=keep, other=0.0), q.dtype)
        if FP8:
            p *= tl.load(v_scales_ptr + scale_at, mask=seen, other=0.0)[None, :]
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v)
        row_max = new_max

    out = acc / row_sum[:, None]
    inside = (row < SHARING)[:, None] & (d < D)[None, :]
    if length <= span:
        head = t.to(tl.int64) * N + g * SHARING + row
        tl.store(out_ptr + head[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        head = (s * N + g * SHARING + row) * spans + split
        tl.store(partial_ptr + head[:, None] * D + d[None, :], out, mask=inside)
        tl.store(lse_ptr + head, row_max + tl.log2(row_sum), mask=row < SHARING)


@triton.jit(do_not_specialize=["spans", "least"])
def _join_spans(
    partial_ptr,  # [S, N, spans, D] fp32
    lse_ptr,  # [S, N, spans] fp32, base 2
    out_ptr,  # [T, N, D]
    q_starts_ptr,  # [S + 1]
    kv_starts_ptr,  # [S + 1]
    spans,
    least,  # tokens of a span
    N: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,  # spans that are read at a time
    TOKENS: tl.constexpr,
):
    """One program per sequence and head: the spans' outputs, each by its share of the whole softmax."""
    head = tl.program_id(0).to(tl.int64)
    s = head // N
    t = tl.load(q_starts_ptr + s)
    if tl.load(q_starts_ptr + s + 1) - t != 1:
        return
    length = tl.load(kv_starts_ptr + s + 1) - tl.load(kv_starts_ptr + s)
    span = _span_of(length, spans, least, TOKENS)
    if (length > 0) & (length <= span):
        return
    d = tl.arange(0, WIDTH)
    # A sequence without keys, which fills up a graph's shape, has no span and gets zeros.
    most, total, out = float("-inf"), 0.0, tl.zeros([WIDTH], tl.float32)
    for at in range(0, tl.cdiv(length, span), TOGETHER):
        split = at + tl.arange(0, TOGETHER)
        written = split * span < length
        lse = tl.load(lse_ptr + head * spans + split, mask=written, other=float("-inf"))
        where = partial_ptr + (head * spans + split[:, None]) * D + d[None, :]
        values = tl.load(where, mask=written[:, None] & (d < D)[None, :], other=0.0)
        new_most = tl.maximum(most, tl.max(lse))
        share, rescale = tl.exp2(lse - new_most), tl.exp2(most - new_most)
        out = out * rescale + tl.sum(values * share[:, None], axis=0)
        total = total * rescale + tl.sum(share)
        most = new_most
    out = out / tl.maximum(total, 1e-38)
    out_at = out_ptr + (t.to(tl.int64) * N + head % N) * D + d
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=d < D)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def paged_decode(
    q_TND: Tensor, layer_cache: Tensor, out_TND: Tensor, q_starts: Tensor, kv_starts: Tensor, block_tables: Tensor
) -> None:
    """Attention over their cache of the sequences that have one new token, written into their rows of ``out_TND``.

    Sequences with more new tokens, or none, are left alone.

    Args:
        q_TND: contiguous queries of all sequences; bf16 or fp16 (fp32 in the interpreter).
        layer_cache: [2, blocks, block_size, G, D], or FP8, contiguous, with the new token's key and value in it.
        out_TND: contiguous, like q.
        q_starts, kv_starts: int32 [S + 1] cumulative lengths of new and of all tokens; a sequence without keys gets
            zeros.
        block_tables: int32 [S, B], contiguous.
    """
    (_, N, D), S = q_TND.shape, len(q_starts) - 1
    _, _, block_size, G, _ = layer_cache.shape
    *cache, fp8_block = cache_operands(layer_cache)
    # Twice as many programs as multiprocessors. Where sequences alone are as many, spans are only for long ones, of
    # which a few among many short ones would otherwise keep the step waiting.
    enough = triton.next_power_of_2(triton.cdiv(2 * _processors(q_TND.device), S * G))
    spans = max(_LEAST_SPANS, min(enough, _MOST_SPANS))
    least = _TOKENS * (spans // min(enough, spans))
    partial = torch.empty(S, N, spans, D, dtype=torch.float32, device=q_TND.device)
    lse = torch.empty(S, N, spans, dtype=torch.float32, device=q_TND.device)
    rows, width = max(16, triton.next_power_of_2(N // G)), max(16, triton.next_power_of_2(D))
    run_kept(
        _attend_span,
        (S, G, spans),
        (q_TND, q_starts, *cache, block_tables, kv_starts, partial, lse, out_TND),
        (block_tables.shape[1], least, softmax_scale(D)),
        (block_size, N, G, D, rows, width, _TOKENS, fp8_block > 0),
        warps=4,
        early=False,
        stages=2,
    )
    operands, constants = (partial, lse, out_TND, q_starts, kv_starts), (N, D, width, _TOGETHER, _TOKENS)
    warps = 2 if multiplies_from_shared_memory(q_TND.device) else 4  # on other cards two warps lack registers
    run_kept(_join_spans, (S * N, 1, 1), operands, (spans, least), constants, warps, early=False)
