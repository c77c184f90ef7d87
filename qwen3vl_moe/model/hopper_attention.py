"""Attention of packed sequences on Hopper: flash attention with one job per warp group (arXiv 2407.08608), in Gluon.

A producer copies queries, keys and values by TMA; two consumers each attend for 64 queries of a tile of 128. While a
consumer takes the softmax of one block of keys, the tensor cores multiply the weights of the block before with its
values, and whatever the other consumer has for them. Programs are persistent, so that the next tile's copies run under
the end of this one. Gluon is part of triton, has no interpreter, and is still called experimental.

A head of 72 channels (the vision tower's) is cut into parts of 64 and 16 whose surplus TMA fills with zeros.
"""

from __future__ import annotations

import functools

import torch
from tma_moe.gluon_parts import make_barriers, tma_load
from tma_moe.kernel import Launch, current_stream, device_guard
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

QUERIES = gl.constexpr(128)  # of a tile, half of them each consumer's
KEYS = gl.constexpr(128)


@gluon.jit
def _tiles_of(q_starts_ptr, s, S):
    inside = s < S
    stop = gl.load(q_starts_ptr + s + 1, mask=inside, other=0)
    return (stop - gl.load(q_starts_ptr + s, mask=inside, other=0) + QUERIES - 1) // QUERIES


@gluon.jit
def _find(q_starts_ptr, S, place, s, base):
    """The sequence of the tile `place` of all, looked for from sequence s on, whose first tile is `base`."""
    tiles = _tiles_of(q_starts_ptr, s, S)
    while (s < S) & (base + tiles <= place):
        base += tiles
        s += 1
        tiles = _tiles_of(q_starts_ptr, s, S)
    return s, base, tiles


@gluon.jit
def _span(q_starts_ptr, kv_starts_ptr, s, base, tiles, place, CAUSAL: gl.constexpr):
    """Of the sequence: first query, end of its queries, first key, number of keys; of the tile: place, key blocks."""
    q_start, q_stop = gl.load(q_starts_ptr + s), gl.load(q_starts_ptr + s + 1)
    kv_start = gl.load(kv_starts_ptr + s)
    kv_len = gl.load(kv_starts_ptr + s + 1) - kv_start
    # The last tile of a causal sequence has the most keys: it starts first.
    first = (base + tiles - 1 - place) * QUERIES
    seen = kv_len
    if CAUSAL:
        seen = gl.minimum(kv_len, kv_len - (q_stop - q_start) + first + QUERIES)
    return q_start, q_stop, kv_start, kv_len, first, (seen + KEYS - 1) // KEYS


