"""Small loads: the two products with weights as the M operand and tokens as the N operand ("swapped").

A warpgroup MMA has at least 64 rows on its M side but takes 16 columns on its N side. With a few tokens per expert the
64 rows must therefore be weights, which there are plenty of, or the tensor cores run mostly on padding. Weights arrive
by TMA; tokens are gathered through the plan (see routing.py) with ordinary asynchronous copies.

Both kernels loop over output tiles: with a grid as large as the number of tiles the loop runs once, with a grid as
large as the machine it makes the kernel persistent, and FLATTEN fuses it with the loop over K, so that the next tile's
weights are under way while this one is stored.
"""

import triton
import triton.language as tl

from tma_moe.pdl import take_turn
from tma_moe.routing import HEADER


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["tiles_at"])
def swap_up(
    x_ptr,  # [T, H]
    gate_up_desc,  # [E * 2I, H], blocks [COLS, BLOCK_K]
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
def swap_down(
    h_ptr,  # [T * K, I], by row of the plan
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
