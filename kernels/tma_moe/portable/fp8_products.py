"""The products of FP8 weights on any card: products.py, a step along K being one block of 128 channels.

The tensor core sums a step by itself; its sum, times the scales of the block, is added up in float32.

With A8 (cards that multiply FP8) x comes quantised, and the up product quantises h where it has 128 channels of it, so
its tile has as many columns. Else activations and h are of 16 bits, and weights are widened on the way (widen.py).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tma_moe import block_fp8
from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Product, Sizes, require
from tma_moe.gemm.weights_m import silu_times
from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.portable.products import check, gate_and_up, gate_and_up_rows, load_step
from tma_moe.portable.targets import as_stored
from tma_moe.portable.widen import widened
from tma_moe.quantise import BLOCK, quantised
from tma_moe.routing import HEADER
from tma_moe.tiles import Tiles


@triton.jit
def _product(x, w, A8: tl.constexpr, WEIGHTS_M: tl.constexpr):
    """One step's sums: [N, ROWS] of w [N, BLOCK] and x [ROWS, BLOCK] with WEIGHTS_M, else [ROWS, N]."""
    if not A8:
        w = widened(w, x.dtype)
    return tl.dot(w, x.T) if WEIGHTS_M else tl.dot(x, w.T)


@triton.jit
def _scaled(part, of_rows, of_columns, A8: tl.constexpr, WEIGHTS_M: tl.constexpr):
    """The sums times the scales of rows [ROWS] and of weight rows [N] (or of all of them: [1])."""
    if A8:
        part = part * (of_rows[None, :] if WEIGHTS_M else of_rows[:, None])
    return part * (of_columns[:, None] if WEIGHTS_M else of_columns[None, :])


