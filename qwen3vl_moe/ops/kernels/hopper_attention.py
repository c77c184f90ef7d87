"""Attention of many queries on Hopper: flash attention with one job per group of warps, in Gluon.

After FlashAttention-3 (Shah et al., arXiv 2407.08608): the split into a producer and two consumers (section 3.1), and
the softmax of one block of keys under the products of the next (section 3.2). Written for this model: sequences packed
one after the other, grouped queries, head widths 128 (decoder) and 72 (vision tower). Keys and values are packed like
the queries, or lie in the blocks of the cache (hopper_attention_copies.py).

**One program** has a multiprocessor to itself and takes one tile after the other until none is left ("persistent"), so
that the copies for the next tile run under the end of this one. A tile is 128 queries of one head of one sequence::

    warps 0-3    consumer 0   queries   0..63 of the tile   240 registers per thread
    warps 4-7    consumer 1   queries 64..127               240
    warp  8      producer     issues TMA copies              24

Registers are dealt to groups of four warps, so the producer comes with three idle ones: 128 * (240 + 240 + 24) = 64,512
of the multiprocessor's 65,536. A consumer's thread holds 64 registers of output (its part of [64, 128] in fp32), 64 of
scores, and twice 32 of p (the softmax's numerators, in bf16): this block's and those of the block before.

**Shared memory**, for heads of 128 (of 72: two parts of 64 and 16 channels, 3 stages)::

    q   1 x [128, 128]   32 KB      the tile's queries, both consumers'
    k   2 x [128, 128]   64 KB      a ring: blocks of 128 keys
    v   2 x [128, 128]   64 KB      a ring: their values

**Barriers.** Each buffer has two: *full* (TMA has written it) and *empty* (both consumers have read it; it counts two
arrivals, one each)::

    producer                                       each consumer
    wait q_empty;  copy q   ---- q_full --------->  wait
    per block of keys:
    wait k_empty[s]; copy k ---- k_full[s] ------>  wait; start scores = q k^T
    wait v_empty[s]; copy v ---- v_full[s] ------>  wait; start out += p v   (of the block BEFORE)
                        <------- k_empty[s] ------  scores are there: k is free
                                                    softmax of the scores, while the tensor cores still add values
                        <------- v_empty[s] ------  out is there: v of the block before is free
                        <------- q_empty ---------  after the last scores

The u-th use of a buffer waits for phase u & 1 of *full*; before filling it, the producer waits for phase (u & 1) ^ 1 of
*empty*, which a fresh barrier passes at once.

Gluon is part of triton, has no interpreter, and is still called experimental; ``ops/dispatch.py`` decides whether this
file is used at all.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qwen3vl_moe.ops.kernels.hopper_attention_copies import (
    PAGE,
    load_pages,
    load_rows,
    page_ring,
    page_rows,
    rings,
)
from qwen3vl_moe.ops.kernels.hopper_attention_tile import (
    KEYS,
    QUERIES,
    add_values,
    clear_rows,
    scaled,
    scores_of,
    softmax,
    stage_of,
    store,
    wait_for_values,
)
from qwen3vl_moe.ops.kernels.hopper_attention_walk import find_tile, first_with_tiles, span_of
from qwen3vl_moe.ops.kernels.launch import softmax_scale
from tma_moe.gluon_parts import make_barriers
from tma_moe.launcher import Launch, current_stream, device_guard


@gluon.jit
def _produce(q, k, v, buffers, barriers, q_starts_ptr, kv_starts_ptr, tables_ptr, table_width, S, sizes: gl.constexpr):
    """The producer's warp: copies for each tile the queries, then block after block keys and values."""
    N: gl.constexpr = sizes[0]
    G: gl.constexpr = sizes[1]
    PARTS: gl.constexpr = sizes[2]
    WIDTH: gl.constexpr = sizes[3]
    BLOCK_SIZE: gl.constexpr = sizes[6]
    FEWEST: gl.constexpr = 2 if BLOCK_SIZE > 0 else 1
    q_buffers, k_rings, v_rings = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_full.shape[0]
    step = 0  # blocks of keys so far, over all tiles: the stage is step % STAGES, its use number step // STAGES
    count = 0  # tiles so far
    # Heads are the inner index: those that share a key/value head run at the same time, and find its keys in L2.
    tile = gl.program_id(0)
    s, base, tiles = find_tile(
        q_starts_ptr, S, tile // N, first_with_tiles(q_starts_ptr, S, FEWEST, 1), gl.to_tensor(0), FEWEST
    )
    while s < S:
        n = tile % N
        q_start, _, kv_start, kv_len, first, blocks = span_of(
            q_starts_ptr, kv_starts_ptr, s, base, tiles, tile // N, sizes[4]
        )
        mbarrier.wait(q_empty.index(0), (count & 1) ^ 1)
        load_rows(q, q_start + first, n, q_full.index(0), stage_of(q_buffers, 0, PARTS), PARTS, WIDTH)
        for block in range(blocks):
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            if BLOCK_SIZE > 0:
                table_at = tables_ptr + s * table_width
                rows = page_rows(table_at, block * KEYS, kv_len, BLOCK_SIZE)
                mbarrier.wait(k_empty.index(stage), phase)
                load_pages(k[0], rows, n // (N // G), k_full.index(stage), k_rings[0], stage)
                mbarrier.wait(v_empty.index(stage), phase)
                load_pages(v[0], rows, n // (N // G), v_full.index(stage), v_rings[0], stage)
            else:
                row = kv_start + block * KEYS
                mbarrier.wait(k_empty.index(stage), phase)
                load_rows(k, row, n // (N // G), k_full.index(stage), stage_of(k_rings, stage, PARTS), PARTS, WIDTH)
                mbarrier.wait(v_empty.index(stage), phase)
                load_rows(v, row, n // (N // G), v_full.index(stage), stage_of(v_rings, stage, PARTS), PARTS, WIDTH)
            step += 1
        count += 1
        tile += gl.num_programs(0)
        s, base, tiles = find_tile(q_starts_ptr, S, tile // N, s, base, FEWEST)


@gluon.jit
def _consume(
    half: gl.constexpr, out_ptr, buffers, barriers, q_starts_ptr, kv_starts_ptr, S, scale, sizes: gl.constexpr
):
    """A consumer's four warps: attend for queries 64 * half .. 64 * half + 63 of each tile."""
    N: gl.constexpr = sizes[0]
    PARTS: gl.constexpr = sizes[2]
    CAUSAL: gl.constexpr = sizes[4]
    D: gl.constexpr = sizes[5]
    FEWEST: gl.constexpr = 2 if sizes[6] > 0 else 1
    q_buffers, k_rings, v_rings = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_full.shape[0]
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    width_1: gl.constexpr = v_rings[0].shape[3]
    width_2: gl.constexpr = v_rings[PARTS - 1].shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    layout_1: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width_1, 16]
    )
    layout_2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width_2, 16]
    )
    # The same walk as the producer's, so both count steps alike without communicating.
    step = 0
    count = 0
    tile = gl.program_id(0)
    s, base, tiles = find_tile(
        q_starts_ptr, S, tile // N, first_with_tiles(q_starts_ptr, S, FEWEST, 4), gl.to_tensor(0), FEWEST
    )
    while s < S:
        n = tile % N
        q_start, q_stop, _, kv_len, first, blocks = span_of(
            q_starts_ptr, kv_starts_ptr, s, base, tiles, tile // N, CAUSAL
        )
        query = first + half * 64  # this consumer's first, within the sequence
        rows = query + gl.arange(0, 64, gl.SliceLayout(1, layout))
        limit = gl.zeros_like(rows) + kv_len
        seen = kv_len
        if CAUSAL:
            past = kv_len - (q_stop - q_start)
            limit = gl.minimum(past + rows + 1, kv_len)
            seen = gl.minimum(past + query + 1, kv_len)
        row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
        if PARTS == 1:
            out = (gl.zeros([64, width_1], gl.float32, layout_1),)
        else:
            out = (gl.zeros([64, width_1], gl.float32, layout_1), gl.zeros([64, width_2], gl.float32, layout_2))

        # The first block has no block before it whose values could be added meanwhile.
        mbarrier.wait(q_full.index(0), count & 1)
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        scores = scores_of(q_buffers, k_rings, stage, half, PARTS)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, row_max, row_sum, _ = softmax(scores, 0, limit, seen, row_max, row_sum, scale, dtype)
        for block in range(1, blocks):
            before = step % STAGES
            before_phase = (step // STAGES) & 1
            step += 1
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            scores = scores_of(q_buffers, k_rings, stage, half, PARTS)
            mbarrier.wait(v_full.index(before), before_phase)
            out = add_values(p, v_rings, before, out, PARTS)
            # Products end in the order they were started: with PARTS of them left over, the scores are there.
            scores = warpgroup_mma_wait(PARTS, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            next_p, row_max, row_sum, rescale = softmax(scores, block, limit, seen, row_max, row_sum, scale, dtype)
            out, p = wait_for_values(out, p, PARTS)
            mbarrier.arrive(v_empty.index(before), count=1)
            out = scaled(out, rescale, PARTS)
            p = next_p
        # No more scores: the producer may fetch the next tile's queries while the last values are added.
        mbarrier.arrive(q_empty.index(0), count=1)
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        if blocks * KEYS > kv_len:  # only the last block can run past the end
            for part in gl.static_range(PARTS):
                clear_rows(v_rings[part].index(stage), kv_len - (blocks - 1) * KEYS)
            fence_async_shared()  # tensor cores read through the async proxy: make the ordinary stores visible to it
        out = add_values(p, v_rings, stage, out, PARTS)
        out, p = wait_for_values(out, p, PARTS)
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
        # A query past the sequence's end has a row_sum, too, and is not stored.
        out = scaled(out, 1.0 / row_sum, PARTS)
        store(out[0], out_ptr, q_start + query, q_stop, n, 0, N, D)
        if PARTS == 2:
            store(out[1], out_ptr, q_start + query, q_stop, n, width_1, N, D)
        count += 1
        tile += gl.num_programs(0)
        s, base, tiles = find_tile(q_starts_ptr, S, tile // N, s, base, FEWEST)


@gluon.jit(do_not_specialize=["S", "table_width"])
def hopper_attend(
    q1,  # descriptor of [T, N, D] in blocks [QUERIES, 1, width of the first part]
    q2,  # the same in blocks of the second part's width, or None
    k1,  # descriptors of [U, G, D] in blocks [KEYS, 1, width]; of the cache's rows in blocks [PAGE, 1, 64]
    k2,
    v1,  # as k
    v2,
    out_ptr,  # [T, N, D], contiguous
    q_starts_ptr,  # int32 [S + 1]
    kv_starts_ptr,  # int32 [S + 1]
    tables_ptr,  # int32 [S, B] where keys are in the cache
    table_width,
    S,
    scale,  # 1 / sqrt(D) * log2(e)
    N: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    PARTS: gl.constexpr,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,  # of the cache; 0: keys are packed
):
    """out[t, n] = softmax over the keys of t's sequence that it may see. With one part, q2, k2 and v2 are None.

    Over the cache, sequences with one query are left alone.
    """
    if BLOCK_SIZE > 0:
        buffers = rings((q1, q2), 1, 1), page_ring(k1, STAGES), page_ring(v1, STAGES)
    else:
        buffers = rings((q1, q2), 1, PARTS), rings((k1, k2), STAGES, PARTS), rings((v1, v2), STAGES, PARTS)
    q_full, q_empty = make_barriers(1, 1)
    k_full, k_empty = make_barriers(STAGES, 1)
    v_full, v_empty = make_barriers(STAGES, 1)
    barriers = q_full, q_empty, k_full, k_empty, v_full, v_empty
    sizes: gl.constexpr = (N, G, PARTS, q1.block_type.shape[2], CAUSAL, D, BLOCK_SIZE)
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), out_ptr, buffers, barriers, q_starts_ptr, kv_starts_ptr, S, scale, sizes)),
            (_consume, (gl.constexpr(1), out_ptr, buffers, barriers, q_starts_ptr, kv_starts_ptr, S, scale, sizes)),
            (
                _produce,
                (
                    (q1, q2),
                    (k1, k2),
                    (v1, v2),
                    buffers,
                    barriers,
                    q_starts_ptr,
                    kv_starts_ptr,
                    tables_ptr,
                    table_width,
                    S,
                    sizes,
                ),
            ),
        ],
        [4, 1],  # warps of all but the first, which has the launch's four
        [232, 40] if BLOCK_SIZE > 0 else [240, 24],  # registers per thread, of the same; pages take more to look up
    )


