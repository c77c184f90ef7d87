"""Weights as the M operand, warp-specialised, for 48 to 256 rows per expert: its weights are read once.

    up      128 rows of gate_up (64 of gate, 64 of up)  x  up to 288 tokens  ->  h [tokens, 64]
    down    128 rows of down                            x  up to 288 rows    ->  rows [rows, 128]

Why: with tokens as M, the row tiles of one expert run at different times, each reads all of its weights, and an L2 of
50 MB does not hold the 55 MB of weights that one wave of tiles reads. Nsight Compute counted 1.23 GB read for the 0.80
GB of an up product's weights at 4096 tokens. Here a tile holds all tokens of an expert (up to 288, cut evenly
above), so each weight goes to a multiprocessor once; the tensor cores work on the tokens that are there, as a tile's
width is chosen on the device among a few (weights_m_ws_tile.py).

One program a multiprocessor walks over its tiles. A producer copies; consumers 0 and 1 multiply 64 of the tile's 128
weight rows each, and store. They meet at the ring of gluon_parts.py, so one consumer's SwiGLU and store run under the
other's products and under the copies for the next tile.

    registers per thread    consumers (4 warps each)    producer
    up                      208                         88 (4 warps, which gather tokens by ordinary copies)
    down                    216                         24 (1 warp, which only issues TMA)

    shared memory per stage  128 x 64 weights (16 KB) and ROWS x 64 tokens; 7, 5 and 4 stages of 96, 160 and 288 tokens
                             are 196, 180 and 208 KB

EVICT is L2's policy for what is stored, as in weights_m.py.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tma_moe.descriptors import activation_descriptor, weight_descriptor
from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Product, Sizes, all_rows, require
from tma_moe.gemm.weights_m_ws_tile import BLOCK_K, TAIL, WEIGHT_ROWS, each_tile, make_ring, multiply, token_buffers
from tma_moe.gluon_parts import (
    PLAN_HEADER,
    gather_load,
    halves,
    prefetch_rows,
    silu_times,
    take_turn,
    tma_load,
)
from tma_moe.launcher import Launch
from tma_moe.tiles import Tiles

WIDEST = (96, 160, 288)  # the most tokens of a tile, as kernels are compiled: a power of two and 32 more


@gluon.jit
def _swiglu(acc, dtype: gl.constexpr):
    """[64, N] with 8 rows of gate and 8 of up in turns -> [32, N].

    In the accumulator of a warpgroup MMA a thread holds rows r and r + 8 of its warp's 16. With eight rows of gate
    before eight of up these are a gate and its up, so the activation needs no exchange between threads.
    """
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
    """This consumer's half of one tile of h."""
    H: gl.constexpr = sizes[0]
    I: gl.constexpr = sizes[1]  # noqa: E741
    EVICT: gl.constexpr = sizes[3]
    step, _, first, last, n = tile
    acc_a, acc_b = multiply(ring, step, half, (H + BLOCK_K - 1) // BLOCK_K, A, B, True)
    # 64 rows of weights are 32 values of h: this consumer's half of the tile's 64.
    col = n + half * 32
    _store_h(_swiglu(acc_a, h_ptr.dtype.element_ty), h_ptr, first, last, col, I, EVICT)
    if B > 0:
        _store_h(_swiglu(acc_b, h_ptr.dtype.element_ty), h_ptr, first + A, last, col, I, EVICT)


@gluon.jit
def _slots(plan_ptr, first, last, N: gl.constexpr):
    """Slots of N rows from `first` on; 0 for those that are not there."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, N, gl.SliceLayout(1, layout))
    return gl.load(plan_ptr + PLAN_HEADER + rows, mask=rows < last, other=0)


@gluon.jit
def _row_pointers(x_ptr, plan_ptr, first, last, N: gl.constexpr, TOPK: gl.constexpr, H: gl.constexpr):
    """Where the tokens of N rows begin, [N, BLOCK_K]; which rows are there; and columns. For copies of 16 bytes."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = first + gl.arange(0, N, gl.SliceLayout(1, layout))
    tokens = _slots(plan_ptr, first, last, N) // TOPK
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    return (x_ptr + tokens.to(gl.int64) * H)[:, None] + cols[None, :], (rows < last)[:, None], cols[None, :]


@gluon.jit
def _produce_up(A: gl.constexpr, B: gl.constexpr, tile, ring, x_ptr, desc, plan_ptr, sizes: gl.constexpr):
    """Gathers tokens and copies gate and up rows for every step of one tile."""
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
        # Eight groups of eight rows of gate and the eight of up that belong to them: 128 rows in one load.
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
        # Each of the 128 threads arrives once its own copies have landed.
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def weights_m_ws_up(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2I, H]
    gate_up_desc,  # the same as [E, I/8, 2, 8, H], blocks [1, 8, 2, 8, BLOCK_K]: 8 rows of gate and 8 of up in turns
    plan_ptr,  # int32, see routing.py
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
    consume: gl.constexpr = _consume_up  # as a constexpr a function can be passed to a worker
    produce: gl.constexpr = _produce_up
    gl.warp_specialize(
        [
            (each_tile, (consume, (gl.constexpr(0), ring, h_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (consume, (gl.constexpr(1), ring, h_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (produce, (ring, x_ptr, gate_up_desc, plan_ptr, sizes), plan_ptr, tiles_at, total, walk)),
        ],
        # The first consumer's four warps are the kernel's own. 208 registers hold the accumulator of 288 tokens (144)
        # and what finds the tiles; the producer's four warps gather rows and need 88 for their addresses.
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
    """This consumer's half of one tile of rows."""
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
    """Copies h and down rows by TMA for every step of one tile."""
    weights, _, _, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    step, e, first, _, n = tile
    BYTES: gl.constexpr = down_desc.block_type.nbytes + (A + B) // TAIL * h_desc.block_type.nbytes
    for at in range(0, sizes[1], BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BYTES)
        # Rows of h that belong to one expert follow each other, so TMA brings them, too, 32 at a time.
        tma_load(down_desc, [e * sizes[0] + n, at], full.index(stage), weights.index(stage))
        a, b = token_buffers(ring, stage, A, B)
        for i in gl.static_range(A // TAIL):
            tma_load(h_desc, [first + i * TAIL, at], full.index(stage), a.slice(i * TAIL, TAIL))
        for i in gl.static_range(B // TAIL):
            tma_load(h_desc, [first + A + i * TAIL, at], full.index(stage), b.slice(i * TAIL, TAIL))
        step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def weights_m_ws_down(
    h_desc,  # [T * K, I], by row of the plan, blocks [TAIL, BLOCK_K]
    down_ptr,  # [E, H, I]
    down_desc,  # the same as [E * H, I], blocks [WEIGHT_ROWS, BLOCK_K]
    plan_ptr,  # int32, see routing.py
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
    consume: gl.constexpr = _consume_down  # see weights_m_ws_up
    produce: gl.constexpr = _produce_down
    gl.warp_specialize(
        [
            (each_tile, (consume, (gl.constexpr(0), ring, plan_ptr, rows_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (consume, (gl.constexpr(1), ring, plan_ptr, rows_ptr, sizes), plan_ptr, tiles_at, total, walk)),
            (each_tile, (produce, (ring, h_desc, down_desc, sizes), plan_ptr, tiles_at, total, walk)),
        ],
        # All copies are TMA's, which a single warp of 24 registers issues; the consumers get what it leaves.
        [4, 1],
        [216, 24],
    )


def interleaved(weight: Tensor) -> tuple[list[int], list[int]]:
    """gate_up [E, 2I, H] as [E, I / 8, 2, 8, H]: eight rows of gate and the eight of up that belong to them in turns.

    Only strides: all gate rows still lie before all up rows.
    """
    E, N, K = weight.shape
    return [E, N // 16, 2, 8, K], [N * K, 8 * K, N // 2 * K, K, 1]


class Up(Product):
    """The launch of `weights_m_ws_up`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles, cols=64)
        super().__init__(tiles, sizes, -(-sizes.I // tiles.cols), step=TAIL.value)
        constants = (sizes.H, sizes.I, sizes.K, sizes.E, tiles.rows, tiles.stages, _evict(tiles))
        self.launch = Launch(weights_m_ws_up, constants, tiles.warps)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        desc = weight_descriptor(experts, "gate_up", interleaved, (1, 8, 2, 8, BLOCK_K.value), gluon=True)
        weight = experts.parameter("gate_up")
        self.launch(stream, self.grid(pairs), source, weight, desc, plan, out, tiles_at)


class Down(Product):
    """The launch of `weights_m_ws_down`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles, cols=WEIGHT_ROWS.value)
        super().__init__(tiles, sizes, -(-sizes.H // tiles.cols), step=TAIL.value)
        constants = (sizes.H, sizes.I, sizes.E, tiles.rows, tiles.stages, _evict(tiles))
        self.launch = Launch(weights_m_ws_down, constants, tiles.warps)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        h_desc = activation_descriptor(source, (TAIL.value, BLOCK_K.value), gluon=True)
        desc = weight_descriptor(experts, "down", all_rows, (WEIGHT_ROWS.value, BLOCK_K.value), gluon=True)
        weight = experts.parameter("down")
        self.launch(stream, self.grid(pairs), h_desc, weight, desc, plan, out, tiles_at)


def _check(tiles: Tiles, cols: int) -> None:
    takes = tiles.warps == 4 and tiles.rows in WIDEST and tiles.cols == cols and tiles.block_k == BLOCK_K.value
    rows = ", ".join(map(str, WIDEST))
    require(takes, tiles, f"4 warps, {cols} columns, a block_k of {BLOCK_K.value} and rows of {rows}")


def _evict(tiles: Tiles) -> str:
    return "evict_last" if tiles.keep else ""
