"""A consumer's arithmetic on one tile of :mod:`qwen3vl_moe.ops.kernels.hopper_attention`: scores, softmax, output.

One consumer is four warps with 64 queries. A head of 128 channels is one part; one of 72 is cut into parts of 64 and 16
whose surplus TMA fills with zeros. @gluon.jit supports no loop over a tuple, so the cases of one and of two parts are
written out.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

QUERIES = gl.constexpr(128)  # queries per tile: one wgmma of four warps takes 64 rows, and there are two consumers
KEYS = gl.constexpr(128)  # keys per block


@gluon.jit
def stage_of(rings, stage, PARTS: gl.constexpr):
    """The buffers of one stage, for each part."""
    if PARTS == 1:
        return (rings[0].index(stage),)
    else:
        return rings[0].index(stage), rings[1].index(stage)


@gluon.jit
def scores_of(q_buffers, k_rings, stage, half: gl.constexpr, PARTS: gl.constexpr):
    """Start scores = q k^T for one consumer: [64, D] x [D, KEYS], float32, in its registers. Not waited for.

    Each row lies in four neighbouring threads, so that its maximum takes two exchanges between them.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    scores = gl.zeros([64, KEYS], gl.float32, layout)
    for part in gl.static_range(PARTS):
        q = q_buffers[part].index(0).reshape([QUERIES, q_buffers[part].shape[3]]).slice(half * 64, 64)
        k = k_rings[part].index(stage).reshape([KEYS, k_rings[part].shape[3]])
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def add_values(p, v_rings, stage, out, PARTS: gl.constexpr):
    """Start out += p v, [64, KEYS] times [KEYS, width], for each part of the head. Not waited for."""
    v = v_rings[0].index(stage).reshape([KEYS, v_rings[0].shape[3]])
    first = warpgroup_mma(p, v, out[0], is_async=True)
    if PARTS == 1:
        return (first,)
    else:
        v = v_rings[1].index(stage).reshape([KEYS, v_rings[1].shape[3]])
        return first, warpgroup_mma(p, v, out[1], is_async=True)


@gluon.jit
def wait_for_values(out, p, PARTS: gl.constexpr):
    """Wait for everything that was started. Weights pass through: their registers must not be reused before."""
    if PARTS == 1:
        first, p = warpgroup_mma_wait(0, deps=(out[0], p))
        return (first,), p
    else:
        first, second, p = warpgroup_mma_wait(0, deps=(out[0], out[1], p))
        return (first, second), p


@gluon.jit
def scaled(out, factor, PARTS: gl.constexpr):
    """Each row of the output times its factor [64]."""
    layout_1: gl.constexpr = gl.SliceLayout(1, out[0].type.layout)
    first = out[0] * gl.convert_layout(factor, layout_1)[:, None]
    if PARTS == 1:
        return (first,)
    else:
        layout_2: gl.constexpr = gl.SliceLayout(1, out[1].type.layout)
        return first, out[1] * gl.convert_layout(factor, layout_2)[:, None]


@gluon.jit
def softmax(scores, block, limit, seen, row_max, row_sum, scale, dtype: gl.constexpr):
    """Fold a block of scores [64, KEYS] into the running softmax.

    Args:
        limit: [64], how many keys each query sees; seen: the fewest of them.
        row_max: [64], the largest scaled score so far; row_sum: [64], the sum of 2^(score - row_max) so far.
        scale: 1 / sqrt(D) * log2(e): powers of two are one instruction, those of e two.

    Returns:
        p [64, KEYS] = 2^(scaled score - new row_max) as the left operand of the next product, the new row_max and
        row_sum, and 2^(row_max - new row_max), by which everything added up before has to be rescaled.
    """
    layout: gl.constexpr = scores.type.layout
    # Blocks that every query sees whole, which is most of them, skip the mask.
    if (block + 1) * KEYS > seen:
        key = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        scores = gl.where(key[None, :] < limit[:, None], scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale)
    p = gl.exp2(scores * scale - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + gl.sum(p, axis=1)
    # What a thread holds of the scores is what it has to hold of the operand: this moves nothing between threads.
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2)
    return gl.convert_layout(p.to(dtype), operand), new_max, row_sum, rescale


@gluon.jit
def clear_rows(buffer, valid):
    """Zeros for the values [KEYS, width] from row `valid` on.

    They are multiplied by p = 0, but may be NaN: they belong to the next sequence, or nobody has written them. Both
    consumers do this, and write the same values. 32 rows at a time, to need few registers.
    """
    width: gl.constexpr = buffer.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    for piece in gl.static_range(KEYS // 32):
        row = piece * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
        rows = buffer.reshape([KEYS, width]).slice(piece * 32, 32)
        values = rows.load(layout)
        rows.store(gl.where((row < valid)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def store(values, out_ptr, first_row, stop, n, first_col, N: gl.constexpr, D: gl.constexpr):
    """Write a consumer's [64, width] of head n, but for rows of the next sequence and surplus channels.

    TMA could not leave these out. The layout gives each thread 16 bytes of a row, and neighbours the next 16.
    """
    width: gl.constexpr = values.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    cols = first_col + gl.arange(0, width, gl.SliceLayout(0, layout))
    values = gl.convert_layout(values.to(out_ptr.dtype.element_ty), layout)
    at = out_ptr + ((rows.to(gl.int64) * N + n) * D)[:, None] + cols[None, :]
    gl.store(at, values, mask=(rows < stop)[:, None] & (cols < D)[None, :])
