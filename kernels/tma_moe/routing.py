"""Which experts a token goes to, and which rows an expert gets: small kernels before the matrix products.

The products need the T * K (token, choice) pairs sorted by expert. A pair is named by its slot t * K + k; a row is a
position in the sorted order. Grouping writes one int32 buffer, the plan:

    plan[0], plan[1]                     row tiles of the up and of the down product
    plan[HEADER + row]                   slot of each row, sorted by expert, ties in token order
    plan[tiles_at + 4 * tile ...]        per row tile: expert, first row, last row + 1, and 8 * m + n: it is number m of
                                         n <= 4 neighbours of one expert, which a kernel may take together, column by
                                         column. One table for up and one for down, whose tiles may differ in height

Grids depend on sizes only, nothing is read back by the host, and the order is the same in every run: rows follow from
counts of what comes before, so there are no atomics and no buffer that must be zero.
"""

import functools
import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tma_moe.launcher import Launch, current_stream, device_guard
from tma_moe.pdl import take_turn
from tma_moe.support import has_pdl

HEADER = tl.constexpr(16)  # words: two are used, and the slots behind them begin at a multiple of 64 bytes
FEW_BLOCKS = (256, 2048, 4096)  # sizes of a block that holds all pairs of a call, which is then grouped in one launch
MANY_BLOCKS = 128  # of more pairs: the most blocks that they are cut into
SUB = 64  # pairs that are compared with each other at a time
CHUNK = 32  # blocks whose counts a program adds up at a time


