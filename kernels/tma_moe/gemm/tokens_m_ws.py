"""Tokens as the M operand, warp-specialised, for the largest loads: from 128 or 256 rows per expert.

    up      128 tokens  x  256 rows of gate_up (128 of gate, 128 of up)  ->  h [128, 128]
    down    128 rows    x  256 rows of down                             ->  rows [128, 256]

With this many rows a tile of 128 x 256 has the most products for the bytes that it copies, which is what counts once
weights are read often enough to stay in L2. One program a multiprocessor walks over its tiles; all columns of a row
tile follow each other, so programs that run together share its tokens.

A producer copies; consumers 0 and 1 multiply 64 of the tile's 128 rows each, and store. They meet at the ring of
gluon_parts.py, so one consumer's epilogue runs under the other's products and under the copies for the next tile. A
consumer that has no rows in an expert's last tile only gives the buffers back.

    registers per thread    consumers (4 warps each)    producer
    up                      216                         56 (4 warps, which gather tokens by ordinary copies)
    down                    216                         24 (1 warp, which only issues TMA)

    shared memory per stage  128 x 64 tokens (16 KB) and 256 x 64 weights (32 KB); 4 stages are 192 KB

One producer and two consumers that share a tile's rows are the division of work of CUTLASS's "cooperative" kernels for
Hopper, written anew here.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tma_moe.descriptors import activation_descriptor, weight_descriptor
from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Product, Sizes, all_rows, require
from tma_moe.gluon_parts import (
    CONSUMERS,
    PLAN_HEADER,
    gather_load,
    halves,
    make_barriers,
    silu_times,
    take_turn,
    tma_load,
)
from tma_moe.launcher import Launch
from tma_moe.tiles import Tiles

ANYHOW = gl.constexpr("")  # no wish of how L2 keeps what is stored


@gluon.jit
def make_ring(
    layout: gl.constexpr,
    dtype: gl.constexpr,
    STAGES: gl.constexpr,
    A_ROWS: gl.constexpr,
    B_ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    FULL_COUNT: gl.constexpr,
):
    """STAGES buffers of both operands with their barriers: (a, b, full, empty)."""
    a = gl.allocate_shared_memory(dtype, [STAGES, A_ROWS, BLOCK_K], layout)
    b = gl.allocate_shared_memory(dtype, [STAGES, B_ROWS, BLOCK_K], layout)
    full, empty = make_barriers(STAGES, FULL_COUNT)
    return a, b, full, empty


@gluon.jit
def tile_at(plan_ptr, tiles_at, tile, COL_TILES: gl.constexpr, COLS: gl.constexpr):
    """Expert, first row, last row + 1 and first column of an output tile."""
    entry = plan_ptr + tiles_at + 4 * (tile // COL_TILES)
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), tile % COL_TILES * COLS


@gluon.jit
def _multiply(ring, step, half, K_STEPS: gl.constexpr, COLS: gl.constexpr, GATHERED: gl.constexpr):
    """One tile's product of this consumer's rows; returns it and the running number of steps."""
    a_ring, b_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    ROWS: gl.constexpr = a_ring.shape[1] // CONSUMERS
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    acc = gl.zeros([ROWS, COLS], gl.float32, layout)
    for k in range(K_STEPS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATHERED:
            # Gathered rows come by ordinary asynchronous copies, which the tensor core sees only after a fence.
            fence_async_shared()
        a = a_ring.index(stage).slice(half * ROWS, ROWS)
        acc = warpgroup_mma(a, b_ring.index(stage).permute((1, 0)), acc, is_async=True)
        # With one product under way, the one before it has read its buffers.
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # Not at k = 0: the last tile's last buffer was given back after its loop.
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc, step


@gluon.jit
def skip(ring, step, K_STEPS: gl.constexpr):
    """Gives back the buffers of a tile in which this consumer has no rows."""
    _, _, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    for _ in range(K_STEPS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit
def store_rows(values, row_ptrs, inside, first_col, width, layout: gl.constexpr, EVICT: gl.constexpr):
    """Stores [ROWS, COLS] in pieces of 64 columns: the exchange between threads then takes little shared memory."""
    cols: gl.constexpr = values.shape[1]
    if cols > 64:
        left, right = halves(values)
        store_rows(left, row_ptrs, inside, first_col, width, layout, EVICT)
        store_rows(right, row_ptrs, inside, first_col + cols // 2, width, layout, EVICT)
    else:
        col = first_col + gl.arange(0, cols, gl.SliceLayout(0, layout))
        values = gl.convert_layout(values, layout)
        mask = inside[:, None] & (col < width)[None, :]
        gl.store(row_ptrs[:, None] + col[None, :], values, mask=mask, eviction_policy=EVICT)


@gluon.jit
def _consume_up(half: gl.constexpr, ring, plan_ptr, h_ptr, tiles_at, total, sizes: gl.constexpr):
    """This consumer's half of each tile of h."""
    H: gl.constexpr = sizes[0]
    I: gl.constexpr = sizes[1]  # noqa: E741
    COLS: gl.constexpr = sizes[3]
    ROWS: gl.constexpr = sizes[2] // CONSUMERS
    K_STEPS: gl.constexpr = (H + sizes[4] - 1) // sizes[4]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        _, first, last, n = tile_at(plan_ptr, tiles_at, tile, (I + COLS - 1) // COLS, COLS)
        if first + half * ROWS < last:
            acc, step = _multiply(ring, step, half, K_STEPS, 2 * COLS, True)
            # Column n and column n + COLS of the accumulator are in the same thread: the activation needs no exchange.
            gate, up = halves(acc)
            h = silu_times(gate, up).to(h_ptr.dtype.element_ty)
            rows = first + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            store_rows(h, h_ptr + rows.to(gl.int64) * I, rows < last, n, I, layout, ANYHOW)
        else:
            step = skip(ring, step, K_STEPS)


