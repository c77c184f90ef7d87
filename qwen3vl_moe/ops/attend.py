"""Attention over a packed batch, and over the paged cache.

Sequences and images never see each other: their boundaries are passed as lengths, so no mask over the whole batch
exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen3vl_moe.ops import reference
from qwen3vl_moe.ops.dispatch import attention_takes, gluon_attention_problem, takes_kernels
from qwen3vl_moe.ops.segments import Segments


def attention(q_TND: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, *, causal: bool) -> Tensor:
    """Softmax attention within each segment, scaled by 1/sqrt(D).

    Args:
        q_TND: queries of all segments, packed.
        k_UGD, v_UGD: keys and values of all segments, packed; G divides N (grouped-query attention).
        segments: which rows belong together.
        causal: the last query of a segment sees all of its keys, the one before it one fewer, and so on.

    Returns:
        [T, N, D] in the dtype of the queries.
    """
    if not _in_kernels(q_TND):
        return reference.attention(q_TND, k_UGD, v_UGD, segments, causal=causal)
    starts = segments.q_starts, segments.kv_starts
    if gluon_attention_problem(q_TND.device) is None:
        from qwen3vl_moe.ops.kernels.hopper_attention import hopper_attention, takes

        if takes(q_TND, k_UGD, v_UGD):
            return hopper_attention(q_TND, k_UGD, v_UGD, *starts, causal=causal)
    from qwen3vl_moe.ops.kernels.packed_attention import packed_attention

    return packed_attention(q_TND, k_UGD, v_UGD, *starts, causal=causal)


def cached_attention(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, segments: Segments, layer_cache: Tensor | None
) -> Tensor:
    """Causal attention of a step's tokens over their sequences, what the cache holds of them included.

    Args:
        q_TND, k_TGD, v_TGD: the step's own; its keys and values are in the cache already.
        segments: the sequences.
        layer_cache: [2, blocks, block_size, G, D], or one in FP8 (:mod:`.fp8_cache`); None: attend within the step
            only.

    Returns:
        [T, N, D] in the dtype of the queries.
    """
    if layer_cache is None or not segments.reads_cache:
        return attention(q_TND, k_TGD, v_TGD, segments, causal=True)
    if not _in_kernels(q_TND):
        return reference.cached_attention(q_TND, segments, layer_cache)

    from qwen3vl_moe.ops.kernels.paged_decode import paged_decode

    # No kernel writes the rows that belong to no segment, and they must not be NaN.
    out_TND = torch.zeros_like(q_TND) if segments.padded else torch.empty_like(q_TND)
    assert segments.block_tables is not None
    places = segments.q_starts, segments.kv_starts, segments.block_tables
    paged_decode(q_TND, layer_cache, out_TND, *places)
    if segments.max_q > 1:
        _paged_attention(q_TND, layer_cache)(q_TND, layer_cache, out_TND, *places)
    return out_TND


def _paged_attention(q_TND: Tensor, layer_cache: Tensor) -> Callable[..., None]:
    if gluon_attention_problem(q_TND.device) is None:
        from qwen3vl_moe.ops.kernels.hopper_attention import hopper_paged_attention, takes_cache

        if takes_cache(layer_cache):
            return hopper_paged_attention
    from qwen3vl_moe.ops.kernels.packed_attention import paged_attention

    return paged_attention


def _in_kernels(q_TND: Tensor) -> bool:
    return takes_kernels(q_TND) and attention_takes(q_TND.shape[-1])
