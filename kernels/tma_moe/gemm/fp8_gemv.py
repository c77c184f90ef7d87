"""FP8, a few tokens: matrix times vector on the ordinary cores, as gemv.py, with what that file says of it.

Activations are rounded to FP8 by every program that reads them, which costs less than a launch would. What is left of
them is multiplied by the scales of both operands beforehand. A step along the contraction is summed at once, over as
much of it as a program can hold: with half the bytes of 16-bit weights arithmetic counts, and accumulators that are
added up in the end take an instruction more for every weight. Hidden values pass between the products in float32.

Without A8 (cards that know no FP8, see portable/) activations stay as they are, and weights are loaded as bytes.
"""

import triton
import triton.language as tl
from torch import Tensor

from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.gemv import check
from tma_moe.gemm.product import Sizes
from tma_moe.gemm.weights_m import silu_times
from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.portable.targets import as_stored
from tma_moe.portable.widen import widened
from tma_moe.quantise import BLOCK, rounded
from tma_moe.tiles import Tiles


@triton.jit
def _weight_scales(scale_ptr, row, i, width, K: tl.constexpr):
    """Scales [rows, columns] of an expert's weights [N, K], whose first is at `scale_ptr`; 0 from a width on."""
    at = row[:, None] // BLOCK * ((K + BLOCK - 1) // BLOCK) + i[None, :] // BLOCK
    return tl.load(scale_ptr + at, mask=(i < width)[None, :] & (row >= 0)[:, None], other=0.0)


@triton.jit
def activations(x, GROUPS: tl.constexpr, A8: tl.constexpr):
    """Values [GROUPS * 128] in float32, with A8 as FP8 rounds them."""
    if A8:
        x = rounded(x.reshape([GROUPS, BLOCK]))
    return x.to(tl.float32)


@triton.jit
def wide_weights(w, A8: tl.constexpr):
    """FP8 values in float32; without A8 they are loaded as bytes."""
    return w.to(tl.float32) if A8 else widened(w, tl.float32)


