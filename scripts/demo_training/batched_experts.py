"""Experts for training: rows sorted by expert and one grouped product a weight, nothing read back from the device.

Gathers are their own backward passes (a gather with the inverse index): adding rows up by index sorts or uses atomics.

Shape letters: T tokens, H hidden, E experts, K chosen experts, I expert width, R = T x K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class _Rows(torch.autograd.Function):
    """``x[index]``; the gradient of row i is the sum of the rows ``inverse[i]`` of the gradient."""

    @staticmethod
    def forward(ctx, x_NH: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x_NH[index]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])[inverse]
        return rows if inverse.ndim == 1 else rows.sum(1), None, None


def experts(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' SwiGLU layers, [T, H]; differentiable."""
    (T, K), E = ids_TK.shape, len(gate_up_E2IH)
    expert_R = ids_TK.flatten()
    order_R = expert_R.argsort(stable=True)
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(T * K, device=order_R.device))
    # Not bincount: it waits for the device.
    ends_E = (expert_R == torch.arange(E, device=expert_R.device)[:, None]).sum(1).cumsum(0).to(torch.int32)
    x_RH = _Rows.apply(x_TH, order_R // K, place_R.view(T, K))
    gate, up = F.grouped_mm(x_RH, gate_up_E2IH.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y_RH = F.grouped_mm(F.silu(gate) * up, down_EHI.transpose(1, 2), offs=ends_E)
    y_TKH = _Rows.apply(y_RH, place_R, order_R).view(T, K, -1)
    return (y_TKH * weights_TK[:, :, None].to(y_TKH.dtype)).sum(1)
