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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tma_moe.routing import HEADER

AHEAD = tl.constexpr(256)  # values of each row of weights
FIRST_PROGRAMS = tl.constexpr(400)  # about as many as run at once


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def prefetch_rows(weights_ptr, rows, K: tl.constexpr):
    """Asks L2 for the first AHEAD values of some rows [N, K] of weights, while the kernel before still runs."""
    first = tl.minimum(tl.arange(0, AHEAD // 64) * 64, K - 1)  # a line of L2 is 64 values
    at = weights_ptr + rows.to(tl.int64)[:, None] * K + first[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["tiles_at"])
def swap_up(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2I, H]
    gate_up_desc,  # the same as [E * 2I, H], blocks [COLS, BLOCK_K]
    plan_ptr,
    h_ptr,  # [T * K, I], by row of the plan
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOPK: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token])."""
    col_tiles: tl.constexpr = (I + COLS - 1) // COLS
    if PDL:
        gdc_launch_dependents()
        # Experts are not grouped yet. With some pairs for each, tiles of the first programs are most likely these.
        e = tl.program_id(0) // col_tiles
        if (tl.program_id(0) < FIRST_PROGRAMS) & (e < E) & (tiles_at >= HEADER + 4 * E):
            n = tl.minimum(tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS), I - 1)
            prefetch_rows(gate_up_ptr, e * 2 * I + n, H)
            prefetch_rows(gate_up_ptr, e * 2 * I + I + n, H)
        gdc_wait()
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
        tl.store(h_at, h, mask=inside[:, None] & (cols < I)[None, :])


@triton.jit(do_not_specialize=["tiles_at"])
def swap_down(
    h_ptr,  # [T * K, I], by row of the plan
    down_ptr,  # [E, H, I]
    down_desc,  # the same as [E * H, I], blocks [COLS, BLOCK_K]
    plan_ptr,
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """rows[slot, n] = down[e, n] . h[row]."""
    col_tiles: tl.constexpr = (H + COLS - 1) // COLS
    if PDL:
        gdc_launch_dependents()
        if tl.program_id(0) < FIRST_PROGRAMS:
            # The plan is there once programs of the up product have ended; were it not, this were a wrong guess.
            e = tl.load(plan_ptr + tiles_at + 4 * (tl.program_id(0) // col_tiles))
            n = tl.minimum(tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS), H - 1)
            prefetch_rows(down_ptr, tl.minimum(tl.maximum(e, 0), E - 1) * H + n, I)
        gdc_wait()
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
        tl.store(out_at, acc.to(rows_ptr.dtype.element_ty).T, mask=inside[:, None] & (cols < H)[None, :])
