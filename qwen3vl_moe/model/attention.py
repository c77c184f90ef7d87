"""One attention over a packed batch, and the paged cache rows that it reads.

Sequences and images never see each other: boundaries are passed as lengths, so no mask over the whole batch exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3vl_moe.model.batch import Batch, Segments


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
    if q_TND.is_cuda and q_TND.dtype in (torch.bfloat16, torch.float16):
        return _flash(q_TND, k_UGD, v_UGD, segments, causal)
    return _per_segment(q_TND, k_UGD, v_UGD, segments, causal)


def _flash(q_TND: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, causal: bool) -> Tensor:
    """torch's variable-length flash attention: one launch for all segments."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        q_TND,
        k_UGD,
        v_UGD,
        segments.q_starts,
        segments.kv_starts,
        segments.max_q,
        segments.max_kv,
        window_size=(-1, 0) if causal else (-1, -1),
    )


def _per_segment(q_TND: Tensor, k_UGD: Tensor, v_UGD: Tensor, segments: Segments, causal: bool) -> Tensor:
    """Any device and dtype: torch's scaled dot-product attention, one segment after the other."""
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


def cached(k_TGD: Tensor, v_TGD: Tensor, batch: Batch, layer_cache: Tensor | None) -> tuple[Tensor, Tensor]:
    """Write a step's keys and values into one layer's cache; return those that the step attends to.

    Args:
        k_TGD, v_TGD: the step's own keys and values.
        layer_cache: [2, blocks, block_size, G, D], or None to attend within the batch only.

    Returns:
        k_UGD, v_UGD for :func:`attention`. They are the arguments themselves where no sequence has a past.
    """
    if layer_cache is None:
        return k_TGD, v_TGD
    k_rows, v_rows = layer_cache.flatten(1, 2)
    k_rows.index_copy_(0, batch.slots_T, k_TGD)
    v_rows.index_copy_(0, batch.slots_T, v_TGD)
    if not batch.reads_cache:
        return k_TGD, v_TGD
    return k_rows[batch.cache_rows_U], v_rows[batch.cache_rows_U]
