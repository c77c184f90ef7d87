"""Large loads: the two products as persistent grouped GEMMs with tokens as the M operand.

One program per multiprocessor walks over the output tiles; the tile loop is flattened into the loop over K, so the
copies of the next tile run under the epilogue of this one. All columns of a row tile follow each other: programs that
run together share its tokens, and an expert's weights stay in L2.
"""

import triton
import triton.language as tl

from tma_moe.pdl import take_turn
from tma_moe.routing import HEADER
from tma_moe.swap_gemm import silu_times


@triton.jit(do_not_specialize=["tiles_at"])
def grouped_up(
    x_ptr,  # [T, H]
    gate_up_desc,  # [E, 2, I, H], blocks [1, 2, COLS, BLOCK_K]
    plan_ptr,
    h_ptr,  # [T * K, I], by row of the plan
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token]).

    One 4-D block brings COLS gate rows and the COLS up rows that belong to them, so that a single MMA stream computes
    both and the activation finds the two halves of a value in one thread.
    """
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
        acc = tl.zeros([ROWS, 2 * COLS], tl.float32)
        for at in tl.range(0, H, BLOCK_K):
            i = at + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + i[None, :], mask=inside[:, None] & (i < H)[None, :], other=0.0)
            w = gate_up_desc.load([e, 0, n, at]).reshape(2 * COLS, BLOCK_K)
            acc = tl.dot(x, w.T, acc)
        gate, up = acc.reshape(ROWS, 2, COLS).permute(0, 2, 1).split()
        cols = n + tl.arange(0, COLS)
        h_at = h_ptr + rows.to(tl.int64)[:, None] * I + cols[None, :]
        h = silu_times(gate, up).to(h_ptr.dtype.element_ty)
        tl.store(h_at, h, mask=inside[:, None] & (cols < I)[None, :])


@triton.jit(do_not_specialize=["tiles_at"])
def grouped_down(
    h_desc,  # [T * K, I], by row of the plan, blocks [ROWS, BLOCK_K]
    down_desc,  # [E * H, I], blocks [COLS, BLOCK_K]
    plan_ptr,
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]. Tiles may run into the next expert's rows; only the store is masked."""
    take_turn(PDL)
    col_tiles: tl.constexpr = (H + COLS - 1) // COLS
    total = tl.load(plan_ptr + 1) * col_tiles
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        entry = plan_ptr + tiles_at + 4 * (tile // col_tiles)
        e = tl.load(entry)
        first = tl.load(entry + 1)
        rows = first + tl.arange(0, ROWS)
        inside = rows < tl.load(entry + 2)
        n = tile % col_tiles * COLS
        slots = tl.load(plan_ptr + HEADER + rows, mask=inside, other=0)
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for at in tl.range(0, I, BLOCK_K):
            h = h_desc.load([first, at])
            w = down_desc.load([e * H + n, at])
            acc = tl.dot(h, w.T, acc)
        cols = n + tl.arange(0, COLS)
        out_at = rows_ptr + slots.to(tl.int64)[:, None] * H + cols[None, :]
        tl.store(out_at, acc.to(rows_ptr.dtype.element_ty), mask=inside[:, None] & (cols < H)[None, :])
