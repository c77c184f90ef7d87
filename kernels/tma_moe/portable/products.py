"""The products of 16-bit weights on any card: pointers, `tl.dot`, one program for each output tile.

    up      [2 * COLS, BLOCK_K] of gate and up  with  [ROWS, BLOCK_K] of tokens  ->  h [ROWS, COLS]
    down    [COLS, BLOCK_K] of down             with  [ROWS, BLOCK_K] of h       ->  rows [ROWS, COLS]

COLS rows of gate and the same of up are loaded as one tile, so one product makes both, and SwiGLU finds a value's gate
and up in one thread. Triton's pipeline has the copies of the next steps under way while one is multiplied.

Rows and columns past the end are not masked where they are loaded: they repeat the last one, in bounds, and no product
mixes rows. Only what is stored is masked. (A mask along K is needed where its size is no multiple of BLOCK_K.)
"""

import triton
import triton.language as tl
from torch import Tensor

from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Product, Sizes, require
from tma_moe.gemm.weights_m import silu_times
from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.routing import HEADER
from tma_moe.tiles import Tiles


@triton.jit
def load_step(rows_ptr, at, BLOCK_K: tl.constexpr, K: tl.constexpr):
    """Columns [at, at + BLOCK_K) of some rows [N, 1] of pointers; 0 from K on."""
    i = at + tl.arange(0, BLOCK_K)
    if (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K == K:
        return tl.load(rows_ptr + i[None, :])
    return tl.load(rows_ptr + i[None, :], mask=(i < K)[None, :], other=0.0)


@triton.jit
def gate_and_up_rows(n, I: tl.constexpr, COLS: tl.constexpr):  # noqa: E741
    """Rows [2 * COLS] of an expert's weights [2I, H]: of gate from n on, then the same of up."""
    row = tl.arange(0, 2 * COLS)
    return tl.minimum(n + row % COLS, I - 1) + row // COLS * I


@triton.jit
def gate_and_up(acc, ROWS: tl.constexpr, COLS: tl.constexpr, WEIGHTS_M: tl.constexpr):
    """Gate and up, each [ROWS, COLS], of a product with `gate_and_up_rows`; both stay where they are in registers."""
    if WEIGHTS_M:
        gate, up = acc.reshape([2, COLS, ROWS]).permute(1, 2, 0).split()
        return gate.T, up.T
    else:
        return acc.reshape([ROWS, 2, COLS]).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["tiles_at"])
def portable_up(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2I, H]
    plan_ptr,  # int32, see routing.py
    h_ptr,  # [T * K, I], by row of the plan
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    BLOCK_K: tl.constexpr,
    WEIGHTS_M: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token])."""
    take_turn(PDL)
    col_tiles: tl.constexpr = (I + COLS - 1) // COLS
    tile = tl.program_id(0)
    if tile >= tl.load(plan_ptr) * col_tiles:
        return
    entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
    e, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    n = tile % col_tiles * COLS
    rows = first + tl.arange(0, ROWS)
    slots = tl.load(plan_ptr + HEADER + tl.minimum(rows, end - 1))
    x_rows = x_ptr + (slots // TOPK).to(tl.int64)[:, None] * H
    w_rows = gate_up_ptr + (e.to(tl.int64) * 2 * I + gate_and_up_rows(n, I, COLS))[:, None] * H
    if WEIGHTS_M:
        acc = tl.zeros([2 * COLS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, 2 * COLS], tl.float32)
    for at in tl.range(0, H, BLOCK_K):
        x = load_step(x_rows, at, BLOCK_K, H)
        w = load_step(w_rows, at, BLOCK_K, H)
        if WEIGHTS_M:
            acc = tl.dot(w, x.T, acc)
        else:
            acc = tl.dot(x, w.T, acc)
    gate, up = gate_and_up(acc, ROWS, COLS, WEIGHTS_M)
    cols = n + tl.arange(0, COLS)
    inside = (rows < end)[:, None] & (cols < I)[None, :]
    h_at = h_ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]
    tl.store(h_at, silu_times(gate, up).to(h_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICT)


@triton.jit(do_not_specialize=["tiles_at"])
def portable_down(
    h_ptr,  # [T * K, I], by row of the plan
    down_ptr,  # [E, H, I]
    plan_ptr,  # int32, see routing.py
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    BLOCK_K: tl.constexpr,
    WEIGHTS_M: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]."""
    take_turn(PDL)
    col_tiles: tl.constexpr = (H + COLS - 1) // COLS
    tile = tl.program_id(0)
    if tile >= tl.load(plan_ptr + 1) * col_tiles:
        return
    entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
    e, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    cols = tile % col_tiles * COLS + tl.arange(0, COLS)
    rows = first + tl.arange(0, ROWS)
    clamped = tl.minimum(rows, end - 1)
    h_rows = h_ptr + clamped.to(tl.int64)[:, None] * I
    w_rows = down_ptr + (e.to(tl.int64) * H + tl.minimum(cols, H - 1))[:, None] * I
    if WEIGHTS_M:
        acc = tl.zeros([COLS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, COLS], tl.float32)
    for at in tl.range(0, I, BLOCK_K):
        h = load_step(h_rows, at, BLOCK_K, I)
        w = load_step(w_rows, at, BLOCK_K, I)
        if WEIGHTS_M:
            acc = tl.dot(w, h.T, acc)
        else:
            acc = tl.dot(h, w.T, acc)
    out = acc.T if WEIGHTS_M else acc
    slots = tl.load(plan_ptr + HEADER + clamped)
    inside = (rows < end)[:, None] & (cols < H)[None, :]
    out_at = rows_ptr + slots.to(tl.int64)[:, None] * H + cols[None, :]
    tl.store(out_at, out.to(rows_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICT)


class Up(Product):
    """The launch of `portable_up`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        check(tiles)
        super().__init__(tiles, sizes, triton.cdiv(sizes.I, tiles.cols))
        constants = (sizes.H, sizes.I, sizes.K, *_constants(tiles, sizes))
        self.launch = Launch(portable_up, constants, tiles.warps, tiles.stages, sizes.pdl)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        self.launch(stream, self.grid(pairs), source, experts.parameter("gate_up"), plan, out, tiles_at)


class Down(Product):
    """The launch of `portable_down`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        check(tiles)
        super().__init__(tiles, sizes, triton.cdiv(sizes.H, tiles.cols))
        constants = (sizes.H, sizes.I, *_constants(tiles, sizes))
        self.launch = Launch(portable_down, constants, tiles.warps, tiles.stages, sizes.pdl)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        self.launch(stream, self.grid(pairs), source, experts.parameter("down"), plan, out, tiles_at)


def _constants(tiles: Tiles, sizes: Sizes) -> tuple:
    evict = "evict_last" if tiles.keep else ""
    return tiles.rows, tiles.cols, tiles.block_k, tiles.weights_m, evict, sizes.pdl


def check(tiles: Tiles) -> None:
    """Raises ValueError for tiles that no portable product takes."""
    takes = tiles.rows >= 16 and tiles.cols >= 16 and tiles.block_k >= 16
    require(takes and not tiles.ctas_per_sm and not tiles.flatten, tiles, "sides of at least 16, one program per tile")
