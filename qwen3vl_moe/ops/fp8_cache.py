"""A cache whose keys and values are in FP8: how a block holds them.

Each key and each value has a scale for every token and head, ``max(|x|) / 448`` over its D channels, and is stored as
float8_e4m3fn. A layer's cache is bytes, [2, blocks, block_size, G, D + 4]; within a block all values come first,
[block_size, G, D], and then all scales, float32 [block_size, G], so that both are aligned.

Whatever attends, sees keys and values as the cache holds them, those of the step itself included: how a prompt was cut
into steps changes an answer by no more than the rounding of the model's own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tma_moe.block_fp8 import FP8, LARGEST, SMALLEST_AMAX

FP8_CACHE = torch.uint8  # the dtype of such a cache
SCALE_BYTES = 4


def fp8_views(layer_cache: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Values and scales of a layer's cache, each for keys and for values.

    Returns:
        uint8 [blocks, block_size, G, D] twice, which are FP8, and float32 [blocks, block_size, G] twice; all views.
    """
    _, blocks, block_size, G, width = layer_cache.shape
    D = width - SCALE_BYTES
    flat = layer_cache.view(2, blocks, block_size * G * width)
    k_values, v_values = flat[..., : block_size * G * D].unflatten(-1, (block_size, G, D))
    k_scales, v_scales = flat[..., block_size * G * D :].view(torch.float32).unflatten(-1, (block_size, G))
    return (k_values, v_values), (k_scales, v_scales)


def quantise_heads(x_TGD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values in FP8, float8_e4m3fn [T, G, D], and their scales, float32 [T, G]."""
    x = x_TGD.float()
    scale_TG = x.abs().amax(-1).clamp_min(SMALLEST_AMAX) / LARGEST
    return (x / scale_TG[..., None]).to(FP8), scale_TG
