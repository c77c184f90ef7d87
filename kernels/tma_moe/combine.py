"""The weighted sum over a token's experts, in float32 and in a fixed order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def combine(
    rows_ptr,  # [T * K, H]: the down products, by slot
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    y_ptr,  # [T, H]
    H: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.load(ids_ptr + t * TOPK + k, mask=k < TOPK, other=-1)
    # A pair whose id is no expert has no product: its row of the buffer was never written.
    real = (ids >= 0) & (ids < E)
    weights = tl.load(weights_ptr + t * TOPK + k, mask=real, other=0.0).to(tl.float32)
    at = (t * TOPK + k)[:, None] * H + cols[None, :]
    rows = tl.load(rows_ptr + at, mask=real[:, None] & (cols < H)[None, :], other=0.0)
    y = tl.sum(weights[:, None] * rows.to(tl.float32), axis=0)
    tl.store(y_ptr + t * H + cols, y.to(y_ptr.dtype.element_ty), mask=cols < H)