@gluon.jit
def _load_rows(descs, row, head, barrier, buffers, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """A tile of one head's rows into its one or two buffers."""
    if PARTS == 1:
        mbarrier.expect(barrier, descs[0].block_type.nbytes)
        tma_load(descs[0], [row, head, 0], barrier, buffers[0])
    else:
        mbarrier.expect(barrier, descs[0].block_type.nbytes + descs[1].block_type.nbytes)
        tma_load(descs[0], [row, head, 0], barrier, buffers[0])
        tma_load(descs[1], [row, head, WIDTH], barrier, buffers[1])


@gluon.jit
def _at(rings, stage, PARTS: gl.constexpr):
    if PARTS == 1:
        return (rings[0].index(stage),)
    else:
        return rings[0].index(stage), rings[1].index(stage)


@gluon.jit
def _produce(q, k, v, buffers, barriers, q_starts_ptr, kv_starts_ptr, S, sizes: gl.constexpr):
    N: gl.constexpr = sizes[0]
    G: gl.constexpr = sizes[1]
    PARTS: gl.constexpr = sizes[2]
    WIDTH: gl.constexpr = sizes[3]
    q_buffers, k_rings, v_rings = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_full.shape[0]
    step = 0
    count = 0
    tile = gl.program_id(0)
    s, base, tiles = _find(q_starts_ptr, S, tile // N, gl.to_tensor(0), gl.to_tensor(0))
    while s < S:
        n = tile % N
        q_start, _, kv_start, _, first, blocks = _span(q_starts_ptr, kv_starts_ptr, s, base, tiles, tile // N, sizes[4])
        mbarrier.wait(q_empty.index(0), (count & 1) ^ 1)
        _load_rows(q, q_start + first, n, q_full.index(0), _at(q_buffers, 0, PARTS), PARTS, WIDTH)
        for block in range(blocks):
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            row = kv_start + block * KEYS
            mbarrier.wait(k_empty.index(stage), phase)
            _load_rows(k, row, n // (N // G), k_full.index(stage), _at(k_rings, stage, PARTS), PARTS, WIDTH)
            mbarrier.wait(v_empty.index(stage), phase)
            _load_rows(v, row, n // (N // G), v_full.index(stage), _at(v_rings, stage, PARTS), PARTS, WIDTH)
            step += 1
        count += 1
        tile += gl.num_programs(0)
        s, base, tiles = _find(q_starts_ptr, S, tile // N, s, base)


@gluon.jit
def _scores(q_buffers, k_rings, stage, half: gl.constexpr, PARTS: gl.constexpr):
    """Starts queries times keys, [64, KEYS] in float32."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    scores = gl.zeros([64, KEYS], gl.float32, layout)
    for part in gl.static_range(PARTS):
        q = q_buffers[part].index(0).reshape([QUERIES, q_buffers[part].shape[3]]).slice(half * 64, 64)
        k = k_rings[part].index(stage).reshape([KEYS, k_rings[part].shape[3]])
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def _add_values(weights, v_rings, stage, out, PARTS: gl.constexpr):
    """Starts out += weights times values, for each part of the head."""
    v = v_rings[0].index(stage).reshape([KEYS, v_rings[0].shape[3]])
    first = warpgroup_mma(weights, v, out[0], is_async=True)
    if PARTS == 1:
        return (first,)
    else:
        v = v_rings[1].index(stage).reshape([KEYS, v_rings[1].shape[3]])
        return first, warpgroup_mma(weights, v, out[1], is_async=True)


@gluon.jit
def _wait_for_values(out, weights, PARTS: gl.constexpr):
    if PARTS == 1:
        first, weights = warpgroup_mma_wait(0, deps=(out[0], weights))
        return (first,), weights
    else:
        first, second, weights = warpgroup_mma_wait(0, deps=(out[0], out[1], weights))
        return (first, second), weights


@gluon.jit
def _scaled(out, factor, PARTS: gl.constexpr):
    layout_1: gl.constexpr = gl.SliceLayout(1, out[0].type.layout)
    first = out[0] * gl.convert_layout(factor, layout_1)[:, None]
    if PARTS == 1:
        return (first,)
    else:
        layout_2: gl.constexpr = gl.SliceLayout(1, out[1].type.layout)
        return first, out[1] * gl.convert_layout(factor, layout_2)[:, None]


@gluon.jit
def _softmax(scores, block, limit, seen, best, total, scale, dtype: gl.constexpr):
    """Folds a block of scores into the running softmax: weights, new best and total, and the factor of what was."""
    layout: gl.constexpr = scores.type.layout
    if (block + 1) * KEYS > seen:  # some query of this consumer does not see the whole block
        key = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        scores = gl.where(key[None, :] < limit[:, None], scores, float("-inf"))
    new_best = gl.maximum(best, gl.max(scores, axis=1) * scale)
    weights = gl.exp2(scores * scale - new_best[:, None])
    fade = gl.exp2(best - new_best)
    total = total * fade + gl.sum(weights, axis=1)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    return gl.convert_layout(weights.to(dtype), operand), new_best, total, fade


@gluon.jit
def _clear_rows(buffer, valid):
    """Zeros for the values past the sequence's end: their weights are zero, but they may be NaN."""
    width: gl.constexpr = buffer.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    for piece in gl.static_range(KEYS // 32):
        row = piece * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
        rows = buffer.reshape([KEYS, width]).slice(piece * 32, 32)
        values = rows.load(layout)
        rows.store(gl.where((row < valid)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _store(values, out_ptr, query, stop, n, first_col, N: gl.constexpr, D: gl.constexpr):
    width: gl.constexpr = values.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    rows = query + gl.arange(0, 64, gl.SliceLayout(1, layout))
    cols = first_col + gl.arange(0, width, gl.SliceLayout(0, layout))
    values = gl.convert_layout(values.to(out_ptr.dtype.element_ty), layout)
    at = out_ptr + ((rows.to(gl.int64) * N + n) * D)[:, None] + cols[None, :]
    gl.store(at, values, mask=(rows < stop)[:, None] & (cols < D)[None, :])


@gluon.jit
def _consume(
    half: gl.constexpr, out_ptr, buffers, barriers, q_starts_ptr, kv_starts_ptr, S, scale, sizes: gl.constexpr
):
    N: gl.constexpr = sizes[0]
    PARTS: gl.constexpr = sizes[2]
    CAUSAL: gl.constexpr = sizes[4]
    D: gl.constexpr = sizes[5]
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
    step = 0
    count = 0
    tile = gl.program_id(0)
    s, base, tiles = _find(q_starts_ptr, S, tile // N, gl.to_tensor(0), gl.to_tensor(0))
    while s < S:
        n = tile % N
        q_start, q_stop, _, kv_len, first, blocks = _span(
            q_starts_ptr, kv_starts_ptr, s, base, tiles, tile // N, CAUSAL
        )
        query = first + half * 64
        rows = query + gl.arange(0, 64, gl.SliceLayout(1, layout))
        limit = gl.zeros_like(rows) + kv_len
        seen = kv_len
        if CAUSAL:
            past = kv_len - (q_stop - q_start)
            limit = gl.minimum(past + rows + 1, kv_len)
            seen = gl.minimum(past + query + 1, kv_len)
        best = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
        if PARTS == 1:
            out = (gl.zeros([64, width_1], gl.float32, layout_1),)
        else:
            out = (gl.zeros([64, width_1], gl.float32, layout_1), gl.zeros([64, width_2], gl.float32, layout_2))

        mbarrier.wait(q_full.index(0), count & 1)
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        scores = _scores(q_buffers, k_rings, stage, half, PARTS)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, best, total, _ = _softmax(scores, 0, limit, seen, best, total, scale, dtype)
        for block in range(1, blocks):
            before = step % STAGES
            before_phase = (step // STAGES) & 1
            step += 1
            stage = step % STAGES
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            scores = _scores(q_buffers, k_rings, stage, half, PARTS)
            mbarrier.wait(v_full.index(before), before_phase)
            out = _add_values(weights, v_rings, before, out, PARTS)
            scores = warpgroup_mma_wait(PARTS, deps=(scores,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            next_weights, best, total, fade = _softmax(scores, block, limit, seen, best, total, scale, dtype)
            out, weights = _wait_for_values(out, weights, PARTS)
            mbarrier.arrive(v_empty.index(before), count=1)
            out = _scaled(out, fade, PARTS)
            weights = next_weights
        mbarrier.arrive(q_empty.index(0), count=1)
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        if blocks * KEYS > kv_len:
            for part in gl.static_range(PARTS):
                _clear_rows(v_rings[part].index(stage), kv_len - (blocks - 1) * KEYS)
            fence_async_shared()
        out = _add_values(weights, v_rings, stage, out, PARTS)
        out, weights = _wait_for_values(out, weights, PARTS)
        mbarrier.arrive(v_empty.index(stage), count=1)
        step += 1
        out = _scaled(out, 1.0 / total, PARTS)
        _store(out[0], out_ptr, q_start + query, q_stop, n, 0, N, D)
        if PARTS == 2:
            _store(out[1], out_ptr, q_start + query, q_stop, n, width_1, N, D)
        count += 1
        tile += gl.num_programs(0)
        s, base, tiles = _find(q_starts_ptr, S, tile // N, s, base)


@gluon.jit
def _rings(descs, STAGES: gl.constexpr, PARTS: gl.constexpr):
    # Kernels know no unpacking.
    shape_1: gl.constexpr = [STAGES] + descs[0].block_type.shape  # noqa: RUF005
    first = gl.allocate_shared_memory(descs[0].dtype, shape_1, descs[0].layout)
    if PARTS == 1:
        return (first,)
    else:
        shape_2: gl.constexpr = [STAGES] + descs[1].block_type.shape  # noqa: RUF005
        second = gl.allocate_shared_memory(descs[1].dtype, shape_2, descs[1].layout)
        return first, second


@gluon.jit(do_not_specialize=["S"])
def attend_packed(
    q1,  # [T, N, D], blocks [QUERIES, 1, width of a part]
    q2,
    k1,  # [U, G, D], blocks [KEYS, 1, width of a part]
    k2,
    v1,
    v2,
    out_ptr,  # [T, N, D], contiguous
    q_starts_ptr,  # [S + 1]
    kv_starts_ptr,
    S,
    scale,  # 1 / sqrt(D) * log2(e)
    N: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    PARTS: gl.constexpr,
    CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out[t, n] = softmax over the keys of t's sequence that it may see. With one part, q2, k2 and v2 are None."""
    buffers = _rings((q1, q2), 1, PARTS), _rings((k1, k2), STAGES, PARTS), _rings((v1, v2), STAGES, PARTS)
    q_full, q_empty = make_barriers(1, 1)
    k_full, k_empty = make_barriers(STAGES, 1)
    v_full, v_empty = make_barriers(STAGES, 1)
    barriers = q_full, q_empty, k_full, k_empty, v_full, v_empty
    sizes: gl.constexpr = (N, G, PARTS, q1.block_type.shape[2], CAUSAL, D)
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), out_ptr, buffers, barriers, q_starts_ptr, kv_starts_ptr, S, scale, sizes)),
            (_consume, (gl.constexpr(1), out_ptr, buffers, barriers, q_starts_ptr, kv_starts_ptr, S, scale, sizes)),
            (_produce, ((q1, q2), (k1, k2), (v1, v2), buffers, barriers, q_starts_ptr, kv_starts_ptr, S, sizes)),
        ],
        [4, 1],
        [240, 24],
    )


def _descriptors(x_TND: Tensor, widths: tuple[int, ...]) -> list[TensorDescriptor | None]:
    """One descriptor for each of two parts of a head, of which the second may not be needed."""
    shape, strides, bits = list(x_TND.shape), list(x_TND.stride()), 8 * x_TND.element_size()
    found: list[TensorDescriptor | None] = [None, None]
    for part, width in enumerate(widths):
        layout = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=bits, rank=3)
        found[part] = TensorDescriptor(x_TND, shape, strides, [KEYS.value, 1, width], layout=layout)
    return found


def takes(q_TND: Tensor, k_UGD: Tensor, v_UGD: Tensor) -> bool:
    """Whether :func:`hopper_attention` takes these: head widths that it is made for, rows that TMA can address."""
    D = q_TND.shape[2]
    return (D == 128 or 64 < D <= 80) and all(
        x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or D % 8 or x.data_ptr() % 16)
        for x in (q_TND, k_UGD, v_UGD)
    )


@functools.cache
def _launch(device: torch.device, dtype: torch.dtype, N: int, G: int, D: int, causal: bool) -> tuple:
    """The widths of a head's parts, the launch, and how many programs run at once: one per multiprocessor."""
    # Device and dtype are only part of the key: a compiled kernel belongs to both.
    widths, stages = ((128,), 2) if D > 80 else ((64, 16), 3)
    launch = Launch(attend_packed, (N, G, D, len(widths), causal, stages), warps=4, pdl=False)
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
    (T, N, D), G, S = q_TND.shape, k_UGD.shape[1], len(q_starts) - 1
    out_TND = torch.empty((T, N, D), dtype=q_TND.dtype, device=q_TND.device)
    if T:
        widths, launch, multiprocessors = _launch(q_TND.device, q_TND.dtype, N, G, D, causal)
        descriptors = [d for x in (q_TND, k_UGD, v_UGD) for d in _descriptors(x, widths)]
        programs = min((-(-T // QUERIES.value) + S) * N, multiprocessors)
        scale = D**-0.5 * 1.4426950408889634
        with device_guard(q_TND.device):
            stream = current_stream(q_TND.device)
            launch(stream, (programs, 1, 1), *descriptors, out_TND, q_starts, kv_starts, S, scale)
    return out_TND
