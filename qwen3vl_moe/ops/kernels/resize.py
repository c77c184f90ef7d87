"""A picture to another size in two launches, one along its rows and one along its columns."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import run_kept
from qwen3vl_moe.ops.reference import RESIZE_BITS

_BITS = tl.constexpr(RESIZE_BITS)
_HALF = tl.constexpr(1 << (RESIZE_BITS - 1))
_BLOCK = 256  # pixels of a program


@triton.jit(do_not_specialize=["old", "new", "taps"])
def _resize_rows(
    pixels_ptr,  # [height, old, 3] uint8
    table_ptr,  # [1 + taps, new] int32
    out_ptr,  # [3, height, new] uint8
    old,
    new,
    taps,
    BLOCK: tl.constexpr,
):
    """One program per block of a row, and per channel."""
    blocks = tl.cdiv(new, BLOCK)
    row, channel = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    height = tl.num_programs(0) // blocks
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < new
    first = tl.load(table_ptr + i, mask=inside, other=0)
    sums = tl.full([BLOCK], _HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(table_ptr + (1 + tap) * new + i, mask=inside, other=0)
        at = row * old * 3 + (first + tap) * 3 + channel
        sums += tl.load(pixels_ptr + at, mask=inside & (first + tap < old), other=0).to(tl.int32) * weight
    values = tl.minimum(tl.maximum(sums >> _BITS, 0), 255).to(tl.uint8)
    tl.store(out_ptr + (channel * height + row) * new + i, values, mask=inside)


@triton.jit(do_not_specialize=["old", "new", "width", "taps"])
def _resize_columns(
    pixels_ptr,  # [C, old, width] uint8
    table_ptr,  # [1 + taps, new] int32
    out_ptr,  # [C, new, width] uint8
    old,
    new,
    width,
    taps,
    BLOCK: tl.constexpr,
):
    """One program per block of a row of the result, and per plane. All its pixels have the same weights."""
    blocks = tl.cdiv(width, BLOCK)
    row, plane = tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    first = tl.load(table_ptr + row)
    sums = tl.full([BLOCK], _HALF, tl.int32)
    for tap in range(tl.minimum(taps, old - first)):
        weight = tl.load(table_ptr + (1 + tap) * new + row)
        at = (plane * old + first + tap) * width + i
        sums += tl.load(pixels_ptr + at, mask=inside, other=0).to(tl.int32) * weight
    values = tl.minimum(tl.maximum(sums >> _BITS, 0), 255).to(tl.uint8)
    tl.store(out_ptr + (plane * new + row) * width + i, values, mask=inside)


def resize_rows(pixels_HW3: Tensor, table: Tensor) -> Tensor:
    """Interleaved uint8 pixels to planes [3, H, new], by a ``weight_table`` of :mod:`qwen3vl_moe.ops.resize`."""
    height, old, _ = pixels_HW3.shape
    taps, new = len(table) - 1, table.shape[1]
    out_3HW = pixels_HW3.new_empty(3, height, new)
    grid = (triton.cdiv(new, _BLOCK) * height, 3, 1)
    # Not early: it may follow a copy, and does not wait for its turn.
    run_kept(_resize_rows, grid, (pixels_HW3, table, out_3HW), (old, new, taps), (_BLOCK,), 4, early=False)
    return out_3HW


def resize_columns(pixels_CHW: Tensor, table: Tensor) -> Tensor:
    """Planes to planes [C, new, W]."""
    planes, old, width = pixels_CHW.shape
    taps, new = len(table) - 1, table.shape[1]
    out_CHW = pixels_CHW.new_empty(planes, new, width)
    grid = (triton.cdiv(width, _BLOCK) * new, planes, 1)
    run_kept(_resize_columns, grid, (pixels_CHW, table, out_CHW), (old, new, width, taps), (_BLOCK,), 4, early=False)
    return out_CHW
