"""Linear layers of the decoder: with weights of 16 bits, torch's own; in block-scaled FP8, this one."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from qwen3vl_moe.ops.dispatch import takes_kernels
from tma_moe.block_fp8 import BLOCK, FP8, blocks, quantize_rows, scaled_linear
from tma_moe.support import CAPABILITY, PORTABLE_CAPABILITY, capability, gluon_problem, triton_problem

_FEW = 4  # rows, each of which is multiplied by itself
_FULL = 32  # tiles of 128 x 256 from which on they are faster than more and smaller ones


def linear(in_features: int, *parts: int, fp8: bool = False) -> nn.Linear | BlockLinear:
    """A linear layer without bias whose output is that of one layer or of several, side by side."""
    return BlockLinear(in_features, *parts) if fp8 else nn.Linear(in_features, sum(parts), bias=False)


class BlockLinear(nn.Module):
    """A linear layer without bias in block-scaled FP8 (``tma_moe.block_fp8``); activations are quantised on the way.

    Args:
        in_features: K.
        parts: output features of one layer, or of several that are computed as one. Their sum is N.

    Parameters (not trained):
        weight: float8_e4m3fn [N, K].
        scale: float32 [N / shared, ceil(K / 128)]: weights n, k are multiplied by ``scale[n // shared, k // 128]``.

    Attributes:
        shared: how many rows have their scales in common: 128, or fewer where a part is no multiple of that, so that
            no block reaches from one part into the next.
    """

    def __init__(self, in_features: int, *parts: int):
        super().__init__()
        N = sum(parts)
        self.shared = BLOCK if len(parts) == 1 else math.gcd(BLOCK, *parts)
        weight = torch.empty(N, in_features, dtype=FP8)
        scale = torch.empty(-(-N // self.shared), blocks(in_features), dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x_TK: Tensor) -> Tensor:
        """``x @ weight.T`` [T, N] in the dtype of x, summed in float32.

        Where a GPU does not multiply FP8 (below 8.9), x is not quantised: more accurate, and no slower.
        """
        if not takes_kernels(x_TK) or not _has_kernels(x_TK.device):
            return scaled_linear(*quantize_rows(x_TK), self.weight, self.scale, self.shared).to(x_TK.dtype)
        (T, K), operands = x_TK.shape, (x_TK, self.weight, self.scale)
        many, hopper = -(-T // 128) * -(-len(self.weight) // 256) >= _FULL, _is_hopper(x_TK.device)
        if hopper and many and self.shared == BLOCK and K % 16 == 0 and gluon_problem() is None:
            from qwen3vl_moe.ops.kernels.hopper_linear import many_rows

            return many_rows(*operands)
        from qwen3vl_moe.ops.kernels import block_linear

        if T <= _FEW and self.shared % 4 == 0:
            return block_linear.one_row(*operands, self.shared)
        if hopper and self.shared % 64 == 0 and K % 16 == 0:
            return block_linear.some_rows(*operands, self.shared)
        return block_linear.portable_rows(*operands, self.shared)

    def extra_repr(self) -> str:
        N, K = self.weight.shape
        return f"in_features={K}, out_features={N}, shared={self.shared}"


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return capability(device) == CAPABILITY


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    return capability(device) >= PORTABLE_CAPABILITY and triton_problem() is None
