"""The operations in plain torch, on any device and in any floating dtype: the definition of correct.

That of the residual stream, an addition and the norm itself, is in :mod:`.residual`.

Shape letters are those of :mod:`qwen3vl_moe.model.batch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_moe.ops.fp8_cache import FP8_CACHE, fp8_views, quantise_heads
from qwen3vl_moe.ops.segments import Segments
from tma_moe.block_fp8 import FP8

RESIZE_BITS = 22  # Pillow's: 32, less 8 of a pixel, and 2 for sums that are negative or beyond white


def rotate(x_TND: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotates each head: channel i is paired with channel i + D/2 (the split-half convention of the checkpoint).

    cos and sin are [T, D/2]; the result has the dtype that x and they promote to.
    """
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    first, second = x_TND.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_and_store(
    qkv_TA: Tensor,
    heads: tuple[int, int],
    cos_TF: Tensor,
    sin_TF: Tensor,
    norms: tuple[nn.RMSNorm, nn.RMSNorm] | None,
    slots_T: Tensor | None,
    layer_cache: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`qwen3vl_moe.ops.rotation.rotate_and_store`."""
    N, G = heads
    q_TND, k_TGD, v_TGD = qkv_TA.view(len(qkv_TA), N + 2 * G, -1).split((N, G, G), dim=1)
    if norms is not None:
        q_TND, k_TGD = norms[0](q_TND), norms[1](k_TGD)
    # In fp32: the angles are large, and bf16 would round them away.
    q_TND, k_TGD = (rotate(x.float(), cos_TF, sin_TF).to(qkv_TA.dtype) for x in (q_TND, k_TGD))
    if layer_cache is not None:
        assert slots_T is not None
        k_TGD, v_TGD = store(k_TGD, v_TGD, slots_T, layer_cache)
    return q_TND, k_TGD, v_TGD


def store(k_TGD: Tensor, v_TGD: Tensor, slots_T: Tensor, layer_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Writes keys and values into rows ``slots_T`` of one layer's cache, and returns them as it holds them.

    The cache is [2, blocks, block_size, G, D] in any floating dtype, or FP8 (see :mod:`.fp8_cache`).
    """
    if layer_cache.dtype != FP8_CACHE:
        k_rows, v_rows = layer_cache.flatten(1, 2)
        k_rows.index_copy_(0, slots_T, k_TGD)
        v_rows.index_copy_(0, slots_T, v_TGD)
        return k_TGD, v_TGD
    block_T, place_T = slots_T // layer_cache.shape[2], slots_T % layer_cache.shape[2]
    rounded = []
    for x_TGD, values, scales in zip((k_TGD, v_TGD), *fp8_views(layer_cache), strict=True):
        x8_TGD, scale_TG = quantise_heads(x_TGD)
        values[block_T, place_T] = x8_TGD.view(torch.uint8)
        scales[block_T, place_T] = scale_TG
        rounded.append((x8_TGD.float() * scale_TG[..., None]).to(x_TGD.dtype))
    return rounded[0], rounded[1]


def attention(q_TND: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, *, causal: bool) -> Tensor:
    """torch's scaled dot-product attention, one segment after the other."""
    out_TND = torch.empty_like(q_TND)
    q_start = kv_start = 0
    for q_len, kv_len in zip(segments.q_lens, segments.kv_lens, strict=True):
        q = q_TND[q_start : q_start + q_len].transpose(0, 1)[None]
        k, v = (x[kv_start : kv_start + kv_len].transpose(0, 1)[None] for x in (k_UGD, v_UGD))
        # torch's is_causal counts from the first key; a later chunk of a prompt has to count from the last.
        mask = None
        if causal and 1 < q_len < kv_len:
            mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).tril(kv_len - q_len)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal and q_len == kv_len, enable_gqa=q.shape[1] != k.shape[1]
        )
        out_TND[q_start : q_start + q_len] = out[0].transpose(0, 1)
        q_start, kv_start = q_start + q_len, kv_start + kv_len
    return out_TND