ROWS = KEYS.value  # of a TMA block, of queries and of keys
assert QUERIES.value == ROWS


def _descriptors(x_TND: Tensor, widths: tuple[int, ...], rows: int = ROWS) -> list[TensorDescriptor | None]:
    """One descriptor for each of two parts of a head, of which the second may not be needed."""
    shape, strides, bits = list(x_TND.shape), list(x_TND.stride()), 8 * x_TND.element_size()
    found: list[TensorDescriptor | None] = [None, None]
    for part, width in enumerate(widths):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=bits, rank=3)
        found[part] = TensorDescriptor(x_TND, shape, strides, [rows, 1, width], layout=layout)
    return found


def takes_width(D: int) -> bool:
    """Whether heads of D channels are one of the two kinds that it is made for."""
    return D == 128 or 64 < D <= 80


def takes(q_TND: Tensor, k_UGD: Tensor, v_UGD: Tensor) -> bool:
    """Whether :func:`hopper_attention` takes these: head widths that it is made for, rows that TMA can address."""
    D = q_TND.shape[2]
    return takes_width(D) and all(
        x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or D % 8 or x.data_ptr() % 16)
        for x in (q_TND, k_UGD, v_UGD)
    )


def takes_cache(layer_cache: Tensor) -> bool:
    """Whether :func:`hopper_paged_attention` takes this cache: 16 bits, 128 channels a head, blocks of whole pages."""
    return layer_cache.dtype.itemsize == 2 and layer_cache.shape[-1] == 128 and layer_cache.shape[2] % PAGE.value == 0