@gluon.jit
def _produce_up(x_ptr, gate_up_desc, ring, plan_ptr, tiles_at, total, TOPK: gl.constexpr, sizes: gl.constexpr):
    """Gathers tokens and copies gate and up rows, step by step of every tile."""
    H: gl.constexpr = sizes[0]
    I: gl.constexpr = sizes[1]  # noqa: E741
    COLS: gl.constexpr = sizes[3]
    BLOCK_K: gl.constexpr = sizes[4]
    a_ring, b_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (BLOCK_K // 8), BLOCK_K // 8], [4, 1], [1, 0])
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        e, first, last, n = tile_at(plan_ptr, tiles_at, tile, (I + COLS - 1) // COLS, COLS)
        # Rows past the end repeat the last one: no mask in the loop, and what they compute is not stored.
        rows = gl.minimum(first + gl.arange(0, sizes[2], gl.SliceLayout(1, layout)), last - 1)
        tokens = gl.load(plan_ptr + PLAN_HEADER + rows) // TOPK
        cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
        x = (x_ptr + tokens.to(gl.int64) * H)[:, None] + cols[None, :]
        for at in range(0, H, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * gate_up_desc.block_type.nbytes)
            b = b_ring.index(stage)
            # Gate rows above the up rows that belong to them, so that one MMA computes both halves of a value.
            tma_load(gate_up_desc, [e * 2 * I + n, at], full.index(stage), b.slice(0, COLS))
            tma_load(gate_up_desc, [e * 2 * I + I + n, at], full.index(stage), b.slice(COLS, COLS))
            if H % BLOCK_K == 0:
                gather_load(a_ring.index(stage), x + at)
            else:
                gather_load(a_ring.index(stage), x + at, mask=(cols + at < H)[None, :])
            # Each of the 128 threads arrives once its own copies have landed.
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def tokens_m_ws_up(
    x_ptr,  # [T, H]
    gate_up_desc,  # [E * 2I, H], blocks [COLS, BLOCK_K]
    plan_ptr,  # int32, see routing.py
    h_ptr,  # [T * K, I], by row of the plan
    tiles_at,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TOPK: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token]); tokens are gathered by the producer."""
    take_turn()
    total = gl.load(plan_ptr) * ((I + COLS - 1) // COLS)
    swizzled: gl.constexpr = gate_up_desc.layout
    dtype: gl.constexpr = gate_up_desc.dtype
    # 129 arrivals fill a buffer: `expect`, which also announces TMA's bytes, and each of the producer's 128 threads.
    ring = make_ring(swizzled, dtype, STAGES, ROWS, 2 * COLS, BLOCK_K, 1 + 128)
    sizes: gl.constexpr = (H, I, ROWS, COLS, BLOCK_K)
    gl.warp_specialize(
        [
            (_consume_up, (gl.constexpr(0), ring, plan_ptr, h_ptr, tiles_at, total, sizes)),
            (_consume_up, (gl.constexpr(1), ring, plan_ptr, h_ptr, tiles_at, total, sizes)),
            (_produce_up, (x_ptr, gate_up_desc, ring, plan_ptr, tiles_at, total, TOPK, sizes)),
        ],
        # The first consumer's four warps are the kernel's own. An accumulator [64, 256] takes 128 registers per thread.
        [4, 4],
        [216, 56],
    )


@gluon.jit
def _consume_down(half: gl.constexpr, ring, plan_ptr, rows_ptr, tiles_at, total, sizes: gl.constexpr):
    """This consumer's half of each tile of rows."""
    H: gl.constexpr = sizes[0]
    COLS: gl.constexpr = sizes[3]
    ROWS: gl.constexpr = sizes[2] // CONSUMERS
    K_STEPS: gl.constexpr = (sizes[1] + sizes[4] - 1) // sizes[4]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        _, first, last, n = tile_at(plan_ptr, tiles_at, tile, (H + COLS - 1) // COLS, COLS)
        if first + half * ROWS < last:
            rows = first + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            slots = gl.load(plan_ptr + PLAN_HEADER + rows, mask=rows < last, other=0)
            acc, step = _multiply(ring, step, half, K_STEPS, COLS, False)
            out = acc.to(rows_ptr.dtype.element_ty)
            store_rows(out, rows_ptr + slots.to(gl.int64) * H, rows < last, n, H, layout, ANYHOW)
        else:
            step = skip(ring, step, K_STEPS)


@gluon.jit
def _produce_down(h_desc, down_desc, ring, plan_ptr, tiles_at, total, sizes: gl.constexpr):
    """Copies h and down by TMA, step by step of every tile."""
    H: gl.constexpr = sizes[0]
    COLS: gl.constexpr = sizes[3]
    a_ring, b_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    I: gl.constexpr = sizes[1]  # noqa: E741
    BLOCK_K: gl.constexpr = sizes[4]
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        e, first, _, n = tile_at(plan_ptr, tiles_at, tile, (H + COLS - 1) // COLS, COLS)
        for at in range(0, I, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), h_desc.block_type.nbytes + down_desc.block_type.nbytes)
            tma_load(h_desc, [first, at], full.index(stage), a_ring.index(stage))
            tma_load(down_desc, [e * H + n, at], full.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def tokens_m_ws_down(
    h_desc,  # [T * K, I], by row of the plan, blocks [ROWS, BLOCK_K]
    down_desc,  # [E * H, I], blocks [COLS, BLOCK_K]
    plan_ptr,  # int32, see routing.py
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]. Tiles may run into the next expert's rows; only the store is masked."""
    take_turn()
    total = gl.load(plan_ptr + 1) * ((H + COLS - 1) // COLS)
    swizzled: gl.constexpr = down_desc.layout
    dtype: gl.constexpr = down_desc.dtype
    ring = make_ring(swizzled, dtype, STAGES, ROWS, COLS, BLOCK_K, 1)
    sizes: gl.constexpr = (H, I, ROWS, COLS, BLOCK_K)
    gl.warp_specialize(
        [
            (_consume_down, (gl.constexpr(0), ring, plan_ptr, rows_ptr, tiles_at, total, sizes)),
            (_consume_down, (gl.constexpr(1), ring, plan_ptr, rows_ptr, tiles_at, total, sizes)),
            (_produce_down, (h_desc, down_desc, ring, plan_ptr, tiles_at, total, sizes)),
        ],
        # All copies are TMA's: a single warp issues them.
        [4, 1],
        [216, 24],
    )


class Up(Product):
    """The launch of `tokens_m_ws_up`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles, 128)  # of gate, and as many of up
        super().__init__(tiles, sizes, -(-sizes.I // tiles.cols))
        constants = (sizes.H, sizes.I, sizes.K, tiles.rows, tiles.cols, tiles.block_k, tiles.stages)
        self.launch = Launch(tokens_m_ws_up, constants, tiles.warps)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        desc = weight_descriptor(experts, "gate_up", all_rows, (self.tiles.cols, self.tiles.block_k), gluon=True)
        self.launch(stream, self.grid(pairs), source, desc, plan, out, tiles_at)


class Down(Product):
    """The launch of `tokens_m_ws_down`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles, 256)
        super().__init__(tiles, sizes, -(-sizes.H // tiles.cols))
        constants = (sizes.H, sizes.I, tiles.rows, tiles.cols, tiles.block_k, tiles.stages)
        self.launch = Launch(tokens_m_ws_down, constants, tiles.warps)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        h_desc = activation_descriptor(source, (self.tiles.rows, self.tiles.block_k), gluon=True)
        desc = weight_descriptor(experts, "down", all_rows, (self.tiles.cols, self.tiles.block_k), gluon=True)
        self.launch(stream, self.grid(pairs), h_desc, desc, plan, out, tiles_at)


def _check(tiles: Tiles, cols: int) -> None:
    # An MMA has at most 256 columns.
    takes = tiles.warps == 4 and tiles.rows >= 128 and tiles.block_k >= 64 and tiles.cols <= cols and not tiles.keep
    require(takes, tiles, f"4 warps, at least 128 rows, at most {cols} columns, a block_k of at least 64, and no keep")