def cached_attention(q_TND: Tensor, segments: Segments, layer_cache: Tensor) -> Tensor:
    """Causal attention over all keys of each segment, gathered from the cache."""
    rows_U = segments.cache_rows_U
    if layer_cache.dtype != FP8_CACHE:
        k_rows, v_rows = layer_cache.flatten(1, 2)
        return attention(q_TND, k_rows[rows_U], v_rows[rows_U], segments, causal=True)
    block_U, place_U = rows_U // layer_cache.shape[2], rows_U % layer_cache.shape[2]
    k_UGD, v_UGD = (
        (values[block_U, place_U].view(FP8).float() * scales[block_U, place_U][..., None]).to(q_TND.dtype)
        for values, scales in zip(*fp8_views(layer_cache), strict=True)
    )
    return attention(q_TND, k_UGD, v_UGD, segments, causal=True)


def linear_gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """See :func:`qwen3vl_moe.ops.mlp.linear_gelu`."""
    return F.gelu(linear(x), approximate="tanh")


def add_positions(x_PC: Tensor, table_SC: Tensor, index_P4: Tensor, weight_P4: Tensor) -> Tensor:
    """See :func:`qwen3vl_moe.ops.patches.add_positions`."""
    return x_PC + mix_positions(table_SC, index_P4, weight_P4).to(x_PC.dtype)


def mix_positions(table_SC: Tensor, index_P4: Tensor, weight_P4: Tensor) -> Tensor:
    """The weighted sum of four learned positions per patch, fp32 [P, C].

    Corner by corner, so that no more than two [P, C] are in memory beside the sum.
    """
    out_PC = table_SC[index_P4[:, 0]] * weight_P4[:, :1]
    for corner in range(1, 4):
        out_PC += table_SC[index_P4[:, corner]] * weight_P4[:, corner, None]
    return out_PC


def resize_rows(pixels_HW3: Tensor, table: Tensor) -> Tensor:
    """Interleaved uint8 pixels to planes [3, H, new], by a ``weight_table`` of :mod:`qwen3vl_moe.ops.resize`."""
    return _resize_last(pixels_HW3.permute(2, 0, 1), table)


def resize_columns(pixels_CHW: Tensor, table: Tensor) -> Tensor:
    """Planes to planes [C, new, W]."""
    return _resize_last(pixels_CHW.mT, table).mT.contiguous()


def _resize_last(pixels: Tensor, table: Tensor) -> Tensor:
    """One pass, along the last dimension. The sums stay below 2^31: weights of either sign add up to less than 1.3."""
    first, last = table[0].long(), pixels.shape[-1] - 1
    sums = pixels.new_full((*pixels.shape[:-1], len(first)), 1 << (RESIZE_BITS - 1), dtype=torch.int32)
    for tap, weight in enumerate(table[1:]):
        sums += pixels[..., (first + tap).clamp(max=last)].int() * weight
    return (sums >> RESIZE_BITS).clamp(0, 255).to(torch.uint8)


def cut_patches(
    planes: Sequence[Tensor],
    sides: tuple[int, int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`qwen3vl_moe.ops.patches.cut_patches`."""
    patch, merge, frames = sides
    counts = [each.shape[-2] * each.shape[-1] // patch**2 for each in planes]
    moving = any(each.ndim == 4 for each in planes)  # else one frame is made, and repeated
    values_P3FS = planes[0].new_empty(sum(counts), 3, frames if moving else 1, patch**2, dtype=torch.float32)
    for each, values in zip(planes, values_P3FS.split(counts), strict=True):
        clip = each.view(
            -1, 3, each.shape[-2] // patch // merge, merge, patch, each.shape[-1] // patch // merge, merge, patch
        )
        blocks = clip.permute(2, 5, 3, 6, 1, 0, 4, 7)
        values.view(*blocks.shape[:5], -1, patch, patch).copy_(blocks)
    mean_311, std_311 = (torch.tensor(values, device=planes[0].device)[:, None, None] for values in (mean, std))
    # Dividing by 255 rounds as transformers' fp64 product with 1/255 does, for all 256 values, and the other two steps
    # are its own. A fused scale and shift would save a pass and be off by one unit in the last place.
    values_P3FS.div_(255).sub_(mean_311).div_(std_311)
    return values_P3FS.to(dtype).expand(-1, -1, frames, -1).reshape(sum(counts), -1)
