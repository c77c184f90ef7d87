"""At the door of the vision tower: pixels become patches, and patches learn where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3vl_moe.ops import reference
from qwen3vl_moe.ops.dispatch import takes_kernels


def cut_patches(
    planes: Sequence[Tensor],
    sides: tuple[int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalised patches [P, 3 * frames * patch * patch] of several pictures.

    Patches come in the order of the vision tower: merge x merge neighbours in a row, so that the merger only has to
    view consecutive rows as one. Within a patch: channel, frame, row, column. A still picture fills all frames.

    Args:
        planes: of each picture uint8 [3, height, width], contiguous; heights and widths of whole patches. Of a piece of
            a video [frames, 3, height, width].
        sides: of a patch in pixels, of a merged square in patches, and how many frames a patch has.
        mean, std: of each channel, for values from 0 to 1.
        dtype: of the result; the arithmetic is fp32.
    """
    if planes[0].is_cuda:
        from qwen3vl_moe.ops.kernels.patches import cut_patches as cut_picture

        patch, _, frames = sides
        counts = [each.shape[-2] * each.shape[-1] // patch**2 for each in planes]
        patches_PC = planes[0].new_empty(sum(counts), 3 * frames * patch**2, dtype=dtype)
        for each, out_PC in zip(planes, patches_PC.split(counts), strict=True):
            cut_picture(each, out_PC, sides, mean, std)
        return patches_PC
    return reference.cut_patches(planes, sides, mean, std, dtype)


def add_positions(x_PC: Tensor, table_SC: Tensor, index_P4: Tensor, weight_P4: Tensor) -> Tensor:
    """Patches plus the weighted sum of four learned positions each; x may be overwritten.

    Args:
        x_PC: embedded patches.
        table_SC: learned positions.
        index_P4, weight_P4: which four of them a patch mixes (int64), and how (fp32).

    Returns:
        [P, C] in the dtype of x.
    """
    if takes_kernels(x_PC):
        from qwen3vl_moe.ops.kernels.patches import add_positions as add_in_place

        return add_in_place(x_PC, table_SC, index_P4, weight_P4)
    return reference.add_positions(x_PC, table_SC, index_P4, weight_P4)
