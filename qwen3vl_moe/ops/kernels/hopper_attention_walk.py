"""Which tile of queries is a program's next, in :mod:`qwen3vl_moe.ops.kernels.hopper_attention`, and where it lies.

Lengths are on the device, so that a CUDA graph serves any. Producer and consumers walk alike, each by itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qwen3vl_moe.ops.kernels.hopper_attention_tile import KEYS, QUERIES


@gluon.jit
def _tiles_of(q_starts_ptr, s, S, FEWEST: gl.constexpr):
    """How many tiles of queries sequence s has; none with fewer than FEWEST queries, nor past the last sequence."""
    inside = s < S
    stop = gl.load(q_starts_ptr + s + 1, mask=inside, other=0)
    queries = stop - gl.load(q_starts_ptr + s, mask=inside, other=0)
    return gl.where(queries < FEWEST, 0, (queries + QUERIES - 1) // QUERIES)


@gluon.jit
def first_with_tiles(q_starts_ptr, S, FEWEST: gl.constexpr, WARPS: gl.constexpr):
    """The first sequence that has tiles. The others stand before it by the hundred when a prompt joins a batch."""
    layout: gl.constexpr = gl.BlockedLayout([4 // WARPS], [32], [WARPS], [0])
    each = gl.arange(0, 128, layout)
    first = S
    for at in range(0, S, 128):
        s = at + each
        stops = gl.load(q_starts_ptr + s + 1, mask=s < S, other=0)
        queries = stops - gl.load(q_starts_ptr + s, mask=s < S, other=0)
        first = gl.minimum(first, gl.min(gl.where(queries < FEWEST, S, s), axis=0))
    return first


@gluon.jit
def find_tile(q_starts_ptr, S, place, s, base, FEWEST: gl.constexpr):
    """The sequence that tile `place` (of all sequences', counted through) lies in, its first tile, and its tiles.

    Looked for from sequence s on, whose first tile is `base`: a program's tiles only go up.
    """
    tiles = _tiles_of(q_starts_ptr, s, S, FEWEST)
    while (s < S) & (base + tiles <= place):
        base += tiles
        s += 1
        tiles = _tiles_of(q_starts_ptr, s, S, FEWEST)
    return s, base, tiles


@gluon.jit
def span_of(q_starts_ptr, kv_starts_ptr, s, base, tiles, place, CAUSAL: gl.constexpr):
    """Where a tile lies, in rows of the packed tensors.

    Returns: the sequence's first query row, the end of its query rows, its first key row, its number of keys; then of
    the tile: its first query, counted within the sequence, and how many blocks of keys any of its queries sees.
    """
    q_start, q_stop = gl.load(q_starts_ptr + s), gl.load(q_starts_ptr + s + 1)
    kv_start = gl.load(kv_starts_ptr + s)
    kv_len = gl.load(kv_starts_ptr + s + 1) - kv_start
    # The last tile of a causal sequence has the most keys: it starts first.
    first = (base + tiles - 1 - place) * QUERIES
    seen = kv_len
    if CAUSAL:
        seen = gl.minimum(kv_len, kv_len - (q_stop - q_start) + first + QUERIES)
    return q_start, q_stop, kv_start, kv_len, first, (seen + KEYS - 1) // KEYS