@triton.jit(do_not_specialize=["tiles_at"])
def fp8_portable_up(
    x_ptr,  # [T, H], FP8 with A8
    x_scale_ptr,  # with A8: [T, B]
    gate_up_ptr,  # [E, 2I, H] FP8; without A8 as bytes
    scale_ptr,  # [E, A, B]
    plan_ptr,  # int32, see routing.py
    h_ptr,  # [T * K, I], by row of the plan; FP8 with A8
    h_scale_ptr,  # with A8: [T * K, ceil(I / 128)]
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    A8: tl.constexpr,
    WEIGHTS_M: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token])."""
    take_turn(PDL)
    groups: tl.constexpr = (H + BLOCK - 1) // BLOCK
    col_tiles: tl.constexpr = (I + COLS - 1) // COLS
    tile = tl.program_id(0)
    if tile >= tl.load(plan_ptr) * col_tiles:
        return
    entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
    e, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    n = tile % col_tiles * COLS
    rows = first + tl.arange(0, ROWS)
    tokens = (tl.load(plan_ptr + HEADER + tl.minimum(rows, end - 1)) // TOPK).to(tl.int64)
    x_rows = x_ptr + tokens[:, None] * H
    w_row = gate_and_up_rows(n, I, COLS)
    w_rows = gate_up_ptr + (e.to(tl.int64) * 2 * I + w_row)[:, None] * H
    scales = scale_ptr + e * ((2 * I + BLOCK - 1) // BLOCK) * groups
    is_up = tl.arange(0, 2 * COLS) >= COLS
    if WEIGHTS_M:
        acc = tl.zeros([2 * COLS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, 2 * COLS], tl.float32)
    for group in tl.range(0, groups):
        x = load_step(x_rows, group * BLOCK, BLOCK, H)
        w = load_step(w_rows, group * BLOCK, BLOCK, H)
        if I % COLS == 0:  # all rows of gate lie in one block, and all of up
            of_gate = tl.load(scales + n // BLOCK * groups + group)
            of_up = tl.load(scales + (I + n) // BLOCK * groups + group)
            of_columns = tl.where(is_up, of_up, of_gate)
        else:
            of_columns = tl.load(scales + w_row // BLOCK * groups + group)
        of_rows = of_columns
        if A8:
            of_rows = tl.load(x_scale_ptr + tokens * groups + group)
        acc += _scaled(_product(x, w, A8, WEIGHTS_M), of_rows, of_columns, A8, WEIGHTS_M)
    gate, up = gate_and_up(acc, ROWS, COLS, WEIGHTS_M)
    h = silu_times(gate, up)
    cols = n + tl.arange(0, COLS)
    inside = (rows < end)[:, None] & (cols < I)[None, :]
    h_at = h_ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]
    if A8:
        h = tl.where((cols < I)[None, :], h, 0.0)
        h8, h_scale = quantised(h)
        tl.store(h_at, h8, mask=inside, eviction_policy=EVICT)
        scale_at = h_scale_ptr + rows.to(tl.int64) * ((I + BLOCK - 1) // BLOCK) + n // BLOCK
        tl.store(scale_at, h_scale, mask=rows < end, eviction_policy=EVICT)
    else:
        tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICT)


@triton.jit(do_not_specialize=["tiles_at"])
def fp8_portable_down(
    h_ptr,  # [T * K, I], by row of the plan; FP8 with A8
    h_scale_ptr,  # with A8: [T * K, ceil(I / 128)]
    down_ptr,  # [E, H, I] FP8; without A8 as bytes
    scale_ptr,  # [E, A, B]
    plan_ptr,  # int32, see routing.py
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,  # pairs per tile
    COLS: tl.constexpr,  # output channels per tile
    A8: tl.constexpr,
    WEIGHTS_M: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]."""
    take_turn(PDL)
    groups: tl.constexpr = (I + BLOCK - 1) // BLOCK
    col_tiles: tl.constexpr = (H + COLS - 1) // COLS
    tile = tl.program_id(0)
    if tile >= tl.load(plan_ptr + 1) * col_tiles:
        return
    entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
    e, first, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    n = tile % col_tiles * COLS
    cols = n + tl.arange(0, COLS)
    rows = first + tl.arange(0, ROWS)
    clamped = tl.minimum(rows, end - 1)
    h_rows = h_ptr + clamped.to(tl.int64)[:, None] * I
    w_rows = down_ptr + (e.to(tl.int64) * H + tl.minimum(cols, H - 1))[:, None] * I
    scales = scale_ptr + (e * ((H + BLOCK - 1) // BLOCK) + n // BLOCK) * groups  # COLS of at most 128 share a block
    if WEIGHTS_M:
        acc = tl.zeros([COLS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, COLS], tl.float32)
    for group in tl.range(0, groups):
        h = load_step(h_rows, group * BLOCK, BLOCK, I)
        w = load_step(w_rows, group * BLOCK, BLOCK, I)
        of_columns = tl.load(scales + group + tl.arange(0, 1))
        of_rows = of_columns
        if A8:
            of_rows = tl.load(h_scale_ptr + clamped.to(tl.int64) * groups + group)
        acc += _scaled(_product(h, w, A8, WEIGHTS_M), of_rows, of_columns, A8, WEIGHTS_M)
    out = acc.T if WEIGHTS_M else acc
    slots = tl.load(plan_ptr + HEADER + clamped)
    inside = (rows < end)[:, None] & (cols < H)[None, :]
    out_at = rows_ptr + slots.to(tl.int64)[:, None] * H + cols[None, :]
    tl.store(out_at, out.to(rows_ptr.dtype.element_ty), mask=inside, eviction_policy=EVICT)


class _Fp8Product(Product):
    def __init__(self, tiles: Tiles, sizes: Sizes, columns: int, kernel: Any, constants: tuple):
        check(tiles)
        require(tiles.block_k == block_fp8.BLOCK and tiles.cols <= block_fp8.BLOCK, tiles, "a block_k of 128, and at "
                "most 128 columns")  # fmt: skip
        super().__init__(tiles, sizes, columns)
        self.quantised = sizes.a8
        evict = "evict_last" if tiles.keep else ""
        constants += tiles.rows, tiles.cols, sizes.a8, tiles.weights_m, evict, sizes.pdl
        self.launch = Launch(kernel, constants, tiles.warps, tiles.stages, sizes.pdl)


class Up(_Fp8Product):
    """The launch of `fp8_portable_up`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        require(not sizes.a8 or tiles.cols == block_fp8.BLOCK, tiles, "128 columns where it quantises h")
        constants = sizes.H, sizes.I, sizes.K
        super().__init__(tiles, sizes, triton.cdiv(sizes.I, tiles.cols), fp8_portable_up, constants)

    def __call__(
        self, stream: int, pairs: int, source: Any, experts: ExpertWeights, plan: Tensor, out: Any, tiles_at: int
    ) -> None:
        scale = experts.parameter("gate_up_scale")
        # Without A8 there are no scales of activations; a kernel wants an address all the same.
        (x, x_scale), (h, h_scale) = (each if self.quantised else (each, scale) for each in (source, out))
        weights = as_stored(experts.parameter("gate_up"), self.quantised)
        self.launch(stream, self.grid(pairs), x, x_scale, weights, scale, plan, h, h_scale, tiles_at)


class Down(_Fp8Product):
    """The launch of `fp8_portable_down`."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        super().__init__(tiles, sizes, triton.cdiv(sizes.H, tiles.cols), fp8_portable_down, (sizes.H, sizes.I))

    def __call__(
        self, stream: int, pairs: int, source: Any, experts: ExpertWeights, plan: Tensor, out: Any, tiles_at: int
    ) -> None:
        scale = experts.parameter("down_scale")
        h, h_scale = source if self.quantised else (source, scale)
        weights = as_stored(experts.parameter("down"), self.quantised)
        self.launch(stream, self.grid(pairs), h, h_scale, weights, scale, plan, out, tiles_at)
