"""FP8, tokens as the M operand, warp-specialised: for all but the smallest loads.

    up      128 tokens  x  128 rows of gate and the 128 of up  ->  h [128, 128], quantised where it is
    down    128 rows    x  256 rows of down                    ->  rows [128, 256]

Both are the same loop: 128 tokens by two halves of 128 weight rows, each half within one block of scales. A step along
the contraction is one group of 128 channels. The tensor cores multiply it by themselves; then the consumer multiplies
what they made by the scales of both operands, and adds it to its sums in float32 (they would keep some 14 bits of a
long sum). One half after the other passes through the same 64 registers. While one consumer adds, the other one
multiplies: consumers 0 and 1 have 64 of the tile's rows each.

Weights come once for all rows of a tile, so few rows are no loss as long as reading them takes longer than multiplying:
a step of one consumer is some 800 cycles, and its weights, 32 KB, take 2,500 from memory. That is why a tile of 64 rows
and more does for most loads, where 16-bit weights want another kernel. A hidden value's group of 128 lies in one tile,
whose epilogue takes its largest, and stores FP8 with its scale.

Roles, ring and walk are those of tokens_m_ws.py.

    registers per thread    consumers (4 warps each)    producer
    up                      224                         56 (4 warps, which gather tokens by ordinary copies)
    down                    232                         24 (1 warp, which only issues TMA)

    shared memory per stage  128 x 128 tokens (16 KB) and 256 x 128 weights (32 KB); 4 stages are 192 KB
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tma_moe import block_fp8
from tma_moe.descriptors import activation_descriptor, weight_descriptor
from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm.product import Product, Sizes, all_rows, require
from tma_moe.gemm.tokens_m_ws import make_ring, skip, store_rows, tile_at
from tma_moe.gluon_parts import PLAN_HEADER, gather_load, silu_times, take_turn, tma_load
from tma_moe.launcher import Launch
from tma_moe.tiles import Tiles

BLOCK = gl.constexpr(block_fp8.BLOCK)
LARGEST = gl.constexpr(block_fp8.LARGEST)
SMALLEST_AMAX = gl.constexpr(block_fp8.SMALLEST_AMAX)
ROWS = gl.constexpr(128)  # of a tile
HALF = gl.constexpr(64)  # of them one consumer's
ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]))


@gluon.jit
def multiply(ring, step, half, x_scales, w_scales_0, w_scales_1, STEPS: gl.constexpr, GATHERED: gl.constexpr):
    """This consumer's rows times both halves of the tile's weights: two of float32 [64, 128]; and the steps so far.

    x_scales: pointers [64] to each row's scale of the first group; w_scales_0 and w_scales_1: to those of the halves.
    """
    a_ring, b_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    acc_0 = gl.zeros([HALF, BLOCK], gl.float32, ACC)
    acc_1 = gl.zeros([HALF, BLOCK], gl.float32, ACC)
    x_scale, w_0, w_1 = gl.load(x_scales), gl.load(w_scales_0), gl.load(w_scales_1)
    for k in range(STEPS):
        # The scales of the next step are under way while this one is multiplied.
        after = gl.minimum(k + 1, STEPS - 1)
        next_x, next_0, next_1 = gl.load(x_scales + after), gl.load(w_scales_0 + after), gl.load(w_scales_1 + after)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATHERED:
            # Gathered rows come by ordinary asynchronous copies, which the tensor core sees only after a fence.
            fence_async_shared()
        a = a_ring.index(stage).slice(half * HALF, HALF)
        b = b_ring.index(stage)
        part = gl.zeros([HALF, BLOCK], gl.float32, ACC)
        part = warpgroup_mma(a, b.slice(0, BLOCK).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        acc_0 += part * (x_scale * w_0)[:, None]
        part = warpgroup_mma(a, b.slice(BLOCK, BLOCK).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(empty.index(stage), count=1)
        acc_1 += part * (x_scale * w_1)[:, None]
        x_scale, w_0, w_1 = next_x, next_0, next_1
        step += 1
    return acc_0, acc_1, step


@gluon.jit
def _consume_up(half: gl.constexpr, ring, scales, plan_ptr, out, tiles_at, total, sizes: gl.constexpr):
    """This consumer's half of each tile of h."""
    x_scale_ptr, w_scale_ptr = scales
    h_ptr, h_scale_ptr = out
    H: gl.constexpr = sizes[0]
    I: gl.constexpr = sizes[1]  # noqa: E741
    TOPK: gl.constexpr = sizes[2]
    STEPS: gl.constexpr = (H + BLOCK - 1) // BLOCK
    GROUPS: gl.constexpr = I // BLOCK
    stored: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        e, first, last, n = tile_at(plan_ptr, tiles_at, tile, GROUPS, BLOCK)
        first += half * HALF
        if first < last:
            rows = first + gl.arange(0, HALF, gl.SliceLayout(1, ACC))
            tokens = gl.load(plan_ptr + PLAN_HEADER + gl.minimum(rows, last - 1)) // TOPK
            w_scales = w_scale_ptr + (e * 2 * GROUPS + n // BLOCK) * STEPS
            gate, up, step = multiply(
                ring, step, half, x_scale_ptr + tokens * STEPS, w_scales, w_scales + GROUPS * STEPS, STEPS, True
            )
            h = silu_times(gate, up)
            scale = gl.maximum(gl.max(gl.abs(h), axis=1), SMALLEST_AMAX) / LARGEST
            gl.store(h_scale_ptr + rows * GROUPS + n // BLOCK, scale, mask=rows < last)
            h8 = gl.convert_layout((h * (1.0 / scale)[:, None]).to(gl.float8e4nv), stored)
            rows = first + gl.arange(0, HALF, gl.SliceLayout(1, stored))
            cols = n + gl.arange(0, BLOCK, gl.SliceLayout(0, stored))
            gl.store(h_ptr + (rows.to(gl.int64) * I)[:, None] + cols[None, :], h8, mask=(rows < last)[:, None])
        else:
            step = skip(ring, step, STEPS)


@gluon.jit
def _produce_up(x_ptr, gate_up_desc, ring, plan_ptr, tiles_at, total, sizes: gl.constexpr):
    """Gathers tokens and copies gate and up rows, step by step of every tile."""
    H: gl.constexpr = sizes[0]
    I: gl.constexpr = sizes[1]  # noqa: E741
    TOPK: gl.constexpr = sizes[2]
    a_ring, b_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        e, first, last, n = tile_at(plan_ptr, tiles_at, tile, I // BLOCK, BLOCK)
        rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        tokens = gl.load(plan_ptr + PLAN_HEADER + gl.minimum(rows, last - 1)) // TOPK
        cols = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        x = (x_ptr + tokens.to(gl.int64) * H)[:, None] + cols[None, :]
        # Rows past the end are filled with zeros, which takes no copy, and less power than other numbers.
        inside = (rows < last)[:, None]
        for at in range(0, H, BLOCK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * gate_up_desc.block_type.nbytes)
            b = b_ring.index(stage)
            tma_load(gate_up_desc, [e * 2 * I + n, at], full.index(stage), b.slice(0, BLOCK))
            tma_load(gate_up_desc, [e * 2 * I + I + n, at], full.index(stage), b.slice(BLOCK, BLOCK))
            if H % BLOCK == 0:
                gather_load(a_ring.index(stage), x + at, mask=inside)
            else:
                gather_load(a_ring.index(stage), x + at, mask=inside & (cols + at < H)[None, :])
            # Each of the 128 threads arrives once its own copies have landed.
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def fp8_tokens_m_ws_up(
    x_ptr,  # [T, H] FP8
    x_scale_ptr,  # [T, B]
    gate_up_desc,  # FP8 [E * 2I, H], blocks [128, 128]
    w_scale_ptr,  # [E, A, B]
    plan_ptr,  # int32, see routing.py
    h_ptr,  # [T * K, I] FP8, by row of the plan
    h_scale_ptr,  # [T * K, I / 128]
    tiles_at,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    TOPK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token]); tokens are gathered by the producer."""
    take_turn()
    total = gl.load(plan_ptr) * (I // BLOCK)
    # 129 arrivals fill a buffer: `expect`, which also announces TMA's bytes, and each of the producer's 128 threads.
    swizzled: gl.constexpr = gate_up_desc.layout
    dtype: gl.constexpr = gate_up_desc.dtype
    ring = make_ring(swizzled, dtype, STAGES, ROWS, 2 * BLOCK, BLOCK, 1 + 128)
    sizes: gl.constexpr = (H, I, TOPK)
    scales = x_scale_ptr, w_scale_ptr
    out = h_ptr, h_scale_ptr
    gl.warp_specialize(
        [
            (_consume_up, (gl.constexpr(0), ring, scales, plan_ptr, out, tiles_at, total, sizes)),
            (_consume_up, (gl.constexpr(1), ring, scales, plan_ptr, out, tiles_at, total, sizes)),
            (_produce_up, (x_ptr, gate_up_desc, ring, plan_ptr, tiles_at, total, sizes)),
        ],
        # The first consumer's four warps are the kernel's own. Two sums and a product [64, 128] take 192 registers.
        [4, 4],
        [224, 56],
    )


@gluon.jit
def _consume_down(half: gl.constexpr, ring, scales, plan_ptr, rows_ptr, tiles_at, total, sizes: gl.constexpr):
    """This consumer's half of each tile of rows."""
    h_scale_ptr, w_scale_ptr = scales
    H: gl.constexpr = sizes[0]
    STEPS: gl.constexpr = sizes[1] // BLOCK
    BLOCKS: gl.constexpr = (H + BLOCK - 1) // BLOCK
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = rows_ptr.dtype.element_ty
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        e, first, last, n = tile_at(plan_ptr, tiles_at, tile, (H + 2 * BLOCK - 1) // (2 * BLOCK), 2 * BLOCK)
        first += half * HALF
        if first < last:
            rows = gl.minimum(first + gl.arange(0, HALF, gl.SliceLayout(1, ACC)), last - 1)
            w_scales = w_scale_ptr + (e * BLOCKS + n // BLOCK) * STEPS
            # The last tile's second half may lie behind the last row of weights: its values are not stored.
            second = w_scale_ptr + (e * BLOCKS + gl.minimum(n // BLOCK + 1, BLOCKS - 1)) * STEPS
            left, right, step = multiply(ring, step, half, h_scale_ptr + rows * STEPS, w_scales, second, STEPS, False)
            rows = first + gl.arange(0, HALF, gl.SliceLayout(1, layout))
            slots = gl.load(plan_ptr + PLAN_HEADER + rows, mask=rows < last, other=0)
            out = rows_ptr + slots.to(gl.int64) * H
            store_rows(left.to(dtype), out, rows < last, n, H, layout, sizes[2])
            store_rows(right.to(dtype), out, rows < last, n + BLOCK, H, layout, sizes[2])
        else:
            step = skip(ring, step, STEPS)


@gluon.jit
def _produce_down(h_desc, down_desc, ring, plan_ptr, tiles_at, total, sizes: gl.constexpr):
    """Copies h and down by TMA, step by step of every tile."""
    H: gl.constexpr = sizes[0]
    a_ring, b_ring, full, empty = ring
    STAGES: gl.constexpr = a_ring.shape[0]
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        e, first, _, n = tile_at(plan_ptr, tiles_at, tile, (H + 2 * BLOCK - 1) // (2 * BLOCK), 2 * BLOCK)
        for at in range(0, sizes[1], BLOCK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), h_desc.block_type.nbytes + down_desc.block_type.nbytes)
            tma_load(h_desc, [first, at], full.index(stage), a_ring.index(stage))
            tma_load(down_desc, [e * H + n, at], full.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit(do_not_specialize=["tiles_at"])
def fp8_tokens_m_ws_down(
    h_desc,  # FP8 [T * K, I], by row of the plan, blocks [128, 128]
    h_scale_ptr,  # [T * K, I / 128]
    down_desc,  # FP8 [E * H, I], blocks [256, 128]
    w_scale_ptr,  # [E, A, I / 128]
    plan_ptr,  # int32, see routing.py
    rows_ptr,  # [T * K, H], by slot
    tiles_at,
    H: gl.constexpr,
    I: gl.constexpr,  # noqa: E741
    STAGES: gl.constexpr,
    EVICT: gl.constexpr,  # L2's policy for what is stored, as in weights_m.py
):
    """rows[slot, n] = down[e, n] . h[row]. Tiles may run into the next expert's rows; only the store is masked."""
    take_turn()
    total = gl.load(plan_ptr + 1) * ((H + 2 * BLOCK - 1) // (2 * BLOCK))
    swizzled: gl.constexpr = down_desc.layout
    dtype: gl.constexpr = down_desc.dtype
    ring = make_ring(swizzled, dtype, STAGES, ROWS, 2 * BLOCK, BLOCK, 1)
    sizes: gl.constexpr = (H, I, EVICT)
    scales = h_scale_ptr, w_scale_ptr
    gl.warp_specialize(
        [
            (_consume_down, (gl.constexpr(0), ring, scales, plan_ptr, rows_ptr, tiles_at, total, sizes)),
            (_consume_down, (gl.constexpr(1), ring, scales, plan_ptr, rows_ptr, tiles_at, total, sizes)),
            (_produce_down, (h_desc, down_desc, ring, plan_ptr, tiles_at, total, sizes)),
        ],
        # All copies are TMA's: a single warp issues them.
        [4, 1],
        [232, 24],
    )


class Up(Product):
    """The launch of `fp8_tokens_m_ws_up`; x and h are pairs of FP8 values and scales."""

    quantised = True

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles, sizes, 128)  # of gate, and as many of up
        require(not tiles.keep, tiles, "no keep for the up product")
        super().__init__(tiles, sizes, sizes.I // tiles.cols)
        self.launch = Launch(fp8_tokens_m_ws_up, (sizes.H, sizes.I, sizes.K, tiles.stages), tiles.warps)

    def __call__(self, stream, pairs, source, experts: ExpertWeights, plan: Tensor, out, tiles_at: int) -> None:
        (x8_TH, x_scale_TB), (h8, h_scale) = source, out
        desc = weight_descriptor(experts, "gate_up", all_rows, (128, 128), gluon=True)
        scale = experts.parameter("gate_up_scale")
        self.launch(stream, self.grid(pairs), x8_TH, x_scale_TB, desc, scale, plan, h8, h_scale, tiles_at)


class Down(Product):
    """The launch of `fp8_tokens_m_ws_down`; h is a pair of FP8 values and scales."""

    quantised = True

    def __init__(self, tiles: Tiles, sizes: Sizes):
        _check(tiles, sizes, 256)
        super().__init__(tiles, sizes, -(-sizes.H // tiles.cols))
        evict = "evict_last" if tiles.keep else ""
        self.launch = Launch(fp8_tokens_m_ws_down, (sizes.H, sizes.I, tiles.stages, evict), tiles.warps)

    def __call__(self, stream, pairs, source, experts: ExpertWeights, plan: Tensor, out: Tensor, tiles_at: int) -> None:
        h8, h_scale = source
        h_desc = activation_descriptor(h8, (128, 128), gluon=True)
        desc = weight_descriptor(experts, "down", all_rows, (256, 128), gluon=True)
        scale = experts.parameter("down_scale")
        self.launch(stream, self.grid(pairs), h_desc, h_scale, desc, scale, plan, out, tiles_at)


def takes(width: int) -> bool:
    """Whether experts of this width can be computed this way: a group of hidden values must not leave its tile."""
    return width % block_fp8.BLOCK == 0


def _check(tiles: Tiles, sizes: Sizes, cols: int) -> None:
    fits = tiles.warps == 4 and tiles.rows == 128 and tiles.block_k == 128 and tiles.cols == cols
    needed = f"4 warps, 128 rows, {cols} columns, a block_k of 128, and experts whose width is a multiple of 128"
    require(fits and takes(sizes.I), tiles, needed)
