"""Small Triton kernels around the big products: what torch would do in many launches, in one.

Residual add + norm, and QK-norm + rotation + cache write (the vision tower: the rotation alone). Each has its plain
torch form beside its caller (text.py, vision.py); these run on CUDA devices, and in Triton's interpreter for tests.
Nothing here depends on the host knowing a length, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from tma_moe import Uncombined
from tma_moe.combine import weighted_sum
from tma_moe.kernel import Launch, current_stream, device_guard
from tma_moe.pdl import take_turn
from tma_moe.support import interpreting
from torch import Tensor


@functools.cache
def _kept(
    kernel, device: torch.device, dtypes: tuple[torch.dtype, ...], constants: tuple, warps: int, early: bool
) -> Launch:
    # Device and dtypes are only part of the key: a compiled kernel belongs to both.
    return Launch(kernel, constants, warps, pdl=early)


def run_kept(
    kernel,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple,
    constants: tuple,
    warps: int,
    early: bool = True,
) -> None:
    """Launch a small kernel with little work on the host.

    Its arguments are tensors, numbers and constants; it does not specialise on its numbers. One that may begin before
    the kernel before it has ended (``early``; not behind a copy) has a last constant that says whether it does.
    """
    if early:
        constants = (*constants, not interpreting())
    if any(x.data_ptr() % 16 for x in tensors):
        # A kept kernel relies on addresses that are multiples of 16 bytes, which the engine's are.
        kernel[grid](*tensors, *numbers, *constants, num_warps=warps)
        return
    device = tensors[0].device
    launch = _kept(kernel, device, tuple(x.dtype for x in tensors), constants, warps, early)
    with device_guard(device):
        launch(current_stream(device), grid, *tensors, *numbers)


def row_block(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds a row of this width."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 8)


@triton.jit
def _add_norm(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    H: tl.constexpr,
    HAS_Y: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    take_turn(PDL)
    # The last rows first: they were written last, and are more likely to be in L2 still.
    at = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * H
    i = tl.arange(0, BLOCK)
    inside = i < H
    x = tl.load(x_ptr + at + i, mask=inside, other=0.0)
    if HAS_Y:
        # Rounded as the residual stream is stored, so that the norm sees what later layers will add to.
        total = x.to(tl.float32) + tl.load(y_ptr + at + i, mask=inside, other=0.0).to(tl.float32)
        x = total.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + at + i, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if CENTRE:
        x = tl.where(inside, x - tl.sum(x) / H, 0.0)
    out = x * tl.rsqrt(tl.sum(x * x) / H + eps) * weight
    if CENTRE:
        out += tl.load(bias_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + i, out.to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(
    x_TH: Tensor, y_TH: Tensor | None, weight_H: Tensor, eps: float, bias_H: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + y and its norm, in one launch: RMSNorm, or LayerNorm where there is a bias.

    x is updated in place and returned; y None means 0.
    """
    out_TH = torch.empty_like(x_TH)
    if len(x_TH):
        width = x_TH.shape[1]
        block, warps = row_block(width)
        y, bias = x_TH if y_TH is None else y_TH, weight_H if bias_H is None else bias_H
        constants = width, y_TH is not None, bias_H is not None, block
        run_kept(_add_norm, (len(x_TH), 1, 1), (x_TH, y, weight_H, bias, out_TH), (eps,), constants, warps)
    return x_TH, out_TH


@triton.jit
def _combine_add_norm(
    x_ptr,
    rows_ptr,
    ids_ptr,
    weights_ptr,
    norm_ptr,
    out_ptr,
    eps,
    H: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,
    PDL: tl.constexpr,
):
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < H
    x = tl.load(x_ptr + t * H + i, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
    x += weighted_sum(rows_ptr, ids_ptr, weights_ptr, t, i, H, E, TOPK, BLOCK_K, EVICT)
    stored = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + t * H + i, stored, mask=inside)
    x = stored.to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x) / H + eps) * norm
    tl.store(out_ptr + t * H + i, out.to(out_ptr.dtype.element_ty), mask=inside)


