"""Norm and rotate queries and keys, and write keys and values into the cache, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, nn

from qwen3vl_moe.ops.kernels.launch import cache_operands, run_kept
from tma_moe.pdl import take_turn
from tma_moe.quantise import LARGEST, SMALLEST_AMAX


@triton.jit(do_not_specialize=["T"])
def _norm_rotate_store(
    qkv_ptr,  # [T, N + 2G, D]
    cos_ptr,  # [T, D / 2] fp32
    sin_ptr,
    q_weight_ptr,  # [D]
    k_weight_ptr,
    slots_ptr,  # [T] cache rows, negative: nothing is written
    q_ptr,  # [T, N, D]
    k_ptr,  # [T, G, D]
    k_rows_ptr,  # [rows, G, D]; of an FP8 cache its values, with those of the blocks apart
    v_rows_ptr,
    k_scales_ptr,  # of an FP8 cache
    v_scales_ptr,
    T,
    eps,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,  # of a program, each with HEADS of its N + 2G heads
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2, rounded up to a power of two
    HAS_NORM: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    FP8_BLOCK: tl.constexpr,  # tokens in a block of an FP8 cache; 0: the cache is of the dtype of the keys
    PDL: tl.constexpr,
):
    take_turn(PDL)
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    # The last tokens first: they were written last, and are more likely to be in L2 still.
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    t = place.to(tl.int64) * TOKENS + row // HEADS
    head = tl.program_id(1) * HEADS + row % HEADS
    i = tl.arange(0, HALF)[None, :]
    half = i < D // 2
    inside = (t < T) & (head < N + 2 * G) & half
    source = qkv_ptr + (t * (N + 2 * G) + head) * D + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)

    is_q, is_v = head < N, head >= N + G
    n1, n2 = first, second
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1)[:, None] / D + eps)
        # Zeros beyond the head: what stood there would count for the largest channel of an FP8 cache.
        q_w1 = tl.load(q_weight_ptr + i, mask=half, other=0.0)
        q_w2 = tl.load(q_weight_ptr + D // 2 + i, mask=half, other=0.0)
        k_w1 = tl.load(k_weight_ptr + i, mask=half, other=0.0)
        k_w2 = tl.load(k_weight_ptr + D // 2 + i, mask=half, other=0.0)
        n1 = first * scale * tl.where(is_q, q_w1, k_w1).to(tl.float32)
        n2 = second * scale * tl.where(is_q, q_w2, k_w2).to(tl.float32)
    cos = tl.load(cos_ptr + t * (D // 2) + i, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + t * (D // 2) + i, mask=inside, other=0.0)
    first = tl.where(is_v, first, n1 * cos - n2 * sin).to(q_ptr.dtype.element_ty)
    second = tl.where(is_v, second, n2 * cos + n1 * sin).to(q_ptr.dtype.element_ty)

    q_at = q_ptr + (t * N + head) * D + i
    tl.store(q_at, first, mask=inside & is_q)
    tl.store(q_at + D // 2, second, mask=inside & is_q)
    is_k = (head >= N) & (head < N + G)
    if FP8_BLOCK > 0:
        wide1, wide2 = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide1), axis=1), tl.max(tl.abs(wide2), axis=1))
        head_scale = (tl.maximum(largest, SMALLEST_AMAX) / LARGEST)[:, None]
        first8 = (wide1 * (1.0 / head_scale)).to(tl.float8e4nv)
        second8 = (wide2 * (1.0 / head_scale)).to(tl.float8e4nv)
        # What attends within this step sees what the cache holds.
        first = (first8.to(tl.float32) * head_scale).to(q_ptr.dtype.element_ty)
        second = (second8.to(tl.float32) * head_scale).to(q_ptr.dtype.element_ty)
        tl.store(source, first, mask=inside & is_v)
        tl.store(source + D // 2, second, mask=inside & is_v)
    k_at = k_ptr + (t * G + head - N) * D + i
    tl.store(k_at, first, mask=inside & is_k)
    tl.store(k_at + D // 2, second, mask=inside & is_k)
    if HAS_CACHE:
        slot = tl.load(slots_ptr + t, mask=t < T, other=-1).to(tl.int64)
        inside &= slot >= 0
        first_head = slot * G
        if FP8_BLOCK > 0:
            block, first_head = slot // FP8_BLOCK, slot % FP8_BLOCK * G
            scale_at = block * (FP8_BLOCK * G * (D + 4) // 4) + FP8_BLOCK * G * D // 4 + first_head + head - N
            tl.store(k_scales_ptr + scale_at, head_scale, mask=(slot >= 0) & (t < T) & is_k)
            tl.store(v_scales_ptr + scale_at - G, head_scale, mask=(slot >= 0) & (t < T) & is_v & (head < N + 2 * G))
            k_rows_ptr += block * (FP8_BLOCK * G * (D + 4))
            v_rows_ptr += block * (FP8_BLOCK * G * (D + 4))
            first, second = first8, second8
        k_row = k_rows_ptr + (first_head + head - N) * D + i
        v_row = v_rows_ptr + (first_head + head - N - G) * D + i
        tl.store(k_row, first, mask=inside & is_k)
        tl.store(k_row + D // 2, second, mask=inside & is_k)
        tl.store(v_row, first, mask=inside & is_v)
        tl.store(v_row + D // 2, second, mask=inside & is_v)


def norm_rotate_store(
    qkv_TA: Tensor,
    heads: tuple[int, int],
    cos_TF: Tensor,
    sin_TF: Tensor,
    norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
    slots_T: Tensor | None = None,
    layer_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`qwen3vl_moe.ops.rotation.rotate_and_store`."""
    N, G = heads
    T, D = len(qkv_TA), qkv_TA.shape[1] // (N + 2 * G)
    q_TND, k_TGD = qkv_TA.new_empty(T, N, D), qkv_TA.new_empty(T, G, D)
    v_TGD = qkv_TA.view(T, N + 2 * G, D)[:, N + G :]
    if T:
        has_cache = layer_cache is not None
        q_weight, k_weight = (norm.weight for norm in norms) if norms else (cos_TF, cos_TF)
        eps = norms[0].eps if norms else 0.0
        k_rows, v_rows, k_scales, v_scales, fp8_block = cache_operands(layer_cache if has_cache else k_TGD[None, None])
        slots = slots_T if has_cache else cos_TF
        cache = k_rows, v_rows, k_scales, v_scales
        operands = qkv_TA, cos_TF, sin_TF, q_weight, k_weight, slots, q_TND, k_TGD, *cache
        # Few tokens are spread over the multiprocessors; of many, each program gets enough to keep its loads under way.
        tokens, block, warps = (1, 8, 4) if T <= 256 else (4, 8, 8)
        constants = N, G, D, tokens, block, triton.next_power_of_2(D // 2), norms is not None, has_cache, fp8_block
        grid = triton.cdiv(T, tokens), triton.cdiv(N + 2 * G, block), 1
        run_kept(_norm_rotate_store, grid, operands, (T, eps), constants, warps)
    return q_TND, k_TGD, v_TGD
