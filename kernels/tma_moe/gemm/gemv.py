"""A few tokens: matrix times vector on the ordinary cores, straight from the weights, without grouping.

With about one token per expert the tensor cores have nothing to reuse, and the work is to read the weights at full
speed: of the 26 us that one token takes in the 30B model, 25 are that. So each program asks for its whole slice of
weights at once, to have many bytes under way. Experts that two tokens share are read twice, the second time mostly from
L2. The down product sums over a token's experts by itself, so two launches do the whole operation and nothing is
grouped.

Programs have 128 or 256 threads and almost no shared memory, so several share a multiprocessor, which is what keeps it
busy while each waits for memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Sizes, require
from tma_moe.gemm.weights_m import silu_times
from tma_moe.launcher import Launch
from tma_moe.pdl import take_turn
from tma_moe.tiles import Tiles


@triton.jit
def gemv_up(
    x_ptr,  # [T, H]
    ids_ptr,  # [T, K]
    gate_up_ptr,  # [E, 2I, H]
    h_ptr,  # [T * K, I], by slot
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[slot, n] = silu(gate[e, n] . x[t]) * (up[e, n] . x[t]) for COLS values of n."""
    take_turn(PDL)
    slot = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    e = tl.load(ids_ptr + slot).to(tl.int64)
    # An id that is no expert has no columns to compute.
    columns = tl.where((e >= 0) & (e < E), I, 0)
    gate_rows = (gate_up_ptr + (e * 2 * I + n) * H)[:, None]
    up_rows = gate_rows + I * H
    gate = tl.zeros([COLS, BLOCK_K], tl.float32)
    up = tl.zeros([COLS, BLOCK_K], tl.float32)
    for at in tl.static_range(0, H, BLOCK_K):
        i = at + tl.arange(0, BLOCK_K)
        read = (n < columns)[:, None] & (i < H)[None, :]
        w_gate = tl.load(gate_rows + i[None, :], mask=read, other=0.0, eviction_policy="evict_first")
        w_up = tl.load(up_rows + i[None, :], mask=read, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + slot // TOPK * H + i, mask=i < H, other=0.0).to(tl.float32)[None, :]
        gate += w_gate.to(tl.float32) * x
        up += w_up.to(tl.float32) * x
    h = silu_times(tl.sum(gate, axis=1), tl.sum(up, axis=1))
    tl.store(h_ptr + slot * I + n, h.to(h_ptr.dtype.element_ty), mask=n < columns)


@triton.jit
def gemv_down(
    h_ptr,  # [T * K, I], by slot
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    down_ptr,  # [E, H, I]
    y_ptr,  # [T, H]
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,  # TOPK, rounded up to a power of two
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t, n] = sum over k of weight[t, k] * (down[e, n] . h[slot]) for COLS values of n."""
    t = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLS + tl.arange(0, COLS)
    slot = tl.arange(0, SLOTS)
    # Read before this kernel's turn: nothing writes weights, and `gemv_up` let this kernel start only after it had
    # waited for whoever wrote the ids (rule 4 of pdl.py).
    e = tl.load(ids_ptr + t * TOPK + slot, mask=slot < TOPK, other=-1).to(tl.int64)
    real = (e >= 0) & (e < E)
    rows = down_ptr + (e[:, None] * H + n[None, :])[:, :, None] * I
    partial = tl.zeros([SLOTS, COLS, BLOCK_K], tl.float32)
    for at in tl.static_range(0, I, BLOCK_K):
        i = at + tl.arange(0, BLOCK_K)
        read = real[:, None, None] & (n < H)[None, :, None] & (i < I)[None, None, :]
        w = tl.load(rows + i[None, None, :], mask=read, other=0.0, eviction_policy="evict_first")
        if at == 0:
            take_turn(PDL)
        h_at = h_ptr + (t * TOPK + slot)[:, None] * I + i[None, :]
        h = tl.load(h_at, mask=real[:, None] & (i < I)[None, :], other=0.0)
        partial += w.to(tl.float32) * h.to(tl.float32)[:, None, :]
    weights = tl.load(weights_ptr + t * TOPK + slot, mask=real, other=0.0).to(tl.float32)
    y = tl.sum(tl.sum(partial, axis=2) * weights[:, None], axis=0)
    tl.store(y_ptr + t * H + n, y.to(y_ptr.dtype.element_ty), mask=n < H)


class Up:
    """The launch of `gemv_up`: each program computes COLS values of n for one slot."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        check(tiles)
        self.columns = triton.cdiv(sizes.I, tiles.cols)
        constants = (sizes.E, sizes.H, sizes.I, sizes.K, tiles.cols, tiles.block_k, sizes.pdl)
        self.launch = Launch(gemv_up, constants, tiles.warps, pdl=sizes.pdl)

    def __call__(self, stream: int, x_TH: Tensor, ids_TK: Tensor, experts: ExpertWeights, h: Tensor) -> None:
        grid = (self.columns, ids_TK.numel(), 1)
        self.launch(stream, grid, x_TH, ids_TK, experts.parameter("gate_up"), h)


class Down:
    """The launch of `gemv_down`: each program computes COLS values of n for one token."""

    def __init__(self, tiles: Tiles, sizes: Sizes):
        check(tiles)
        self.columns = triton.cdiv(sizes.H, tiles.cols)
        slots = triton.next_power_of_2(sizes.K)
        constants = (sizes.E, sizes.H, sizes.I, sizes.K, slots, tiles.cols, tiles.block_k, sizes.pdl)
        self.launch = Launch(gemv_down, constants, tiles.warps, pdl=sizes.pdl)

    def __call__(
        self, stream: int, h: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, y_TH: Tensor
    ) -> None:
        grid = (self.columns, ids_TK.shape[0], 1)
        self.launch(stream, grid, h, ids_TK, weights_TK, experts.parameter("down"), y_TH)


def check(tiles: Tiles, block: int = 1) -> None:
    """Raises ValueError for tiles that no gemv takes, or whose steps are no whole blocks."""
    takes = tiles.rows == 1 and not tiles.keep and tiles.block_k % block == 0
    also = f" (and a block_k that is a multiple of {block})" if block > 1 else ""
    require(takes, tiles, f"one row, and nothing that L2 could keep{also}")
