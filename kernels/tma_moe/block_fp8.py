"""Block-scaled FP8 in plain torch: the number format of the published FP8 checkpoints, and what is right about it.

A weight [N, K] is stored in float8_e4m3fn with one float32 scale for each block of 128 x 128; the last block of a side
may be smaller. A value is `w.float() * scale`: files call the scale `weight_scale_inv`, and multiply by it all the same
(`FineGrainedFP8Config` of transformers, checked with 5.17).

Activations are quantised as they come, each row in groups of 128 channels with a scale of its own (`quantize_rows`). A
product is then exact within a group but for float32 sums, and every group's sum is multiplied by both scales:

    y[t, n] = sum over groups b of  scale_x[t, b] * scale_w[n / 128, b] * (sum over k in b of x8[t, k] * w8[n, k])

Letters here: B groups or blocks along K, A blocks along N; otherwise those of the package.
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
# The least that the largest value of a group counts as: the scale of a group of zeros must not be zero.
SMALLEST_AMAX = 1e-12


def blocks(size: int) -> int:
    """How many blocks a side of this size has."""
    return -(-size // BLOCK)


def scale_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    """Of the scales of weights [..., N, K]: [..., A, B]."""
    *lead, N, K = shape
    return (*lead, blocks(N), blocks(K))


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations in FP8: `scale = max(|x|) / 448` for each row and group of 128 channels, and `x / scale`, rounded.

    Args:
        x_TK: any floating dtype.

    Returns:
        float8_e4m3fn [T, K] and the scales, float32 [T, B].
    """
    T, K = x_TK.shape
    B = blocks(K)
    padded_TK = torch.nn.functional.pad(x_TK.float(), (0, B * BLOCK - K))
    groups_TB = padded_TK.view(T, B, BLOCK)
    scale_TB = groups_TB.abs().amax(-1).clamp_min(SMALLEST_AMAX) / LARGEST
    x8_TK = (groups_TB / scale_TB[..., None]).view(T, B * BLOCK)[:, :K].to(FP8)
    return x8_TK.contiguous(), scale_TB


def quantize_blocks(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights [..., N, K] in FP8, with `scale = max(|w|) / 448` for each block of 128 x 128.

    Args:
        weight: any floating dtype.
        scale_dtype: float32, or bfloat16: scales are then rounded up, so that no value passes 448, before they divide.

    Returns:
        float8_e4m3fn [..., N, K] and the scales, `scale_dtype` [..., A, B].
    """
    *lead, N, K = weight.shape
    A, B = blocks(N), blocks(K)
    padded = torch.nn.functional.pad(weight.float(), (0, B * BLOCK - K, 0, A * BLOCK - N))
    grid = padded.view(*lead, A, BLOCK, B, BLOCK)
    scale = grid.abs().amax((-3, -1)).clamp_min(SMALLEST_AMAX) / LARGEST
    if scale_dtype != torch.float32:
        rounded = scale.to(scale_dtype)
        scale = torch.where(rounded.float() < scale, torch.nextafter(rounded, torch.full_like(rounded, 1e30)), rounded)
    w8 = (grid / scale.float()[..., :, None, :, None]).view(*lead, A * BLOCK, B * BLOCK)
    return w8[..., :N, :K].to(FP8).contiguous(), scale


def dequantize_blocks(w8: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [..., N, K] that FP8 weights and their scales stand for: `w8 * scale`, rounded to dtype."""
    N, K = w8.shape[-2:]
    return (w8.float() * _spread(_spread(scale, N, -2), K, -1)).to(dtype)


def scaled_linear(x8_TK: Tensor, x_scale_TB: Tensor, w8_NK: Tensor, w_scale_AB: Tensor, shared: int = BLOCK) -> Tensor:
    """`x @ w.T` of quantised operands, float32 [T, N]: sums within a group first, then times both scales.

    `shared` rows of weights have a scale in common.

    On a GPU, torch must not round the products' operands (`torch.backends.cuda.matmul.allow_tf32` off, its default;
    values of FP8 would survive it).
    """
    (T, K), N = x8_TK.shape, len(w8_NK)
    y_TN = torch.zeros(T, N, device=x8_TK.device)
    for b, at in enumerate(range(0, K, BLOCK)):
        part_TN = x8_TK[:, at : at + BLOCK].float() @ w8_NK[:, at : at + BLOCK].float().T
        y_TN += part_TN * x_scale_TB[:, b, None] * _spread(w_scale_AB[:, b], N, 0, shared)
    return y_TN


def _spread(scale: Tensor, size: int, dim: int, shared: int = BLOCK) -> Tensor:
    """Each scale along a side once for each of the `size` values that it belongs to."""
    return scale.repeat_interleave(shared, dim).narrow(dim, 0, size)
