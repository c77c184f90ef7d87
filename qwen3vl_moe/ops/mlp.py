"""The first half of the vision tower's MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen3vl_moe.ops import reference
from qwen3vl_moe.ops.dispatch import takes_kernels


def linear_gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """``gelu(linear(x))`` with the tanh approximation: [P, C] to [P, channels of the linear]."""
    if takes_kernels(x):
        # cuBLAS applies this very GELU while the product is still in registers.
        return torch.ops.aten._addmm_activation(linear.bias, x, linear.weight.T, use_gelu=True)
    return reference.linear_gelu(x, linear)
