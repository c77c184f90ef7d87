"""Scales of FP8 weights, from the files to the model. They are small: each is read as a whole.

A quantised tensor ``X.weight`` or ``experts.X_proj`` has a partner with a number for each block of 128 x 128, which
lies as its weights do: input-major in checkpoints of layout ``published``. (Its shape alone would tell nothing: that of
the published ``gate_up_proj`` could be read either way up to a few blocks, and guessing has misled others.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3vl_moe.errors import CheckpointError
from qwen3vl_moe.weights.shards import StoredTensor, read_whole
from tma_moe.block_fp8 import BLOCK

SCALE_DTYPES = ("BF16", "F32")


def scale_name(weight: str) -> str:
    """What a file calls the scales of a weight. They are multiplied by, whatever the name says."""
    return f"{weight}_scale_inv"


def fill_scales(
    destination: Tensor,
    stored: StoredTensor,
    name: str,
    *,
    rows: int,
    shared: int,
    turned: bool,
    held: tuple[int, Sequence[range]] | None = None,
) -> None:
    """Fill a layer's scales, or those of one of its parts.

    Args:
        destination: float32 [..., rows / shared, B], where they go.
        stored: bf16 or float32 [..., ceil(rows / 128), B], or with the last two dimensions ``turned``.
        name: what an error calls it.
        rows: of the weights.
        shared: how many of them have a scale in common in the model: 128, or a part of it.
        held: which ranges of the weights are wanted, and along which of their dimensions in the model; None: all.

    Raises:
        CheckpointError: a scale is negative or not finite.
    """
    scale = read_whole(stored).to(torch.float32)
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise CheckpointError(
            f"{stored.file}: {name} holds a scale that is negative or not finite: the file is damaged"
        )
    if turned:
        scale = scale.transpose(-1, -2)
    if shared != BLOCK:
        scale = scale.repeat_interleave(BLOCK // shared, -2).narrow(-2, 0, rows // shared)
    if held is not None:
        axis, ranges = held
        unit = {scale.dim() - 1: BLOCK, scale.dim() - 2: shared}.get(axis, 1)
        scale = torch.cat([scale.narrow(axis, each.start // unit, -(-len(each) // unit)) for each in ranges], axis)
    destination.copy_(scale)
