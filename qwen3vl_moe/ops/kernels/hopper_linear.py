"""A linear layer whose weights are in block-scaled FP8, for many rows on Hopper: the experts' kernel, without experts.

Tiles, roles and products are those of `tma_moe.gemm.fp8_tokens_m_ws`: 128 rows of x by 256 of weights, 64 rows for each
of two consumers. Both operands come by TMA.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tma_moe.descriptors import activation_descriptor
from tma_moe.gemm.fp8_tokens_m_ws import ACC, BLOCK, HALF, ROWS, multiply
from tma_moe.gemm.tokens_m_ws import ANYHOW, make_ring, skip, store_rows
from tma_moe.gluon_parts import take_turn, tma_load
from tma_moe.launcher import Launch, current_stream, device_guard
from tma_moe.quantise import quantize_rows

STAGES = 4


@gluon.jit
def _consume(half: gl.constexpr, ring, scales, y_ptr, T, total, sizes: gl.constexpr):
    """This consumer's half of each tile of y."""
    x_scale_ptr, w_scale_ptr = scales
    N: gl.constexpr = sizes[0]
    STEPS: gl.constexpr = (sizes[1] + BLOCK - 1) // BLOCK
    COL_TILES: gl.constexpr = (N + 2 * BLOCK - 1) // (2 * BLOCK)
    BLOCKS: gl.constexpr = (N + BLOCK - 1) // BLOCK
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        first = tile // COL_TILES * ROWS + half * HALF
        block = tile % COL_TILES * 2
        if first < T:
            rows = gl.minimum(first + gl.arange(0, HALF, gl.SliceLayout(1, ACC)), T - 1)
            # The last tile's second half may lie behind the last row of weights: its values are not stored.
            second = w_scale_ptr + gl.minimum(block + 1, BLOCKS - 1) * STEPS
            left, right, step = multiply(
                ring, step, half, x_scale_ptr + rows * STEPS, w_scale_ptr + block * STEPS, second, STEPS, False
            )
            rows = first + gl.arange(0, HALF, gl.SliceLayout(1, layout))
            out = y_ptr + rows.to(gl.int64) * N
            store_rows(left.to(dtype), out, rows < T, block * BLOCK, N, layout, ANYHOW)
            store_rows(right.to(dtype), out, rows < T, block * BLOCK + BLOCK, N, layout, ANYHOW)
        else:
            step = skip(ring, step, STEPS)


@gluon.jit
def _produce(x_desc, w_desc, ring, total, sizes: gl.constexpr):
    """Copies x and weights by TMA, step by step of every tile."""
    COL_TILES: gl.constexpr = (sizes[0] + 2 * BLOCK - 1) // (2 * BLOCK)
    a_ring, b_ring, full, empty = ring
    RING: gl.constexpr = a_ring.shape[0]
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        for at in range(0, sizes[1], BLOCK):
            stage = step % RING
            mbarrier.wait(empty.index(stage), ((step // RING) & 1) ^ 1)
            mbarrier.expect(full.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma_load(x_desc, [tile // COL_TILES * ROWS, at], full.index(stage), a_ring.index(stage))
            tma_load(w_desc, [tile % COL_TILES * 2 * BLOCK, at], full.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit(do_not_specialize=["T"])
def hopper_block_linear(
    x_desc,  # FP8 [T, K], blocks [128, 128]
    x_scale_ptr,  # [T, B]
    w_desc,  # FP8 [N, K], blocks [256, 128]
    w_scale_ptr,  # [A, B]
    y_ptr,  # [T, N]
    T,
    N: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """y = x @ w.T; one program a multiprocessor walks over its tiles."""
    take_turn()
    total = (T + ROWS - 1) // ROWS * ((N + 2 * BLOCK - 1) // (2 * BLOCK))
    swizzled: gl.constexpr = w_desc.layout
    dtype: gl.constexpr = w_desc.dtype
    ring = make_ring(swizzled, dtype, STAGES, ROWS, 2 * BLOCK, BLOCK, 1)
    sizes: gl.constexpr = (N, K)
    scales = x_scale_ptr, w_scale_ptr
    gl.warp_specialize(
        [
            (_consume, (gl.constexpr(0), ring, scales, y_ptr, T, total, sizes)),
            (_consume, (gl.constexpr(1), ring, scales, y_ptr, T, total, sizes)),
            (_produce, (x_desc, w_desc, ring, total, sizes)),
        ],
        # All copies are TMA's: a single warp issues them.
        [4, 1],
        [232, 24],
    )


@functools.cache
def _launch(device: torch.device, dtype: torch.dtype, N: int, K: int) -> tuple[Launch, int]:
    """The launch, and how many programs run at once: one per multiprocessor."""
    # Device and dtype are only part of the key: a compiled kernel belongs to both.
    on_gpu = device.type == "cuda"  # elsewhere it is compiled only
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    return Launch(hopper_block_linear, (N, K, STAGES), warps=4), multiprocessors


def many_rows(x_TK: Tensor, weight_NK: Tensor, scale_AB: Tensor) -> Tensor:
    """As :func:`.block_linear.few_rows` with a scale for each block of 128 x 128, on a GPU of capability 9.0."""
    (T, K), N = x_TK.shape, len(weight_NK)
    y_TN = torch.empty(T, N, dtype=x_TK.dtype, device=x_TK.device)
    if not T:
        return y_TN
    with device_guard(x_TK.device):
        stream = current_stream(x_TK.device)
        x8_TK, x_scale_TB = quantize_rows(stream, x_TK)
        launch, multiprocessors = _launch(x_TK.device, x_TK.dtype, N, K)
        tiles = -(-T // ROWS.value) * -(-N // (2 * BLOCK.value))
        descriptors = activation_descriptor(x8_TK, (128, 128), True), activation_descriptor(weight_NK, (256, 128), True)
        grid = min(tiles, multiprocessors), 1, 1
        launch(stream, grid, descriptors[0], x_scale_TB, descriptors[1], scale_AB, y_TN, T)
    return y_TN