@triton.jit(do_not_specialize=["T"])
def route_topk(
    logits_ptr,  # [T, E]
    skip_ptr,  # [T] uint8, not 0: to no expert; read with SKIPS
    ids_ptr,  # [T, K] int32
    weights_ptr,  # [T, K] fp32
    T,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SKIPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The TOPK most likely experts of BLOCK_T tokens, by falling probability, and their renormalised weights."""
    take_turn(PDL)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_TOPK)
    inside = (t < T)[:, None] & (e < E)[None, :]
    logits = tl.load(logits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], mask=inside, other=float("-inf"))
    logits = tl.where((t < T)[:, None], logits.to(tl.float32), 0.0)
    probs = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    probs = probs / tl.sum(probs, axis=1)[:, None]
    # Probabilities are not negative, so their bits order as integers; below them, lower ids win ties. NaN sorts first.
    bits = (probs.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    keys = tl.where((e < E)[None, :], (bits << 32) | (0x7FFFFFFF - e)[None, :], -1)
    best_ids = tl.zeros([BLOCK_T, BLOCK_TOPK], tl.int32)
    best_probs = tl.zeros([BLOCK_T, BLOCK_TOPK], tl.float32)
    for i in range(TOPK):
        best = tl.max(keys, axis=1)
        chosen = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        prob = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        best_ids = tl.where((k == i)[None, :], chosen[:, None], best_ids)
        best_probs = tl.where((k == i)[None, :], prob[:, None], best_probs)
        keys = tl.where(e[None, :] == chosen[:, None], -1, keys)
    weights = best_probs / tl.sum(best_probs, axis=1)[:, None]
    if SKIPS:
        skip = tl.load(skip_ptr + t, mask=t < T, other=0) != 0
        best_ids = tl.where(skip[:, None], -1, best_ids)
    at = t.to(tl.int64)[:, None] * TOPK + k[None, :]
    keep = (t < T)[:, None] & (k < TOPK)[None, :]
    tl.store(ids_ptr + at, best_ids, mask=keep)
    tl.store(weights_ptr + at, weights, mask=keep)


@triton.jit
def _load_ids(ids_ptr, pair, pairs, E: tl.constexpr):
    """Expert ids of some pairs as int32, negative where there is no pair or the id is no expert."""
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    return tl.where(ids < E, ids, -1)


@triton.jit
def _write_tiles(plan_ptr, tiles_at, role, counts, start, BINS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """The row tiles of all experts, expert by expert, and how many there are in all (role: 0 up, 1 down).

    counts and start are [BINS]: how many rows each expert has, and its first.

    An expert gets as few tiles of at most ROWS rows as can be, all of one height, a multiple of STEP, but the last.
    """
    experts = tl.arange(0, BINS)[:, None]
    tiles = (counts + ROWS - 1) // ROWS
    most = tl.maximum(tiles, 1)
    height = (((counts + most - 1) // most + STEP - 1) // STEP * STEP)[:, None]
    first = (tl.cumsum(tiles, axis=0) - tiles)[:, None]
    for at in range(0, tl.max(tiles, axis=0), 8):
        tile = at + tl.arange(0, 8)[None, :]
        entry = plan_ptr + tiles_at + 4 * (first + tile)
        row = start[:, None] + tile * height
        mine = tile < tiles[:, None]
        tl.store(entry, experts + tl.zeros_like(row), mask=mine)
        tl.store(entry + 1, row, mask=mine)
        tl.store(entry + 2, tl.minimum(row + height, (start + counts)[:, None]), mask=mine)
        number = tile % 4
        tl.store(entry + 3, 8 * number + tl.minimum(tiles[:, None] - tile + number, 4), mask=mine)
    total = tl.sum(tiles, axis=0)
    tl.store(plan_ptr + role, total)
    # With no row at all, weights_m_ws still looks up tile min(id, total - 1) = -1 before it checks `total`: entry 0, or
    # -1 if there is one column tile. Write 1 (number 0 of 1 neighbour) into the fourth word of both, so that no
    # address is computed from uninitialised memory. Both words are unused then.
    if total == 0:
        tl.store(plan_ptr + tiles_at - 1, 1)
        tl.store(plan_ptr + tiles_at + 3, 1)


@triton.jit
def _write_plan(
    ids_ptr,  # [pairs]
    plan_ptr,  # int32 [HEADER + pairs + 4 * (up tiles + down tiles)]
    pairs,
    total,  # [BINS] pairs of each expert
    before,  # [BINS] those of them in blocks before this one
    up_tiles_at,
    down_tiles_at,
    E: tl.constexpr,
    BINS: tl.constexpr,
    UP_ROWS: tl.constexpr,
    UP_STEP: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    DOWN_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB: tl.constexpr,
):
    """Rows of one block of pairs for each program but the last two, which write the tiles of the two products."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0) - 2
    start = tl.cumsum(total, axis=0) - total
    if block < blocks:
        # A pair's row: where its expert starts, plus the expert's pairs in earlier blocks (`before`), in earlier pieces
        # of this block (by which `base` grows), and earlier in this piece.
        base = start + before
        i = tl.arange(0, SUB)
        for at in tl.range(0, BLOCK, SUB, loop_unroll_factor=1):
            pair = block * BLOCK + at + i
            ids = _load_ids(ids_ptr, pair, pairs, E)
            earlier = (ids[:, None] == ids[None, :]) & (i[:, None] > i[None, :])
            row = tl.gather(base, tl.maximum(ids, 0), 0) + tl.sum(earlier.to(tl.int32), axis=1)
            tl.store(plan_ptr + HEADER + row, pair, mask=ids >= 0)
            if at + SUB < BLOCK:
                base += tl.histogram(ids, BINS, mask=ids >= 0)
    elif block == blocks:
        _write_tiles(plan_ptr, up_tiles_at, 0, total, start, BINS, UP_ROWS, UP_STEP)
    else:
        _write_tiles(plan_ptr, down_tiles_at, 1, total, start, BINS, DOWN_ROWS, DOWN_STEP)


@triton.jit(do_not_specialize=["pairs", "up_tiles_at", "down_tiles_at"])
def group_few(
    ids_ptr,  # [pairs] int32 or int64
    plan_ptr,  # as in _write_plan
    pairs,
    up_tiles_at,
    down_tiles_at,
    E: tl.constexpr,
    BINS: tl.constexpr,
    UP_ROWS: tl.constexpr,
    UP_STEP: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    DOWN_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB: tl.constexpr,
    PDL: tl.constexpr,
):
    """The whole plan in one launch, for at most BLOCK pairs (one of FEW_BLOCKS): each program counts them all."""
    take_turn(PDL)
    pair = tl.arange(0, BLOCK)
    ids = _load_ids(ids_ptr, pair, pairs, E)
    total = tl.histogram(ids, BINS, mask=ids >= 0)
    before = tl.histogram(ids, BINS, mask=(ids >= 0) & (pair < tl.program_id(0) * SUB))
    _write_plan(
        ids_ptr, plan_ptr, pairs, total, before, up_tiles_at, down_tiles_at,
        E, BINS, UP_ROWS, UP_STEP, DOWN_ROWS, DOWN_STEP, SUB, SUB,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def count_pairs(
    ids_ptr,  # [pairs] int32 or int64
    counts_ptr,  # [blocks, BINS] int32
    pairs,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """First of two launches for many pairs: counts[block, e], the pairs of each expert in each block of BLOCK."""
    take_turn(PDL)
    block = tl.program_id(0)
    ids = _load_ids(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), pairs, E)
    counts = tl.histogram(ids, BINS, mask=ids >= 0)
    tl.store(counts_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["pairs", "up_tiles_at", "down_tiles_at"])
def group_many(
    ids_ptr,  # [pairs] int32 or int64
    counts_ptr,  # [blocks, BINS] int32
    plan_ptr,  # as in _write_plan
    pairs,
    up_tiles_at,
    down_tiles_at,
    E: tl.constexpr,
    BINS: tl.constexpr,
    UP_ROWS: tl.constexpr,
    UP_STEP: tl.constexpr,
    DOWN_ROWS: tl.constexpr,
    DOWN_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Second: the plan. Each program adds up the counts of all blocks, and of those before its own."""
    take_turn(PDL)
    blocks = tl.num_programs(0) - 2
    total = tl.zeros([CHUNK, BINS], tl.int32)
    before = tl.zeros([CHUNK, BINS], tl.int32)
    for at in range(0, blocks, CHUNK):
        block = at + tl.arange(0, CHUNK)[:, None]
        table = counts_ptr + block * BINS + tl.arange(0, BINS)[None, :]
        counts = tl.load(table, mask=block < blocks, other=0)
        total += counts
        before += tl.where(block < tl.program_id(0), counts, 0)
    total = tl.sum(total, axis=0)
    before = tl.sum(before, axis=0)
    _write_plan(
        ids_ptr, plan_ptr, pairs, total, before, up_tiles_at, down_tiles_at,
        E, BINS, UP_ROWS, UP_STEP, DOWN_ROWS, DOWN_STEP, BLOCK, SUB,
    )  # fmt: skip


class Grouping:
    """The launches that write the plan, for E experts and given row tiles.

    Args:
        E: experts.
        tiles: for the up and then the down product, the most rows of a tile and the step of its height.
        pdl: whether to launch with programmatic dependent launch.
    """

    def __init__(self, E: int, tiles: tuple[int, int, int, int], pdl: bool) -> None:
        self.E, self.bins = E, triton.next_power_of_2(E)
        self.sizes, self.pdl = (E, self.bins, *tiles), pdl
        self.few = {
            size: Launch(group_few, (*self.sizes, size, SUB, pdl), warps=max(8, size // 256), pdl=pdl)
            for size in FEW_BLOCKS
        }
        self.many: dict[int, tuple[Launch, Launch]] = {}

    def __call__(self, stream: int, ids_TK: Tensor, up_tiles: int, down_tiles: int) -> tuple[Tensor, int, int]:
        """Returns the plan of one call and the offsets of its two tables of row tiles.

        Args:
            stream: handle of the stream.
            ids_TK: int32 or int64 [T, K], contiguous.
            up_tiles, down_tiles: entries to reserve in each table.
        """
        pairs = ids_TK.numel()
        up_at = HEADER.value + pairs
        down_at = up_at + 4 * up_tiles
        plan = ids_TK.new_empty(down_at + 4 * down_tiles, dtype=torch.int32)
        for size, few in self.few.items():
            if pairs <= size:
                few(stream, (-(-pairs // SUB) + 2, 1, 1), ids_TK, plan, pairs, up_at, down_at)
                return plan, up_at, down_at
        block = next(limit for limit in many_limits() if pairs <= limit) // MANY_BLOCKS
        blocks = -(-pairs // block)
        counts = plan.new_empty(blocks * self.bins)
        count, rank = self._many(block)
        count(stream, (blocks, 1, 1), ids_TK, counts, pairs)
        rank(stream, (blocks + 2, 1, 1), ids_TK, counts, plan, pairs, up_at, down_at)
        return plan, up_at, down_at

    def _many(self, block: int) -> tuple[Launch, Launch]:
        """The two launches for many pairs, in blocks of this size."""
        if block not in self.many:
            self.many[block] = (
                Launch(count_pairs, (self.E, self.bins, block, self.pdl), warps=8, pdl=self.pdl),
                Launch(group_many, (*self.sizes, block, SUB, CHUNK, self.pdl), warps=4, pdl=self.pdl),
            )
        return self.many[block]


def many_limits() -> Iterator[int]:
    """The most pairs of a call that is cut into blocks of SUB pairs, of twice as many, and so on."""
    return (MANY_BLOCKS * SUB << doubling for doubling in itertools.count())


@functools.cache
def _route_launch(device: torch.device, dtype: torch.dtype, E: int, k: int, tokens: int, skips: bool) -> Launch:
    # Device and dtype are only part of the key: a compiled kernel belongs to both.
    sizes = (E, k, triton.next_power_of_2(E), triton.next_power_of_2(k), tokens, skips)
    return Launch(route_topk, (*sizes, has_pdl(device)), pdl=has_pdl(device))


def route_kernel(logits_TE: Tensor, k: int, skip_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """`route` in one launch; arguments were checked by the caller."""
    T, E = logits_TE.shape
    device = logits_TE.device
    ids_TK = torch.empty(T, k, dtype=torch.int32, device=device)
    weights_TK = torch.empty(T, k, dtype=torch.float32, device=device)
    if T:
        # Few tokens are spread over the multiprocessors; many share a program as far as registers allow.
        tokens = 1 if T <= 64 else max(1, min(16, 2048 // triton.next_power_of_2(E)))
        launch = _route_launch(device, logits_TE.dtype, E, k, tokens, skip_T is not None)
        skip = ids_TK if skip_T is None else _aligned(skip_T.view(torch.uint8))
        with device_guard(device):
            grid = (triton.cdiv(T, tokens), 1, 1)
            launch(current_stream(device), grid, _aligned(logits_TE), skip, ids_TK, weights_TK, T)
    return ids_TK, weights_TK


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, which a kept compiled kernel relies on."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
