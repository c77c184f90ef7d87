"""Weights as the M operand, in plain Triton; others call it swap AB.

Made for few rows per expert; with tiles of 128 x 128 it is the up product of the largest loads on an H100, too.

    up      [COLS, BLOCK_K] of gate, the same of up  x  [BLOCK_K, ROWS] of tokens  ->  h^T [COLS, ROWS]
    down    [COLS, BLOCK_K] of down                  x  [BLOCK_K, ROWS] of h       ->  rows^T [COLS, ROWS]

Weights arrive by TMA, gate and up rows in a block each. Tokens are gathered through the plan (routing.py) with ordinary
asynchronous copies, since TMA on Hopper gathers nothing. All warps do the same; Triton's pipeline has the copies of the
next STAGES - 1 steps under way while one is multiplied. With 64 rows of gate, 64 of up and 16 tokens, each of the 128
threads holds 16 accumulators, so several programs share a multiprocessor and hide each other's beginning and end.

Both kernels loop over output tiles. With a grid as large as the number of tiles the loop runs once; with a grid as
large as the machine it makes the kernel persistent, and FLATTEN fuses it with the loop over K, so that the next tile's
weights are under way while this one is stored. EVICT is L2's policy for what is stored: "evict_last" asks it to keep
that while weights stream past.
"""

import triton
import triton.language as tl
from torch import Tensor

from tma_moe.descriptors import weight_descriptor
from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Product, Sizes, all_rows
from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.routing import HEADER
from tma_moe.support import interpreting
from tma_moe.tiles import Tiles


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["tiles_at"])
def weights_m_up(
    x_ptr,  # [T, H]
    gate_up_desc,  # [E * 2I, H], blocks [COLS, BLOCK_K]
    plan_ptr,  # int32, see routing.py
    h_ptr,  # [T * K, I], by row of the plan
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token])."""
    take_turn(PDL)
    col_tiles: tl.constexpr = (I + COLS - 1) // COLS
    total = tl.load(plan_ptr) * col_tiles
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
        e = tl.load(entry)
        rows = tl.load(entry + 1) + tl.arange(0, ROWS)
        inside = rows < tl.load(entry + 2)
        n = tile % col_tiles * COLS
        slots = tl.load(plan_ptr + HEADER + rows, mask=inside, other=0)
        x_rows = (x_ptr + (slots // TOPK).to(tl.int64) * H)[:, None]
        gate = tl.zeros([COLS, ROWS], tl.float32)
        up = tl.zeros([COLS, ROWS], tl.float32)
        for at in tl.range(0, H, BLOCK_K):
            i = at + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + i[None, :], mask=inside[:, None] & (i < H)[None, :], other=0.0)
            w_gate = gate_up_desc.load([e * 2 * I + n, at])
            w_up = gate_up_desc.load([e * 2 * I + I + n, at])
            gate = tl.dot(w_gate, x.T, gate)
            up = tl.dot(w_up, x.T, up)
        h = silu_times(gate, up).to(h_ptr.dtype.element_ty).T
        cols = n + tl.arange(0, COLS)
        h_at = h_ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]
        tl.store(h_at, h, mask=inside[:, None] & (cols < I)[None, :], eviction_policy=EVICT)


@triton.jit(do_not_specialize=["tiles_at"])
def weights_m_down(
    h_ptr,  # [T * K, I], by row of the plan
    down_desc,  # [E * H, I], blocks [COLS, BLOCK_K]
    plan_ptr,  # int32, see routing.py
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]."""
    take_turn(PDL)
    col_tiles: tl.constexpr = (H + COLS - 1) // COLS
    total = tl.load(plan_ptr + 1) * col_tiles
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
        e = tl.load(entry)
        rows = tl.load(entry + 1) + tl.arange(0, ROWS)
        inside = rows < tl.load(entry + 2)
        n = tile % col_tiles * COLS
        slots = tl.load(plan_ptr + HEADER + rows, mask=inside, other=0)
        h_rows = (h_ptr + rows.to(tl.int64) * I)[:, None]
        acc = tl.zeros([COLS, ROWS], tl.float32)
        for at in tl.range(0, I, BLOCK_K):
            i = at + tl.arange(0, BLOCK_K)
            h = tl.load(h_rows + i[None, :], mask=inside[:, None] & (i < I)[None, :], other=0.0)
            w = down_desc.load([e * H + n, at])
            acc = tl.dot(w, h.T, acc)
        cols = n + tl.arange(0, COLS)
        out_at = rows_ptr + slots.to(tl.int64)[:, None] * H + cols[None, :]
        out = acc.to(rows_ptr.dtype.element_ty).T
        tl.store(out_at, out, mask=inside[:, None] & (cols < H)[None, :], eviction_policy=EVICT)


class Up(Product):
    """The launch of `weights_m_up`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        super().__init__(tiles, sizes, triton.cdiv(sizes.I, tiles.cols))
        self.launch = Launch(weights_m_up, (sizes.H, sizes.I, sizes.K, *_constants(tiles)), tiles.warps, tiles.stages)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        desc = weight_descriptor(experts, "gate_up", all_rows, (self.tiles.cols, self.tiles.block_k))
        self.launch(stream, self.grid(pairs), source, desc, plan, out, tiles_at)


class Down(Product):
    """The launch of `weights_m_down`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        super().__init__(tiles, sizes, triton.cdiv(sizes.H, tiles.cols))
        self.launch = Launch(weights_m_down, (sizes.H, sizes.I, *_constants(tiles)), tiles.warps, tiles.stages)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        desc = weight_descriptor(experts, "down", all_rows, (self.tiles.cols, self.tiles.block_k))
        self.launch(stream, self.grid(pairs), source, desc, plan, out, tiles_at)


def _constants(tiles: Tiles) -> tuple:
    evict = "evict_last" if tiles.keep else ""
    return tiles.rows, tiles.cols, tiles.block_k, tiles.flatten, evict, not interpreting()