@functools.cache
def _launch(device: torch.device, dtype: torch.dtype, N: int, G: int, D: int, causal: bool, block_size: int) -> tuple:
    """The widths of a head's parts, the launch, and how many programs run at once: one per multiprocessor."""
    # Device and dtype are only part of the key: a compiled kernel belongs to both.
    widths, stages = ((128,), 2) if D > 80 else ((64, 16), 3)
    launch = Launch(hopper_attend, (N, G, D, len(widths), causal, stages, block_size), warps=4, pdl=False)
    on_gpu = device.type == "cuda"  # elsewhere it is compiled only
    return widths, launch, torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1


def hopper_attention(
    q_TND: Tensor, k_UGD: Tensor, v_UGD: Tensor, q_starts: Tensor, kv_starts: Tensor, *, causal: bool
) -> Tensor:
    """Softmax attention within each sequence, scaled by 1/sqrt(D), on a GPU of compute capability 9.0.

    Args:
        q_TND, k_UGD, v_UGD: bf16 or fp16, as :func:`takes` says; G divides N.
        q_starts, kv_starts: int32 [S + 1] cumulative lengths; the last query of a sequence sees all of its keys if
            causal, the one before it one fewer, and so on.

    Returns:
        [T, N, D], contiguous. A sequence may be empty; one with queries has at least as many keys if causal.
    """
    (_, N, D), G = q_TND.shape, k_UGD.shape[1]
    out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
    made = _launch(q_TND.device, q_TND.dtype, N, G, D, causal, 0)
    descriptors = [d for x in (k_UGD, v_UGD) for d in _descriptors(x, made[0])]
    _run(made, q_TND, descriptors, out_TND, q_starts, kv_starts, q_starts)
    return out_TND


