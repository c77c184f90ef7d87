"""One attention over a packed batch, and the paged cache that it reads.

Sequences and images never see each other: boundaries are passed as lengths, so no mask over the whole batch exists.
"""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F
from tma_moe.support import CAPABILITY
from torch import Tensor

from qwen3vl_moe.model.batch import Batch, Segments


def runs_kernels(x: Tensor) -> bool:
    """Whether our small Triton kernels take this tensor; else plain torch does the same."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def kernels_take(head_dim: int) -> bool:
    """Whether our attention kernels take heads of this width: products need 16 channels, wide loads multiples of 8."""
    return head_dim >= 16 and head_dim % 8 == 0


def attends_in_kernels(q_TND: Tensor) -> bool:
    """Whether our attention kernels take these queries."""
    return runs_kernels(q_TND) and kernels_take(q_TND.shape[-1])


@functools.cache
def _has_hopper_kernel(device: torch.device) -> bool:
    """Whether the kernel for Hopper runs: Gluon, in which it is written, may change with any triton release."""
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    try:
        importlib.import_module("qwen3vl_moe.model.hopper_attention")
    except Exception:
        return False
    return True


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
    if attends_in_kernels(q_TND):
        starts = segments.q_starts, segments.kv_starts
        # Both modules need triton, which a CPU may lack.
        if _has_hopper_kernel(q_TND.device):
            from qwen3vl_moe.model.hopper_attention import hopper_attention, takes

            if takes(q_TND, k_UGD, v_UGD):
                return hopper_attention(q_TND, k_UGD, v_UGD, *starts, causal=causal)
        from qwen3vl_moe.model.packed_attention import packed_attention

        return packed_attention(q_TND, k_UGD, v_UGD, *starts, causal=causal)
    return _per_segment(q_TND, k_UGD, v_UGD, segments, causal)


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


def store(k_TGD: Tensor, v_TGD: Tensor, batch: Batch, layer_cache: Tensor | None) -> None:
    """Write a step's keys and values into one layer's cache, [2, blocks, block_size, G, D], at ``batch.slots_T``."""
    if layer_cache is not None:
        k_rows, v_rows = layer_cache.flatten(1, 2)
        k_rows.index_copy_(0, batch.slots_T, k_TGD)
        v_rows.index_copy_(0, batch.slots_T, v_TGD)


def cached_attention(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, batch: Batch, layer_cache: Tensor | None) -> Tensor:
    """Causal attention of a step's tokens over their sequences, what the cache holds of them included.

    Args:
        q_TND, k_TGD, v_TGD: the step's own; keys and values are in the cache already (:func:`store`).
        layer_cache: [2, blocks, block_size, G, D], or None to attend within the batch only.
    """
    segments = batch.segments
    if layer_cache is None or not batch.reads_cache:
        return attention(q_TND, k_TGD, v_TGD, segments, causal=True)
    if not attends_in_kernels(q_TND):
        k_rows, v_rows = layer_cache.flatten(1, 2)
        rows = batch.cache_rows_U
        return attention(q_TND, k_rows[rows], v_rows[rows], segments, causal=True)

    from qwen3vl_moe.model.packed_attention import paged_attention
    from qwen3vl_moe.model.paged_decode import paged_decode

    # Rows that only fill a graph's shape belong to no sequence: nothing writes them, and they must not be NaN.
    out_TND = torch.empty_like(q_TND) if batch.padding_T1 is None else torch.zeros_like(q_TND)
    places = segments.q_starts, segments.kv_starts, batch.block_tables
    paged_decode(q_TND, layer_cache, out_TND, *places)
    if segments.max_q > 1:
        paged_attention(q_TND, layer_cache, out_TND, *places)
    return out_TND
