"""Experts as two batched products over padded rows: what trains fastest on a CPU.

A product per expert has a new shape in every step, and oneDNN compiles code for every new shape. Here each expert gets
the same number of rows, a multiple of STEP, so that few shapes ever occur. Gathers are their own backward passes (a
gather with the inverse index), since adding rows up by index is slow on a CPU.

Shape letters: T tokens, H hidden, E experts, K chosen experts, I expert width, R = E x rows of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "padded_bmm"
STEP = 512


class _Rows(torch.autograd.Function):
    """``x[index]``, where row ``len(x)`` is zero; the gradient of row i is the sum over ``inverse[i]``, likewise."""

    @staticmethod
    def forward(ctx, x_NH: Tensor, index_R: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return _with_zero_row(x_NH)[index_R]

    @staticmethod
    def backward(ctx, gradient_RH: Tensor) -> tuple[Tensor, None, None]:
        (inverse_NK,) = ctx.saved_tensors
        gradient_NKH = _with_zero_row(gradient_RH)[inverse_NK]
        return gradient_NKH.squeeze(1) if inverse_NK.shape[1] == 1 else gradient_NKH.sum(1), None, None


def _with_zero_row(x_NH: Tensor) -> Tensor:
    return torch.cat([x_NH, x_NH.new_zeros(1, x_NH.shape[1])])


def padded_experts(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' SwiGLU layers, [T, H]; differentiable."""
    (T, K), E = ids_TK.shape, len(gate_up_E2IH)
    order = ids_TK.flatten().argsort(stable=True)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=E)
    rows = -(-int(counts_E.max()) // STEP) * STEP
    experts, pairs = ids_TK.flatten()[order], torch.arange(T * K, device=order.device)
    within = pairs - (counts_E.cumsum(0) - counts_E)[experts]
    row_of_pair = torch.empty_like(order)
    row_of_pair[order] = experts * rows + within
    pair_of_row = order.new_full((E * rows,), T * K)
    pair_of_row[row_of_pair] = pairs
    # Pair T * K stands for "none"; a token count of T for "no token".
    x_RH = _Rows.apply(x_TH, pair_of_row // K, row_of_pair.view(T, K))
    gate, up = torch.bmm(x_RH.view(E, rows, -1), gate_up_E2IH.transpose(1, 2)).chunk(2, dim=-1)
    y_RH = torch.bmm(F.silu(gate) * up, down_EHI.transpose(1, 2)).flatten(0, 1)
    y_TKH = _Rows.apply(y_RH, row_of_pair, pair_of_row[:, None]).view(T, K, -1)
    return (y_TKH * weights_TK[:, :, None].to(y_TKH.dtype)).sum(1)


def _forward(module: torch.nn.Module, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return padded_experts(x_TH, ids_TK, weights_TK, module.gate_up_proj, module.down_proj)


def register() -> None:
    """Make :data:`NAME` an experts implementation of transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
