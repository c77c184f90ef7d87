"""Many rows per expert: both products with weights as the M operand and a whole expert's tokens beside them, in Gluon.

A tile is 128 rows of weights by up to 288 tokens, so up to about 280 tokens an expert's weights go to a multiprocessor
once, and the tensor cores work on the tokens that are there: a tile's width is one of seven, chosen on the device.

A producer only copies; two consumers only multiply and store, each 64 of the weights' rows. They meet at a ring of
buffers guarded by two barriers each, "full" and "empty". Nothing else is synchronised, so a consumer's epilogue runs
under the other consumer's multiplications and under the producer's copies for the next tile, which Triton's own
pipeline cannot arrange. Gluon is part of triton, has no interpreter, and is still called experimental.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tma_moe.gluon_parts import (
    PLAN_HEADER,
    gather_load,
    halves,
    prefetch_rows,
    silu_times,
    take_turn,
    tma_load,
)
from tma_moe.streamed_parts import BLOCK_K, TAIL, WEIGHT_ROWS, each_tile, make_ring, multiply, token_buffers


@gluon.jit
def _swiglu(acc, dtype: gl.constexpr):
    """[64, N] with 8 rows of gate and 8 of up in turns -> [32, N]: a gate and its up are in one thread."""
    N: gl.constexpr = acc.shape[1]
    gate, up = acc.reshape([4, 2, 8, N]).permute((0, 2, 3, 1)).split()
    return silu_times(gate, up).to(dtype).reshape([32, N])


@gluon.jit
def _store_h(h, h_ptr, row, last, col, I: gl.constexpr, EVICT: gl.constexpr):  # noqa: E741
    """Stores [C, N] transposed, 64 tokens at a time: the exchange between threads then takes little shared memory."""
    N: gl.constexpr = h.shape[1]
    if N > 64:
        left, right = halves(h)
        _store_h(left, h_ptr, row, last, col, I, EVICT)
        _store_h(right, h_ptr, row + N // 2, last, col, I, EVICT)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
        rows = row + gl.arange(0, N, gl.SliceLayout(1, layout))
        cols = col + gl.arange(0, h.shape[0], gl.SliceLayout(0, layout))
        h = gl.convert_layout(h.permute((1, 0)), layout)
        at = h_ptr + (rows.to(gl.int64) * I)[:, None] + cols[None, :]
        gl.store(at, h, mask=(rows < last)[:, None] & (cols < I)[None, :], eviction_policy=EVICT)


@gluon.jit
def _consume_up(A: gl.constexpr, B: gl.constexpr, tile, half: gl.constexpr, ring, h_ptr, sizes: gl.constexpr):
    H: gl.constexpr = sizes[0]
    I: gl.constexpr = sizes[1]  # noqa: E741
    step, _, first, last, n = tile
    acc_a, acc_b = multiply(ring, step, half, (H + BLOCK_K - 1) // BLOCK_K, A, B, True)
    col = n + half * 32
    _store_h(_swiglu(acc_a, h_ptr.dtype.element_ty), h_ptr, first, last, col, I, sizes[3])
    if B > 0:
        _store_h(_swiglu(acc_b, h_ptr.dtype.element_ty), h_ptr, first + A, last, col, I, sizes[3])


@gluon.jit
def _slots(plan_ptr, first, last, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, N, gl.SliceLayout(1, layout))
    return gl.load(plan_ptr + PLAN_HEADER + rows, mask=rows < last, other=0)


@gluon.jit
def _row_pointers(x_ptr, plan_ptr, first, last, N: gl.constexpr, TOPK: gl.constexpr, H: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, N, gl.SliceLayout(1, layout))
    tokens = _slots(plan_ptr, first, last, N) // TOPK
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    return (x_ptr + tokens.to(gl.int64) * H)[:, None] + cols[None, :], (rows < last)[:, None], cols[None, :]


@gluon.jit
def _produce_up(A: gl.constexpr, B: gl.constexpr, tile, ring, x_ptr, desc, plan_ptr, sizes: gl.constexpr):
    H: gl.constexpr = sizes[0]
    TOPK: gl.constexpr = sizes[2]
    step, e, first, last, n = tile
    weights, _, _, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    # Rows past the end are filled with zeros, which costs the tensor cores less power than other numbers.
    x_a, real_a, cols = _row_pointers(x_ptr, plan_ptr, first, last, A, TOPK, H)
    x_b, real_b, _ = _row_pointers(x_ptr, plan_ptr, first + A, last, B if B > 0 else 32, TOPK, H)
    for at in range(0, H, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), desc.block_type.nbytes)
        tma_load(desc, [e, n // 8, 0, 0, at], full.index(stage), weights.index(stage))
        a, b = token_buffers(ring, stage, A, B)
        if H % BLOCK_K == 0:
            gather_load(a, x_a + at, mask=real_a)
            if B > 0:
                gather_load(b, x_b + at, mask=real_b)
        else:
            gather_load(a, x_a + at, mask=real_a & (cols + at < H))
            if B > 0:
                gather_load(b, x_b + at, mask=real_b & (cols + at < H))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def streamed_up(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2I, H]
    gate_up_desc,  # the same as [E, I/8, 2, 8, H], blocks [1, 8, 2, 8, BLOCK_K]: 8 rows of gate and 8 of up in turns
    plan_ptr,
    h_ptr,  # [T * K, I], by row of the plan
    tiles_at,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TOPK: gl.constexpr,
    E: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    EVICT: gl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token]); tokens are gathered by the producer."""
    COL_TILES: gl.constexpr = (I + 63) // 64
    # Experts are not grouped yet. If each needs one tile, this program's first is most likely this one.
    e = gl.program_id(0) // COL_TILES
    n = gl.program_id(0) % COL_TILES * 64
    if (e < E) & (n + 64 <= I) & (tiles_at <= PLAN_HEADER + E * ROWS):
        prefetch_rows(gate_up_ptr, e * 2 * I + n, 64, H)
        prefetch_rows(gate_up_ptr, e * 2 * I + I + n, 64, H)
    take_turn()
    total = gl.load(plan_ptr) * COL_TILES
    # A buffer is full after the producer's announcement of TMA's bytes and the copies of each of its 128 threads.
    ring = make_ring(gate_up_desc, STAGES, ROWS, 1 + 128)
    sizes: gl.constexpr = (H, I, TOPK, EVICT)
    walk: gl.constexpr = (ROWS, COL_TILES, 64, (H + BLOCK_K - 1) // BLOCK_K)
    consume: gl.constexpr = _consume_up
    produce: gl.constexpr = _produce_up
    gl.warp_specialize(
        [
            (each_tile, (consume, (gl.constexpr(0), ring, h_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (consume, (gl.constexpr(1), ring, h_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (produce, (ring, x_ptr, gate_up_desc, plan_ptr, sizes), plan_ptr, tiles_at, total, walk)),
        ],
        [4, 4],
        [208, 88],
    )


@gluon.jit
def _store_rows(out, rows_ptr, slots, row, last, col, H: gl.constexpr, EVICT: gl.constexpr):
    """As `_store_h`, each token's row at its slot."""
    N: gl.constexpr = out.shape[1]
    if N > 64:
        left, right = halves(out)
        left_slots, right_slots = halves(slots)
        _store_rows(left, rows_ptr, left_slots, row, last, col, H, EVICT)
        _store_rows(right, rows_ptr, right_slots, row + N // 2, last, col, H, EVICT)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        rows = row + gl.arange(0, N, gl.SliceLayout(1, layout))
        cols = col + gl.arange(0, out.shape[0], gl.SliceLayout(0, layout))
        out = gl.convert_layout(out.permute((1, 0)), layout)
        slots = gl.convert_layout(slots, gl.SliceLayout(1, layout))
        at = rows_ptr + (slots.to(gl.int64) * H)[:, None] + cols[None, :]
        gl.store(at, out, mask=(rows < last)[:, None] & (cols < H)[None, :], eviction_policy=EVICT)


@gluon.jit
def _consume_down(
    A: gl.constexpr, B: gl.constexpr, tile, half: gl.constexpr, ring, plan_ptr, rows_ptr, sizes: gl.constexpr
):
    H: gl.constexpr = sizes[0]
    step, _, first, last, n = tile
    slots_a = _slots(plan_ptr, first, last, A)
    slots_b = _slots(plan_ptr, first + A, last, B if B > 0 else 32)
    acc_a, acc_b = multiply(ring, step, half, (sizes[1] + BLOCK_K - 1) // BLOCK_K, A, B, False)
    col = n + half * 64
    dtype: gl.constexpr = rows_ptr.dtype.element_ty
    _store_rows(acc_a.to(dtype), rows_ptr, slots_a, first, last, col, H, sizes[2])
    if B > 0:
        _store_rows(acc_b.to(dtype), rows_ptr, slots_b, first + A, last, col, H, sizes[2])


@gluon.jit
def _produce_down(A: gl.constexpr, B: gl.constexpr, tile, ring, h_desc, down_desc, sizes: gl.constexpr):
    weights, _, _, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    step, e, first, _, n = tile
    BYTES: gl.constexpr = down_desc.block_type.nbytes + (A + B) // TAIL * h_desc.block_type.nbytes
    for at in range(0, sizes[1], BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BYTES)
        tma_load(down_desc, [e * sizes[0] + n, at], full.index(stage), weights.index(stage))
        a, b = token_buffers(ring, stage, A, B)
        for i in gl.static_range(A // TAIL):
            tma_load(h_desc, [first + i * TAIL, at], full.index(stage), a.slice(i * TAIL, TAIL))
        for i in gl.static_range(B // TAIL):
            tma_load(h_desc, [first + A + i * TAIL, at], full.index(stage), b.slice(i * TAIL, TAIL))
        step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def streamed_down(
    h_desc,  # [T * K, I], by row of the plan, blocks [TAIL, BLOCK_K]
    down_ptr,  # [E, H, I]
    down_desc,  # the same as [E * H, I], blocks [WEIGHT_ROWS, BLOCK_K]
    plan_ptr,
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    E: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    EVICT: gl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]. Tiles may run into the next expert's rows; only the store is masked."""
    COL_TILES: gl.constexpr = (H + WEIGHT_ROWS - 1) // WEIGHT_ROWS
    # Read before this kernel's turn: grouping wrote the plan, and the up product has waited for it (rule 4 of pdl.py).
    e = gl.load(plan_ptr + tiles_at + 4 * (gl.program_id(0) // COL_TILES))
    n = gl.program_id(0) % COL_TILES * WEIGHT_ROWS
    if (e >= 0) & (e < E) & (n + WEIGHT_ROWS <= H):
        prefetch_rows(down_ptr, e * H + n, WEIGHT_ROWS, I)
    take_turn()
    total = gl.load(plan_ptr + 1) * COL_TILES
    ring = make_ring(down_desc, STAGES, ROWS, 1)
    sizes: gl.constexpr = (H, I, EVICT)
    walk: gl.constexpr = (ROWS, COL_TILES, WEIGHT_ROWS, (I + BLOCK_K - 1) // BLOCK_K)
    consume: gl.constexpr = _consume_down
    produce: gl.constexpr = _produce_down
    gl.warp_specialize(
        [
            (each_tile, (consume, (gl.constexpr(0), ring, plan_ptr, rows_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (consume, (gl.constexpr(1), ring, plan_ptr, rows_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (produce, (ring, h_desc, down_desc, sizes), plan_ptr, tiles_at, total, walk)),
        ],
        [4, 1],
        [216, 24],
    )
