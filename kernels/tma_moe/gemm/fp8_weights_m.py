"""FP8, weights as the M operand, in plain Triton: weights_m.py for few rows per expert, and for all odd sizes.

A step along the contraction is one group of 128 channels. Its tokens are rounded to FP8 on the way from memory to the
tensor cores, by every program that reads them: few as they are, that costs less than a launch, and needs no scales in
memory. The products of the step are then multiplied by the scales of both operands and added up in float32: Hopper's
tensor cores keep some 14 bits of what they add up themselves in FP8, too few for a long sum.

Hidden values pass between the two products in float32. EVICT is L2's policy for what is stored, as in weights_m.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from tma_moe.descriptors import weight_descriptor
from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Product, Sizes, all_rows, require
from tma_moe.gemm.weights_m import silu_times
from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.quantise import BLOCK, quantised
from tma_moe.routing import HEADER
from tma_moe.support import interpreting
from tma_moe.tiles import Tiles


@triton.jit
def _weight_scales(
    scale_ptr, first, group, COLS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr
):
    """Scales of COLS rows from `first` on, of an expert's weights [N, K]; a single one if they lie in one block."""
    groups: tl.constexpr = (K + BLOCK - 1) // BLOCK
    if ALIGNED:
        rows = first + tl.arange(0, 1)
    else:
        rows = first + tl.arange(0, COLS)
    return tl.load(scale_ptr + rows // BLOCK * groups + group, mask=rows < N, other=0.0)[:, None]


@triton.jit(do_not_specialize=["tiles_at"])
def fp8_weights_m_up(
    x_ptr,  # [T, H]
    gate_up_desc,  # FP8 [E * 2I, H], blocks [COLS, 128]
    scale_ptr,  # [E, A, B]
    plan_ptr,  # int32, see routing.py
    h_ptr,  # [T * K, I] float32, by row of the plan
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token])."""
    take_turn(PDL)
    col_tiles: tl.constexpr = (I + COLS - 1) // COLS
    total = tl.load(plan_ptr) * col_tiles
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
        e = tl.load(entry)
        rows = tl.load(entry + 1) + tl.arange(0, ROWS)
        inside = rows < tl.load(entry + 2)
        n = tile % col_tiles * COLS
        slots = tl.load(plan_ptr + HEADER + rows, mask=inside, other=0)
        x_rows = (x_ptr + (slots // TOPK).to(tl.int64) * H)[:, None]
        scales = scale_ptr + e * ((2 * I + BLOCK - 1) // BLOCK) * ((H + BLOCK - 1) // BLOCK)
        gate = tl.zeros([COLS, ROWS], tl.float32)
        up = tl.zeros([COLS, ROWS], tl.float32)
        for at in tl.range(0, H, BLOCK):
            i = at + tl.arange(0, BLOCK)
            x = tl.load(x_rows + i[None, :], mask=inside[:, None] & (i < H)[None, :], other=0.0)
            x8, x_scale = quantised(x)
            w_gate = gate_up_desc.load([e * 2 * I + n, at])
            w_up = gate_up_desc.load([e * 2 * I + I + n, at])
            gate_scale = _weight_scales(scales, n, at // BLOCK, COLS, 2 * I, H, True)
            up_scale = _weight_scales(scales, I + n, at // BLOCK, COLS, 2 * I, H, I % COLS == 0)
            gate += tl.dot(w_gate, x8.T) * (gate_scale * x_scale[None, :])
            up += tl.dot(w_up, x8.T) * (up_scale * x_scale[None, :])
        h = silu_times(gate, up).T
        cols = n + tl.arange(0, COLS)
        h_at = h_ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]
        tl.store(h_at, h, mask=inside[:, None] & (cols < I)[None, :], eviction_policy=EVICT)


@triton.jit(do_not_specialize=["tiles_at"])
def fp8_weights_m_down(
    h_ptr,  # [T * K, I] float32, by row of the plan
    down_desc,  # FP8 [E * H, I], blocks [COLS, 128]
    scale_ptr,  # [E, A, B]
    plan_ptr,  # int32, see routing.py
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]."""
    take_turn(PDL)
    col_tiles: tl.constexpr = (H + COLS - 1) // COLS
    total = tl.load(plan_ptr + 1) * col_tiles
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
        e = tl.load(entry)
        rows = tl.load(entry + 1) + tl.arange(0, ROWS)
        inside = rows < tl.load(entry + 2)
        n = tile % col_tiles * COLS
        slots = tl.load(plan_ptr + HEADER + rows, mask=inside, other=0)
        h_rows = (h_ptr + rows.to(tl.int64) * I)[:, None]
        scales = scale_ptr + e * ((H + BLOCK - 1) // BLOCK) * ((I + BLOCK - 1) // BLOCK)
        acc = tl.zeros([COLS, ROWS], tl.float32)
        for at in tl.range(0, I, BLOCK):
            i = at + tl.arange(0, BLOCK)
            h = tl.load(h_rows + i[None, :], mask=inside[:, None] & (i < I)[None, :], other=0.0)
            h8, h_scale = quantised(h)
            w = down_desc.load([e * H + n, at])
            w_scale = _weight_scales(scales, n, at // BLOCK, COLS, H, I, True)
            acc += tl.dot(w, h8.T) * (w_scale * h_scale[None, :])
        cols = n + tl.arange(0, COLS)
        out_at = rows_ptr + slots.to(tl.int64)[:, None] * H + cols[None, :]
        out = acc.to(rows_ptr.dtype.element_ty).T
        tl.store(out_at, out, mask=inside[:, None] & (cols < H)[None, :], eviction_policy=EVICT)


class Up(Product):
    """The launch of `fp8_weights_m_up`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles)
        super().__init__(tiles, sizes, triton.cdiv(sizes.I, tiles.cols))
        constants = (sizes.H, sizes.I, sizes.K, *_constants(tiles))
        self.launch = Launch(fp8_weights_m_up, constants, tiles.warps, tiles.stages)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        desc = weight_descriptor(experts, "gate_up", all_rows, (self.tiles.cols, self.tiles.block_k))
        scale = experts.parameter("gate_up_scale")
        self.launch(stream, self.grid(pairs), source, desc, scale, plan, out, tiles_at)


class Down(Product):
    """The launch of `fp8_weights_m_down`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles)
        super().__init__(tiles, sizes, triton.cdiv(sizes.H, tiles.cols))
        self.launch = Launch(fp8_weights_m_down, (sizes.H, sizes.I, *_constants(tiles)), tiles.warps, tiles.stages)

    def __call__(
        self, stream: int, pairs: int, source: Tensor, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int
    ) -> None:
        desc = weight_descriptor(experts, "down", all_rows, (self.tiles.cols, self.tiles.block_k))
        scale = experts.parameter("down_scale")
        self.launch(stream, self.grid(pairs), source, desc, scale, plan, out, tiles_at)


def _constants(tiles: Tiles) -> tuple:
    return tiles.rows, tiles.cols, "evict_last" if tiles.keep else "", not interpreting()


def _check(tiles: Tiles) -> None:
    takes = tiles.block_k == BLOCK.value and tiles.cols <= BLOCK.value and not tiles.flatten
    require(takes, tiles, "a block_k of 128, at most 128 columns, and no flatten")
