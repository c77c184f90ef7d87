"""Which experts a token goes to, and which rows an expert gets: two small kernels before the matrix products.

The products need the T * K (token, choice) pairs sorted by expert. A pair is named by its slot t * K + k; a row is a
position in the sorted order. `group_by_expert` writes one int32 buffer, the plan:

    plan[0], plan[1]                     row tiles of the up and of the down product
    plan[HEADER + row]                   slot of each row, sorted by expert, ties in token order
    plan[tiles_at + 4 * tile ...]        per row tile: expert, first row, last row + 1 (and one unused word);
                                         one table for up and one for down, whose tiles may differ in height

The grid depends on sizes only, nothing is read back by the host, and the order is the same in every run: each program
counts for one expert what comes before, so there are no atomics and no buffer that must be zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tma_moe.support import interpreting

HEADER = tl.constexpr(16)
# Pairs that one pass of a program covers. Up to so many pairs, grouping is one launch.
GROUP_BLOCK = 1024
# Pairs that one program may have to look through before the list of an expert is split over several programs.
SPLIT_PAIRS = 8192
MAX_SPLITS = 16


def splits_for(pairs: int) -> int:
    """Over how many programs (a power of two) the pairs are split for each expert."""
    return min(MAX_SPLITS, triton.next_power_of_2(triton.cdiv(pairs, SPLIT_PAIRS)))


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


@triton.jit(do_not_specialize=["pairs", "pairs_per_split"])
def count_by_expert(
    ids_ptr, counts_ptr, pairs, pairs_per_split, BINS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """counts[split, e]: the pairs of expert e in each split of the pairs. One program per expert and split."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.program_id(0)
    split = tl.program_id(1)
    first = split * pairs_per_split
    last = tl.minimum(first + pairs_per_split, pairs)
    mine = tl.zeros([BLOCK], tl.int32)
    for at in range(first, last, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        mine += (tl.load(ids_ptr + pair, mask=pair < last, other=-1).to(tl.int32) == e).to(tl.int32)
    tl.store(counts_ptr + split * BINS + e, tl.sum(mine))


@triton.jit
def _write_tiles(plan_ptr, tiles_at, role, counts, e, start, count, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The row tiles of expert e, after those of the experts before it; expert 0 also writes the number of all."""
    tiles = (counts + ROWS - 1) // ROWS
    before = tl.sum(tl.where(tl.arange(0, BINS) < e, tiles, 0))
    mine = (count + ROWS - 1) // ROWS
    for at in range(0, mine, 32):
        tile = at + tl.arange(0, 32)
        entry = plan_ptr + tiles_at + 4 * (before + tile)
        row = start + tile * ROWS
        tl.store(entry, tl.zeros_like(tile) + e, mask=tile < mine)
        tl.store(entry + 1, row, mask=tile < mine)
        tl.store(entry + 2, tl.minimum(row + ROWS, start + count), mask=tile < mine)
    if e == 0:
        tl.store(plan_ptr + role, tl.sum(tiles))


@triton.jit(do_not_specialize=["pairs", "pairs_per_split", "up_tiles_at", "down_tiles_at"])
def group_by_expert(
    ids_ptr,
    counts_ptr,
    plan_ptr,
    pairs,
    pairs_per_split,
    up_tiles_at,
    down_tiles_at,
    E: tl.constexpr,
    BINS: tl.constexpr,
    UP_ROWS: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (e, split) writes the rows of expert e that lie in its split of the pairs; see the module's docstring.

    The counts of all experts come from `count_by_expert`, or, if not COUNTED, each program makes them from the at most
    BLOCK pairs that there are.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.program_id(0)
    split = tl.program_id(1)
    experts = tl.arange(0, BINS)
    earlier = 0
    if COUNTED:
        splits = tl.arange(0, SPLITS)
        table = tl.load(counts_ptr + splits[:, None] * BINS + experts[None, :], mask=(experts < E)[None, :], other=0)
        counts = tl.sum(table, axis=0)
        earlier = tl.sum(tl.where((splits < split)[:, None] & (experts == e)[None, :], table, 0))
    else:
        pair = tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
        counts = tl.histogram(ids, BINS, mask=(ids >= 0) & (ids < E))
    start = tl.sum(tl.where(experts < e, counts, 0))
    count = tl.sum(tl.where(experts == e, counts, 0))
    if split == 0:
        _write_tiles(plan_ptr, up_tiles_at, 0, counts, e, start, count, BINS, UP_ROWS)
        _write_tiles(plan_ptr, down_tiles_at, 1, counts, e, start, count, BINS, DOWN_ROWS)
    if count > 0:
        row = start + earlier
        first = split * pairs_per_split
        last = tl.minimum(first + pairs_per_split, pairs)
        for at in range(first, last, BLOCK):
            pair = at + tl.arange(0, BLOCK)
            mine = tl.load(ids_ptr + pair, mask=pair < last, other=-1).to(tl.int32) == e
            rank = tl.cumsum(mine.to(tl.int32), axis=0)
            tl.store(plan_ptr + HEADER + row + rank - 1, pair, mask=mine)
            row += tl.sum(mine.to(tl.int32))


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