def hopper_paged_attention(
    q_TND: Tensor, layer_cache: Tensor, out_TND: Tensor, q_starts: Tensor, kv_starts: Tensor, block_tables: Tensor
) -> None:
    """Causal attention of new tokens over their sequences' cache, as :func:`.packed_attention.paged_attention`.

    Args:
        q_TND, out_TND: contiguous, D 128.
        layer_cache: as :func:`takes_cache` says.
    """
    (_, N, D), (_, _, block_size, G, _) = q_TND.shape, layer_cache.shape
    made = _launch(q_TND.device, q_TND.dtype, N, G, D, True, block_size)
    # A block of the cache is copied page by page, and a page in the two halves that a swizzled buffer is made of.
    descriptors = [d for rows in layer_cache.flatten(1, 2) for d in _descriptors(rows, (64,), PAGE.value)]
    _run(made, q_TND, descriptors, out_TND, q_starts, kv_starts, block_tables)


def _run(made: tuple, q_TND: Tensor, descriptors: list, out_TND: Tensor, q_starts, kv_starts, tables: Tensor) -> None:
    (T, N, D), S = q_TND.shape, len(q_starts) - 1
    if not T:
        return
    widths, launch, multiprocessors = made
    programs = min((-(-T // QUERIES.value) + S) * N, multiprocessors)
    operands = *_descriptors(q_TND, widths), *descriptors, out_TND, q_starts, kv_starts, tables
    with device_guard(q_TND.device):
        stream = current_stream(q_TND.device)
        launch(stream, (programs, 1, 1), *operands, tables.stride(0), S, softmax_scale(D))
