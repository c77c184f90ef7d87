"""A tile of weights_m_ws.py: the ring of its buffers, the walk over all tiles, its width, and its product.

A tile is 128 rows of weights by as many tokens as one expert has there, up to ROWS. A matrix instruction takes 8 to 256
tokens, and what it computes for rows that are padding costs as much as for real ones. So a tile's width is A + B
tokens: A is a power of two, and B, if it is not 0, is 32 or 64 more, in an accumulator of their own. Which A and B is
decided on the device, tile by tile, among a few that were compiled (`_by_width`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tma_moe.gluon_parts import make_barriers

BLOCK_K = gl.constexpr(64)  # 128 bytes, the width of the swizzle
WEIGHT_ROWS = gl.constexpr(128)
TAIL = gl.constexpr(32)  # tokens beside the largest power of two; also the step in which experts are cut into tiles


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr, ROWS: gl.constexpr, FULL_COUNT: gl.constexpr):
    """STAGES buffers of weights and tokens with their barriers: (weights, tokens, tail of tokens, full, empty).

    A buffer of shared memory has a size that is a power of two times the width of its rows, and ROWS is 32 more than a
    power of two. So the widest tile's last 32 tokens have a buffer of their own.
    """
    dtype: gl.constexpr = desc.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(dtype, [STAGES] + desc.block_type.shape, desc.layout)  # noqa: RUF005
    tokens = gl.allocate_shared_memory(dtype, [STAGES, ROWS - TAIL, BLOCK_K], flat)
    tail = gl.allocate_shared_memory(dtype, [STAGES, TAIL, BLOCK_K], flat)
    full, empty = make_barriers(STAGES, FULL_COUNT)
    return weights, tokens, tail, full, empty


@gluon.jit
def _find_tile(plan_ptr, tiles_at, tile, total, COL_TILES: gl.constexpr):
    """Expert, first row, last row + 1 and column tile of an output tile; past the end, of the last tile.

    Neighbouring row tiles of an expert go through the columns together, so that one of them finds the weights in L2.
    If there is no tile at all, what it finds means nothing, but it looks inside the plan (see routing._write_tiles).
    """
    tile = gl.minimum(tile, total - 1)
    row_tile = tile // COL_TILES
    # The plan's fourth word: this is number `number` of `neighbours` row tiles that belong together.
    word = gl.load(plan_ptr + tiles_at + 4 * row_tile + 3)
    number, neighbours = word // 8, word % 8
    row_tile -= number
    place = tile - row_tile * COL_TILES
    entry = plan_ptr + tiles_at + 4 * (row_tile + place % neighbours)
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), place // neighbours


@gluon.jit
def token_buffers(ring, stage, A: gl.constexpr, B: gl.constexpr):
    """The buffers of A and of B more tokens (the first A again if B is 0)."""
    _, tokens, tail, _, _ = ring
    first = tokens.index(stage).slice(0, A)
    if B == 0:
        return first, first
    elif tokens.shape[1] >= A + B:
        return first, tokens.index(stage).slice(A, B)
    else:
        return first, tail.index(stage)


@gluon.jit
def multiply(
    ring, step, half: gl.constexpr, K_STEPS: gl.constexpr, A: gl.constexpr, B: gl.constexpr, GATHERED: gl.constexpr
):
    """This consumer's 64 weight rows times A and B tokens: float32 [64, A] and [64, B] (the first again if B is 0)."""
    weights, _, _, full, empty = ring
    STAGES: gl.constexpr = full.shape[0]
    layout_a: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, A, 16])
    layout_b: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, B if B > 0 else 32, 16]
    )
    acc_a = gl.zeros([64, A], gl.float32, layout_a)
    acc_b = gl.zeros([64, B if B > 0 else 32], gl.float32, layout_b)
    for k in range(K_STEPS):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATHERED:
            # Gathered rows come by ordinary asynchronous copies, which the tensor core sees only after a fence.
            fence_async_shared()
        # Both operands are read from shared memory as they lie there: nothing passes through registers.
        w = weights.index(stage).reshape([WEIGHT_ROWS, BLOCK_K]).slice(half * 64, 64)
        a, b = token_buffers(ring, stage, A, B)
        acc_a = warpgroup_mma(w, a.permute((1, 0)), acc_a, is_async=True)
        if B > 0:
            acc_b = warpgroup_mma(w, b.permute((1, 0)), acc_b, is_async=True)
            # With one step's products under way, those before have read their buffers.
            acc_a, acc_b = warpgroup_mma_wait(2, deps=(acc_a, acc_b))
        else:
            acc_a = warpgroup_mma_wait(1, deps=(acc_a,))
        # Not at k = 0: the last tile's last buffer was given back after its loop.
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        step += 1
    if B > 0:
        acc_a, acc_b = warpgroup_mma_wait(0, deps=(acc_a, acc_b))
    else:
        acc_a = warpgroup_mma_wait(0, deps=(acc_a,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc_a, acc_b


@gluon.jit
def _by_width(rows, ROWS: gl.constexpr, fn: gl.constexpr, tile, args):
    """Calls fn(A, B, tile, *args) with the narrowest A + B that holds a tile's tokens.

    Each pair is compiled into a loop of its own, so there are few of them: three, four or seven for a kernel whose
    tiles have at most 96, 160 or 288 tokens.
    """
    if ROWS < 160:
        if rows <= 32:
            fn(32, 0, tile, *args)
        elif rows <= 64:
            fn(64, 0, tile, *args)
        else:
            fn(64, 32, tile, *args)
    elif rows <= 64:
        fn(64, 0, tile, *args)
    elif rows <= 96:
        fn(64, 32, tile, *args)
    elif rows <= 128:
        fn(128, 0, tile, *args)
    elif ROWS < 288:  # noqa: SIM114, the compiler drops what follows
        fn(128, 32, tile, *args)
    elif rows <= 160:
        fn(128, 32, tile, *args)
    elif rows <= 192:
        fn(128, 64, tile, *args)
    elif rows <= 256:
        fn(256, 0, tile, *args)
    else:
        fn(256, 32, tile, *args)


@gluon.jit
def each_tile(fn: gl.constexpr, args, plan_ptr, tiles_at, total, walk: gl.constexpr):
    """Calls fn(A, B, tile, *args) for this program's tiles one after the other, A + B tokens wide.

    Producer and consumers compute the same tiles independently, so nothing about a tile has to be passed. A
    tile is (steps so far, expert, first row, last row + 1, first column). walk: most rows of a tile, column tiles,
    columns of one, steps of a tile.
    """
    ROWS: gl.constexpr = walk[0]
    COL_TILES: gl.constexpr = walk[1]
    step = 0
    e, first, last, col = _find_tile(plan_ptr, tiles_at, gl.program_id(0), total, COL_TILES)
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        # Where the next tile lies is read long before it is needed.
        after = tile + gl.num_programs(0)
        next_e, next_first, next_last, next_col = _find_tile(plan_ptr, tiles_at, after, total, COL_TILES)
        n = col * walk[2]
        _by_width(last - first, ROWS, fn, (step, e, first, last, n), args)
        step += walk[3]
        e, first, last, col = next_e, next_first, next_last, next_col
