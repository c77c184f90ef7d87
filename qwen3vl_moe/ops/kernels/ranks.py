"""A layer's output on one of several GPUs: summed over all of them, added and normed in one launch, for a few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3vl_moe.ops.kernels.launch import row_block, run_kept
from qwen3vl_moe.ops.shared_memory import SharedMemory
from tma_moe import Uncombined
from tma_moe.combine import weighted_sum
from tma_moe.pdl import take_turn


@triton.jit
def _meet(flags_ptr, t, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Waits for the programs of row t on all GPUs. What each wrote before it, all can read after it.

    A flag for each pair of GPUs and row: raised by one, lowered by the other, so it is down again for the next time.
    """
    tl.debug_barrier()  # the whole program has written before one of its threads says so
    for other in tl.static_range(SIZE):
        if other != RANK:
            flag = tl.load(flags_ptr + other).to(tl.pointer_type(tl.int32)) + t * SIZE + RANK
            while tl.atomic_cas(flag, 0, 1, sem="release", scope="sys") != 0:
                pass
    for other in tl.static_range(SIZE):
        if other != RANK:
            flag = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + t * SIZE + other
            while tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys") != 1:
                pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["turn"])
def _sum_add_norm(
    x_ptr,  # [T, H], becomes x + the sum
    rows_ptr,  # [T, H], this GPU's part; or [T, TOPK, H], what each expert made of the token
    ids_ptr,  # [T, TOPK]: E and above are no expert, and add nothing
    weights_ptr,  # [T, TOPK] fp32
    norm_ptr,  # [H]
    rooms_ptr,  # int64 [SIZE]: addresses of memory [2, MOST, H] on each GPU
    flags_ptr,  # int64 [SIZE]: and of flags [MOST, SIZE], int32
    out_ptr,  # [T, H]
    eps,
    turn,  # which half of the memory: the other one may still be read
    H: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,  # 0: the part is given
    BLOCK_TOPK: tl.constexpr,  # TOPK and H, rounded up to powers of two
    BLOCK: tl.constexpr,
    EVICT: tl.constexpr,  # as in combine_add_norm
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row."""
    take_turn(PDL)
    t = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < H
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if TOPK:
        part = weighted_sum(rows_ptr, ids_ptr, weights_ptr, t, i, H, E, TOPK, BLOCK_TOPK, EVICT)
    else:
        part = tl.load(rows_ptr + t * H + i, mask=inside, other=0.0)
    at = (turn * MOST + t) * H + i
    mine = tl.multiple_of(tl.load(rooms_ptr + RANK).to(tl.pointer_type(dtype)), 16)
    tl.store(mine + at, part.to(dtype), mask=inside)
    x = tl.load(x_ptr + t * H + i, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
    _meet(flags_ptr, t, RANK, SIZE)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(SIZE):  # in one order, so that all get the same bits
        theirs = tl.multiple_of(tl.load(rooms_ptr + rank).to(tl.pointer_type(dtype)), 16)
        total += tl.load(theirs + at, mask=inside, other=0.0, volatile=True).to(tl.float32)
    stored = (x + total.to(dtype).to(tl.float32)).to(dtype)
    tl.store(x_ptr + t * H + i, stored, mask=inside)
    x = stored.to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x) / H + eps) * norm
    tl.store(out_ptr + t * H + i, out.to(dtype), mask=inside)


def sum_add_norm(x_TH: Tensor, y: Tensor | Uncombined, shared: SharedMemory, weight_H: Tensor, eps: float) -> Tensor:
    """RMSNorm of x + the sum of every GPU's y, which is a tensor [T, H] or a sum over experts still to be taken.

    x [T, H], T at most ``shared.joined_rows``, becomes x + the sum in place. The result is new memory.

    Every GPU of the group has to launch it, in the same order among such launches. Its programs wait for each other
    across GPUs: T is small enough for all of them to run at once. A GPU may be writing its part for the next launch
    while another still reads that of this one, so two pieces of memory take turns: who writes the second next has seen
    all others arrive at the next one, and so has seen them leave this one.
    """
    out_TH, (T, H) = torch.empty_like(x_TH), x_TH.shape
    if not T:
        return out_TH
    block, warps = row_block(H)
    if isinstance(y, Uncombined):
        rows, ids, weights, K = y.rows_TKH, y.ids_TK, y.weights_TK, y.ids_TK.shape[1]
        of_sum = y.num_experts, K, triton.next_power_of_2(K), block, "evict_first" if y.kept else ""
    else:
        rows = ids = weights = y.contiguous()
        of_sum = 0, 0, 1, block, ""
    operands = x_TH, rows, ids, weights, weight_H, shared.rooms, shared.flags, out_TH
    numbers = eps, shared.next_turn()
    run_kept(
        _sum_add_norm, (T, 1, 1), operands, numbers, (H, *of_sum, shared.rank, shared.size, shared.joined_rows), warps
    )
    return out_TH
