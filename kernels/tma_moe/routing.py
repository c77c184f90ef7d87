"""Which experts a token goes to, and which rows an expert gets: two small kernels before the matrix products.

The products need the T * K (token, choice) pairs sorted by expert. A pair is named by its slot t * K + k; a row is a
position in the sorted order. `group_by_expert` writes one int32 buffer, the plan:

    plan[0], plan[1]                     row tiles of the up and of the down product
    plan[HEADER + row]                   slot of each row, sorted by expert, ties in token order
    plan[tiles_at + 4 * tile ...]        per row tile: expert, first row, last row + 1 (and one unused word);
                                         one table for up and one for down, whose tiles may differ in height

The grid depends on sizes only, nothing is read back by the host, and the order is the same in every run: each program
adds up what comes before its own pairs, so there are no atomics and no buffer that must be zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tma_moe.support import interpreting

HEADER = tl.constexpr(16)
# Up to so many pairs, grouping is one launch and every program counts them all.
COUNT_ALL_PAIRS = 1024
# Pairs of a program: few, as the work of ranking them grows with the square; more for large calls, as every program
# adds up the counts of all blocks. The second number is where that changes.
BLOCKS = (256, 512)
LARGE_PAIRS = 32768


@triton.jit
def route_topk(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    T,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = (t < T)[:, None] & (e < E)[None, :]
    logits = tl.load(logits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], mask=inside, other=float("-inf"))
    logits = tl.where((t < T)[:, None], logits.to(tl.float32), 0.0)
    probs = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = probs / tl.sum(probs, axis=1)[:, None]
    # Probabilities are not negative, so their bits order as integers; below them, lower ids win ties. NaN sorts first.
    bits = (probs.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    keys = tl.where((e < E)[None, :], (bits << 32) | (0x7FFFFFFF - e)[None, :], -1)
    best_ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    best_probs = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i in range(TOPK):
        best = tl.max(keys, axis=1)
        chosen = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        prob = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        best_ids = tl.where((k == i)[None, :], chosen[:, None], best_ids)
        best_probs = tl.where((k == i)[None, :], prob[:, None], best_probs)
        keys = tl.where(e[None, :] == chosen[:, None], -1, keys)
    weights = best_probs / tl.sum(best_probs, axis=1)[:, None]
    at = t.to(tl.int64)[:, None] * TOPK + k[None, :]
    keep = (t < T)[:, None] & (k < TOPK)[None, :]
    tl.store(ids_ptr + at, best_ids, mask=keep)
    tl.store(weights_ptr + at, weights, mask=keep)


@triton.jit
def _load_ids(ids_ptr, pair, pairs, E: tl.constexpr):
    """Expert ids of some pairs as int32, -1 where there is no pair or the id is no expert."""
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    return tl.where(ids < E, ids, -1)


@triton.jit(do_not_specialize=["pairs"])
def count_by_expert(
    ids_ptr, counts_ptr, pairs, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """counts[block, e]: how many of the BLOCK pairs of a block go to expert e."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0)
    ids = _load_ids(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), pairs, E)
    counts = tl.histogram(ids, BINS, mask=ids >= 0)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _write_tiles(plan_ptr, tiles_at, role, counts, start, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The row tiles of all experts. Program p writes the tiles p, p + programs, ... of each expert."""
    experts = tl.arange(0, BINS)
    tiles = (counts + ROWS - 1) // ROWS
    first = plan_ptr + tiles_at + 4 * (tl.cumsum(tiles, axis=0) - tiles)
    for tile in range(tl.program_id(0), tl.max(tiles, axis=0), tl.num_programs(0)):
        entry = first + 4 * tile
        row = start + tile * ROWS
        tl.store(entry, experts, mask=tile < tiles)
        tl.store(entry + 1, row, mask=tile < tiles)
        tl.store(entry + 2, tl.minimum(row + ROWS, start + counts), mask=tile < tiles)
    if tl.program_id(0) == 0:
        tl.store(plan_ptr + role, tl.sum(tiles, axis=0))


@triton.jit(do_not_specialize=["pairs", "blocks", "up_tiles_at", "down_tiles_at"])
def group_by_expert(
    ids_ptr,
    counts_ptr,
    plan_ptr,
    pairs,
    blocks,
    up_tiles_at,
    down_tiles_at,
    E: tl.constexpr,
    BINS: tl.constexpr,
    UP_ROWS: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    COUNT_ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gives each pair of a block its row: rows of smaller experts, of its expert in earlier blocks and in its block.

    COUNT_ALL: the pairs are so few (at most COUNT_ALL) that each program counts all of them; 0: `count_by_expert` did.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0)
    experts = tl.arange(0, BINS)
    if COUNT_ALL:
        pair = tl.arange(0, COUNT_ALL)
        ids = _load_ids(ids_ptr, pair, pairs, E)
        counts = tl.histogram(ids, BINS, mask=ids >= 0)
        earlier = tl.histogram(ids, BINS, mask=(ids >= 0) & (pair < block * BLOCK))
    else:
        counts = tl.zeros([BINS], tl.int32)
        earlier = tl.zeros([BINS], tl.int32)
        for at in range(0, blocks, 32):
            row = at + tl.arange(0, 32)
            table = tl.load(counts_ptr + row[:, None] * BINS + experts[None, :], mask=(row < blocks)[:, None], other=0)
            counts += tl.sum(table, axis=0)
            earlier += tl.sum(tl.where((row < block)[:, None], table, 0), axis=0)
    start = tl.cumsum(counts, axis=0) - counts
    _write_tiles(plan_ptr, up_tiles_at, 0, counts, start, BINS, UP_ROWS)
    _write_tiles(plan_ptr, down_tiles_at, 1, counts, start, BINS, DOWN_ROWS)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    ids = _load_ids(ids_ptr, pair, pairs, E)
    # Comparing all pairs of a block with each other is cheaper than a scan per expert.
    rank = tl.zeros([BLOCK], tl.int32)
    for at in range(0, BLOCK, 32):
        other = block * BLOCK + at + tl.arange(0, 32)
        same = _load_ids(ids_ptr, other, pairs, E)[None, :] == ids[:, None]
        rank += tl.sum((same & (other[None, :] < pair[:, None])).to(tl.int32), axis=1)
    row = tl.gather(start + earlier, tl.maximum(ids, 0), 0) + rank
    tl.store(plan_ptr + HEADER + row, pair, mask=ids >= 0)


def route_tma(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`route` in one launch; arguments were checked by the caller."""
    T, E = logits_TE.shape
    ids_TK = torch.empty(T, k, dtype=torch.int32, device=logits_TE.device)
    weights_TK = torch.empty(T, k, dtype=torch.float32, device=logits_TE.device)
    if T:
        block_e = triton.next_power_of_2(E)
        block_t = max(1, min(16, 2048 // block_e)) if T > 64 else 1
        on_gpu = not interpreting()
        with torch.cuda.device(logits_TE.device if on_gpu else -1):
            route_topk[(triton.cdiv(T, block_t),)](
                logits_TE.contiguous(),
                ids_TK,
                weights_TK,
                T,
                E,
                k,
                block_e,
                triton.next_power_of_2(k),
                block_t,
                on_gpu,
                num_warps=4,
                **({"launch_pdl": True} if on_gpu else {}),
            )
    return ids_TK, weights_TK