def combine_add_norm(x_TH: Tensor, y: Uncombined, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its RMSNorm, as :func:`add_norm`, where y is the weighted sum of experts that is still to be taken."""
    out_TH = torch.empty_like(x_TH)
    (T, H), K = x_TH.shape, y.ids_TK.shape[1]
    if T:
        block, warps = row_block(H)
        sizes = H, y.num_experts, K, triton.next_power_of_2(K), block, "evict_first" if y.kept else ""
        operands = x_TH, y.rows_TKH, y.ids_TK, y.weights_TK, weight_H, out_TH
        run_kept(_combine_add_norm, (T, 1, 1), operands, (eps,), sizes, warps)
    return x_TH, out_TH


@triton.jit(do_not_specialize=["T"])
def _norm_rotate_store(
    qkv_ptr,  # [T, N + 2G, D]
    cos_ptr,  # [T, D / 2] fp32
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    slots_ptr,  # [T] cache rows, negative: nothing is written
    q_ptr,  # [T, N, D]
    k_ptr,  # [T, G, D]
    k_rows_ptr,  # [rows, G, D]
    v_rows_ptr,
    T,
    eps,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_CACHE: tl.constexpr,
    PDL: tl.constexpr,
):
    take_turn(PDL)
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    t = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * TOKENS + row // HEADS  # the last first, as above
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
        q_w1, q_w2 = tl.load(q_weight_ptr + i, mask=half), tl.load(q_weight_ptr + D // 2 + i, mask=half)
        k_w1, k_w2 = tl.load(k_weight_ptr + i, mask=half), tl.load(k_weight_ptr + D // 2 + i, mask=half)
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
    k_at = k_ptr + (t * G + head - N) * D + i
    tl.store(k_at, first, mask=inside & is_k)
    tl.store(k_at + D // 2, second, mask=inside & is_k)
    if HAS_CACHE:
        slot = tl.load(slots_ptr + t, mask=t < T, other=-1).to(tl.int64)
        inside &= slot >= 0
        k_row = k_rows_ptr + (slot * G + head - N) * D + i
        v_row = v_rows_ptr + (slot * G + head - N - G) * D + i
        tl.store(k_row, first, mask=inside & is_k)
        tl.store(k_row + D // 2, second, mask=inside & is_k)
        tl.store(v_row, first, mask=inside & is_v)
        tl.store(v_row + D // 2, second, mask=inside & is_v)


def norm_rotate_store(
    qkv_TA: Tensor,
    heads: tuple[int, int],
    cos_TF: Tensor,
    sin_TF: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
    slots_T: Tensor | None = None,
    layer_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS-norm and rotate queries and keys, and write keys and values into the cache, in one launch.

    Args:
        qkv_TA: [T, (N + 2G) * D], contiguous.
        heads: (N, G).
        cos_TF, sin_TF: fp32 [T, D / 2].
        norms: weights [D] of the queries' and the keys' norm, and their epsilon; None does not norm.
        slots_T: int64 cache rows; a negative row is not written.
        layer_cache: [2, blocks, block_size, G, D], contiguous, or None.

    Returns:
        q_TND, k_TGD (new memory) and v_TGD (a view of qkv).
    """
    N, G = heads
    T, D = len(qkv_TA), qkv_TA.shape[1] // (N + 2 * G)
    q_TND, k_TGD = qkv_TA.new_empty(T, N, D), qkv_TA.new_empty(T, G, D)
    v_TGD = qkv_TA.view(T, N + 2 * G, D)[:, N + G :]
    if T:
        has_cache = layer_cache is not None
        q_weight, k_weight, eps = norms or (cos_TF, cos_TF, 0.0)
        k_rows, v_rows = layer_cache.unbind(0) if has_cache else (k_TGD, k_TGD)
        slots = slots_T if has_cache else cos_TF
        operands = qkv_TA, cos_TF, sin_TF, q_weight, k_weight, slots, q_TND, k_TGD, k_rows, v_rows
        # Few tokens are spread over the multiprocessors; of many, each program gets enough to keep its loads under way.
        tokens, block, warps = (1, 8, 4) if T <= 256 else (4, 8, 8)
        constants = N, G, D, tokens, block, triton.next_power_of_2(D // 2), norms is not None, has_cache
        grid = triton.cdiv(T, tokens), triton.cdiv(N + 2 * G, block), 1
        run_kept(_norm_rotate_store, grid, operands, (T, eps), constants, warps)
    return q_TND, k_TGD, v_TGD
