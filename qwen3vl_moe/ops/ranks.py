"""The processes that compute one model together, and what they have to tell each other in the middle of a step.

Each operation is called by all of them, in the same order. Sums are taken in one order of additions, so that every rank
gets the same bits, and the same from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among those of a process group (torch.distributed's default one); alone unless told otherwise.

    Args:
        rank: of this process. The first one, 0, schedules and samples.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's part, on all of them. May overwrite the part."""
        if not self.alone:
            dist.all_reduce(part)
        return part

    def columns(self, part_RV: Tensor, out: Tensor | None = None) -> Tensor:
        """Every rank's columns of a matrix, side by side, on the first rank; on the others just their own.

        Args:
            out: where the matrix is written on the first rank.
        """
        if self.alone:
            return part_RV if out is None else out.copy_(part_RV)
        part_RV = part_RV.contiguous()
        if not self.first:
            dist.gather(part_RV, dst=0)
            return part_RV
        parts = [torch.empty_like(part_RV) for _ in range(self.size)]
        dist.gather(part_RV, parts, dst=0)
        return torch.cat(parts, dim=1, out=out)

    def from_first(self, x: Tensor) -> Tensor:
        """The first rank's tensor, written into that of all others, which has its shape and dtype."""
        if not self.alone:
            dist.broadcast(x, src=0)
        return x

    def exchange(self, send: Sequence[Tensor | None], receive: Sequence[Tensor | None]) -> None:
        """Send a tensor to each rank, and fill one from each; None where there is nothing to send or to fill."""
        operations = [
            dist.P2POp(do, x.contiguous() if do is dist.isend else x, other)
            for do, tensors in ((dist.isend, send), (dist.irecv, receive))
            for other, x in enumerate(tensors)
            if x is not None and other != self.rank and x.numel()
        ]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        mine, here = send[self.rank], receive[self.rank]
        if mine is not None and here is not None:
            here.copy_(mine)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, on all of them. The host waits for it."""
        if self.alone:
            return number
        result = torch.tensor(number)
        dist.all_reduce(result, op=dist.ReduceOp.MIN)
        return int(result)

    def of_all(self, number: int) -> list[int]:
        """Every rank's number, on all of them. The host waits for it."""
        if self.alone:
            return [number]
        result = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(result, torch.tensor([number]))
        return [int(each) for each in result]


ALONE = Ranks()
