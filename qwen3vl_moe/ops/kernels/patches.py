"""At the door of the vision tower: pixels into patches, and positions onto patches, each in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import row_block, run_kept
from tma_moe.pdl import take_turn


@triton.jit(do_not_specialize=["rows", "columns", "next_frame"])
def _cut_patches(
    pixels_ptr,  # [frames, 3, rows * PATCH, columns * PATCH] uint8
    out_ptr,  # [rows * columns, 3, FRAMES, PATCH, PATCH]
    rows,
    columns,
    next_frame,  # from one frame to the next, in bytes; 0: a still picture, the same in all of them
    mean_0,
    mean_1,
    mean_2,
    std_0,
    std_1,
    std_2,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    FRAMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per patch and channel. Patches go square by merged square, as the tower merges them."""
    p, c = tl.program_id(0), tl.program_id(1)
    square, corner = p // (MERGE * MERGE), p % (MERGE * MERGE)
    row = square // (columns // MERGE) * MERGE + corner // MERGE
    column = square % (columns // MERGE) * MERGE + corner % MERGE
    i = tl.arange(0, BLOCK)
    inside = i < PATCH * PATCH
    at = ((c * rows + row) * PATCH + i // PATCH) * (columns * PATCH) + column * PATCH + i % PATCH
    mean = tl.where(c == 0, mean_0, tl.where(c == 1, mean_1, mean_2))
    std = tl.zeros([BLOCK], tl.float32) + tl.where(c == 0, std_0, tl.where(c == 1, std_1, std_2))
    white = tl.full([BLOCK], 255, tl.float32)
    out_at = out_ptr + (p.to(tl.int64) * 3 + c) * (FRAMES * PATCH * PATCH) + i
    for frame in tl.static_range(FRAMES):
        values = tl.load(pixels_ptr + at + frame * next_frame, mask=inside, other=0).to(tl.float32)
        # Three steps, each rounded as the processor on the host does.
        values = tl.div_rn(tl.div_rn(values, white) - mean, std)
        tl.store(out_at + frame * (PATCH * PATCH), values.to(out_ptr.dtype.element_ty), mask=inside)


def cut_patches(
    planes: Tensor,
    out_PC: Tensor,
    sides: tuple[int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    """Normalised patches of one picture: see :func:`qwen3vl_moe.ops.patches.cut_patches`.

    Args:
        planes: uint8, contiguous: [3, height, width], or [frames, 3, height, width].
        out_PC: contiguous [P, 3 * frames * patch * patch], filled here; any float dtype.
        sides: of a patch in pixels, of a merged square in patches, and frames of a patch.
        mean, std: of each channel, for values from 0 to 1.
    """
    rows, columns = (side // sides[0] for side in planes.shape[-2:])
    next_frame = planes.stride(0) if planes.ndim == 4 else 0
    numbers, constants = (rows, columns, next_frame, *mean, *std), (*sides, triton.next_power_of_2(sides[0] ** 2))
    run_kept(_cut_patches, (rows * columns, 3, 1), (planes, out_PC), numbers, constants, 2, early=False)


@triton.jit
def _add_positions(
    x_ptr,  # [P, C]
    table_ptr,  # [S, C]
    index_ptr,  # [P, 4]
    weight_ptr,  # [P, 4] fp32
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per patch."""
    take_turn(PDL)
    p = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < C
    mixed = tl.zeros([BLOCK], tl.float32)
    for corner in tl.static_range(4):
        at = tl.load(index_ptr + 4 * p + corner).to(tl.int64) * C
        values = tl.load(table_ptr + at + i, mask=inside, other=0.0).to(tl.float32)
        mixed += values * tl.load(weight_ptr + 4 * p + corner)
    x = tl.load(x_ptr + p * C + i, mask=inside, other=0.0).to(tl.float32)
    # Rounded before it is added, as the model in transformers does.
    x += mixed.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(x_ptr + p * C + i, x.to(x_ptr.dtype.element_ty), mask=inside)


def add_positions(x_PC: Tensor, table_SC: Tensor, index_P4: Tensor, weight_P4: Tensor) -> Tensor:
    """x, updated in place, plus the weighted sum of four learned positions per patch (``reference.mix_positions``)."""
    P, C = x_PC.shape
    block, warps = row_block(C)
    run_kept(_add_positions, (P, 1, 1), (x_PC, table_SC, index_P4, weight_P4), (), (C, block), warps)
    return x_PC
