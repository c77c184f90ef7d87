"""From one product's queries, keys and values to rotated queries and keys, and to what the cache keeps."""

from __future__ import annotations

from torch import Tensor, nn

from qwen3vl_moe.ops import reference
from qwen3vl_moe.ops.dispatch import takes_kernels


def rotate_and_store(
    qkv_TA: Tensor,
    heads: tuple[int, int],
    cos_TF: Tensor,
    sin_TF: Tensor,
    *,
    norms: tuple[nn.RMSNorm, nn.RMSNorm] | None = None,
    slots_T: Tensor | None = None,
    layer_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and rotate queries and keys, and write keys and values into the cache.

    Args:
        qkv_TA: [T, (N + 2G) * D], contiguous: the queries' heads, then the keys', then the values'.
        heads: (N, G), how many heads queries and keys have.
        cos_TF, sin_TF: fp32 [T, D / 2].
        norms: of each query and of each key, over D channels; None: neither.
        slots_T: int64 cache rows, needed where there is a cache. Kernels do not write one that is negative, which
            padding has in CUDA graphs; plain torch, which is never in one, takes none.
        layer_cache: [2, blocks, block_size, G, D], contiguous, or one in FP8 (:mod:`.fp8_cache`); None: nothing is
            written.

    Returns:
        q [T, N, D] and k [T, G, D], new memory, and v [T, G, D], a view of qkv; with an FP8 cache k and v as it holds
        them (and qkv may be overwritten).
    """
    if takes_kernels(qkv_TA):
        from qwen3vl_moe.ops.kernels.rotation import norm_rotate_store

        return norm_rotate_store(qkv_TA, heads, cos_TF, sin_TF, norms, slots_T, layer_cache)
    return reference.rotate_and_store(qkv_TA, heads, cos_TF, sin_TF, norms, slots_T, layer_cache)