@triton.jit
def fp8_gemv_up(
    x_ptr,  # [T, H]
    ids_ptr,  # [T, K]
    gate_up_ptr,  # [E, 2I, H] FP8; without A8 as bytes
    scale_ptr,  # [E, A, B]
    h_ptr,  # [T * K, I] float32, by slot
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A8: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[slot, n] = silu(gate[e, n] . x[t]) * (up[e, n] . x[t]) for COLS values of n."""
    take_turn(PDL)
    slot = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    e = tl.load(ids_ptr + slot).to(tl.int64)
    # An id that is no expert has no columns to compute.
    columns = tl.where((e >= 0) & (e < E), I, 0)
    width = tl.where((e >= 0) & (e < E), H, 0)
    gate_rows = (gate_up_ptr + (e * 2 * I + n) * H)[:, None]
    up_rows = gate_rows + I * H
    scales = scale_ptr + e * ((2 * I + BLOCK - 1) // BLOCK) * ((H + BLOCK - 1) // BLOCK)
    # COLS rows share a scale, unless those of `up` begin somewhere within a block.
    first_gate = tl.program_id(0) * COLS + tl.arange(0, 1)
    if I % COLS == 0:
        first_up = first_gate + I
    else:
        first_up = tl.minimum(n, I - 1) + I
    gate = tl.zeros([COLS], tl.float32)
    up = tl.zeros([COLS], tl.float32)
    for at in tl.static_range(0, H, BLOCK_K):
        i = at + tl.arange(0, BLOCK_K)
        read = (n < columns)[:, None] & (i < H)[None, :]
        w_gate = tl.load(gate_rows + i[None, :], mask=read, other=0.0, eviction_policy="evict_first")
        w_up = tl.load(up_rows + i[None, :], mask=read, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + slot // TOPK * H + i, mask=i < H, other=0.0)
        x = activations(x, BLOCK_K // BLOCK, A8).reshape([1, BLOCK_K])
        gate += tl.sum(wide_weights(w_gate, A8) * (x * _weight_scales(scales, first_gate, i, width, H)), axis=1)
        up += tl.sum(wide_weights(w_up, A8) * (x * _weight_scales(scales, first_up, i, width, H)), axis=1)
    h = silu_times(gate, up)
    tl.store(h_ptr + slot * I + n, h, mask=n < columns)


@triton.jit
def fp8_gemv_down(
    h_ptr,  # [T * K, I] float32, by slot
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    down_ptr,  # [E, H, I] FP8; without A8 as bytes
    scale_ptr,  # [E, A, B]
    y_ptr,  # [T, H]
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,  # TOPK, rounded up to a power of two
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    A8: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t, n] = sum over k of weight[t, k] * (down[e, n] . h[slot]) for COLS values of n."""
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    slot = tl.arange(0, SLOTS)
    # Read before this kernel's turn: nothing writes weights, and `fp8_gemv_up` let this kernel start only after it had
    # waited for whoever wrote the ids (rule 4 of pdl.py).
    e = tl.load(ids_ptr + t * TOPK + slot, mask=slot < TOPK, other=-1).to(tl.int64)
    real = (e >= 0) & (e < E)
    rows = down_ptr + (e[:, None] * H + n[None, :])[:, :, None] * I
    # COLS is a power of two of at most 128, so these rows of an expert lie in one block.
    groups: tl.constexpr = (I + BLOCK - 1) // BLOCK
    blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    scales = scale_ptr + (e * blocks + tl.program_id(0) * COLS // BLOCK) * groups
    partial = tl.zeros([SLOTS, COLS], tl.float32)
    for at in tl.static_range(0, I, BLOCK_K):
        i = at + tl.arange(0, BLOCK_K)
        read = real[:, None, None] & (n < H)[None, :, None] & (i < I)[None, None, :]
        w = tl.load(rows + i[None, None, :], mask=read, other=0.0, eviction_policy="evict_first")
        inside = real[:, None] & (i < I)[None, :]
        scale = tl.load(scales[:, None] + i[None, :] // BLOCK, mask=inside, other=0.0)
        if at == 0:
            take_turn(PDL)
        h = tl.load(h_ptr + (t * TOPK + slot)[:, None] * I + i[None, :], mask=inside, other=0.0)
        h = activations(h, SLOTS * BLOCK_K // BLOCK, A8).reshape([SLOTS, BLOCK_K])
        partial += tl.sum(wide_weights(w, A8) * (h * scale)[:, None, :], axis=2)
    weights = tl.load(weights_ptr + t * TOPK + slot, mask=real, other=0.0).to(tl.float32)
    y = tl.sum(partial * weights[:, None], axis=0)
    tl.store(y_ptr + t * H + n, y.to(y_ptr.dtype.element_ty), mask=n < H)


class Up:
    """The launch of `fp8_gemv_up`: each program computes COLS values of n for one slot."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        check(tiles, BLOCK.value)
        self.a8 = sizes.a8
        self.columns = triton.cdiv(sizes.I, tiles.cols)
        constants = (sizes.E, sizes.H, sizes.I, sizes.K, tiles.cols, tiles.block_k, sizes.a8, sizes.pdl)
        self.launch = Launch(fp8_gemv_up, constants, tiles.warps, pdl=sizes.pdl)

    def __call__(self, stream: int, x_TH: Tensor, ids_TK: Tensor, experts: ExpertWeights, h: Tensor) -> None:
        grid = (self.columns, ids_TK.numel(), 1)
        weights = as_stored(experts.parameter("gate_up"), self.a8), experts.parameter("gate_up_scale")
        self.launch(stream, grid, x_TH, ids_TK, *weights, h)


class Down:
    """The launch of `fp8_gemv_down`: each program computes COLS values of n for one token."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        check(tiles, BLOCK.value)
        self.a8 = sizes.a8
        self.columns = triton.cdiv(sizes.H, tiles.cols)
        slots = triton.next_power_of_2(sizes.K)
        constants = (sizes.E, sizes.H, sizes.I, sizes.K, slots, tiles.cols, tiles.block_k, sizes.a8, sizes.pdl)
        self.launch = Launch(fp8_gemv_down, constants, tiles.warps, pdl=sizes.pdl)

    def __call__(
        self, stream: int, h: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, y_TH: Tensor
    ) -> None:
        grid = (self.columns, ids_TK.shape[0], 1)
        weights = as_stored(experts.parameter("down"), self.a8), experts.parameter("down_scale")
        self.launch(stream, grid, h, ids_TK, weights_TK, *weights, y_TH)
