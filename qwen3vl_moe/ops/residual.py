"""The residual stream: what a layer's output is added to, and what the next layer reads a norm of.

Adding and norming are two passes over the same memory, and a layer's last step (a matrix product, or the sum over a
token's experts) is a third. The stream joins them: it holds an output back and folds the addition into the kernel that
computes the next norm. The model just says ``stream.add(layer(stream.normed(norm)))``. Where several ranks compute the
model, what a layer adds is a part of a sum, which the stream takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen3vl_moe.ops.block_linear import BlockLinear
from qwen3vl_moe.ops.dispatch import takes_kernels
from qwen3vl_moe.ops.ranks import ALONE, Ranks
from tma_moe import Uncombined


@dataclass(frozen=True)
class OpenProduct:
    """A linear layer of x [T, A], still to be computed: its product can add its result to the stream by itself."""

    x_TA: Tensor
    linear: nn.Linear | BlockLinear


Addend = Tensor | OpenProduct | Uncombined
"""What a layer may leave to be added: a tensor, a product, or the weighted sum over each token's experts."""


class ResidualStream:
    """The hidden states [T, H] of a step, from one layer to the next.

    Args:
        x_TH: what the first layer reads. It belongs to the stream from here on, which overwrites it.
        ranks: who add a part each of what is added.
    """

    def __init__(self, x_TH: Tensor, ranks: Ranks = ALONE):
        self._x_TH, self._ranks = x_TH, ranks
        self._open: Tensor | Uncombined | None = None  # added where the next norm is taken
        self._is_part = False  # whether that is this rank's part of a sum, which the norm takes, too

    def add(self, y: Addend) -> None:
        """Add a layer's output.

        Raises:
            RuntimeError: the output before this one is still held back, as all are but an :class:`OpenProduct` of a
                16-bit layer on one rank, and :meth:`normed` has not been called since.
        """
        if self._open is not None:
            raise RuntimeError("ResidualStream.add: the output before this one has not been taken in by normed() yet")
        shared = self._ranks.shared
        if shared is not None and shared.joins(self._x_TH) and takes_kernels(self._x_TH):
            self._open, self._is_part = y.linear(y.x_TA) if isinstance(y, OpenProduct) else y, True
        elif not self._ranks.alone:
            self._open = self._ranks.sum(_closed(y, self._ranks.room(self._x_TH)))
        elif not isinstance(y, OpenProduct):
            self._open = y
        elif isinstance(y.linear, BlockLinear):
            self._open = y.linear(y.x_TA)
        else:
            self._x_TH.addmm_(y.x_TA, y.linear.weight.T)

    def add_rows(self, rows_M: Tensor, values_MH: Tensor) -> None:
        """Add values to some rows (int64 [M], each at most once): DeepStack features to visual tokens."""
        self._x_TH.index_add_(0, rows_M, values_MH)

    def normed(self, norm: nn.RMSNorm | nn.LayerNorm) -> Tensor:
        """The norm of all that was added so far, [T, H]; new memory."""
        y, is_part = self._open, self._is_part
        self._open, self._is_part = None, False
        eps = norm.eps or 0.0
        if is_part and y is not None and self._ranks.shared is not None:
            from qwen3vl_moe.ops.kernels.ranks import sum_add_norm

            return sum_add_norm(self._x_TH, y, self._ranks.shared, norm.weight, eps)
        if takes_kernels(self._x_TH):
            from qwen3vl_moe.ops.kernels.residual import add_norm, combine_add_norm

            if isinstance(y, Uncombined):
                return combine_add_norm(self._x_TH, y, norm.weight, eps)
            return add_norm(self._x_TH, y, norm.weight, eps, getattr(norm, "bias", None))
        self._x_TH = _sum(self._x_TH, y)
        return norm(self._x_TH)

    def total(self) -> Tensor:
        """All that was added so far, [T, H]. It may be the stream's own memory: read it before the next call."""
        if self._is_part:
            raise TypeError("ResidualStream: a pending sum over ranks can only be consumed by normed()")
        return _sum(self._x_TH, self._open)

    def rows(self, rows_R: Tensor | None) -> ResidualStream:
        """A stream of some rows alone (int64 [R]); None: this one."""
        if rows_R is None:
            return self
        part = ResidualStream(self._x_TH[rows_R], self._ranks)
        part._open, part._is_part = None if self._open is None else self._open[rows_R], self._is_part
        return part


def _closed(y: Addend, room: Tensor | None) -> Tensor:
    """What is to be added, computed to its end; in ``room`` if there is any."""
    if isinstance(y, Uncombined):
        return y.combined(room)
    if isinstance(y, OpenProduct):
        if room is not None and isinstance(y.linear, nn.Linear):
            return torch.mm(y.x_TA, y.linear.weight.T, out=room)
        closed = y.linear(y.x_TA)
    else:
        closed = y
    return closed if room is None else room.copy_(closed)


def _sum(x_TH: Tensor, y: Tensor | Uncombined | None) -> Tensor:
    if isinstance(y, Uncombined):
        raise TypeError("ResidualStream: a pending sum over experts can only be consumed by normed(), on the GPU")
    return x_TH if y is None else x_TH + y
