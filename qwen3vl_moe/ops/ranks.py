"""The processes that compute one model together, and what they have to tell each other in the middle of a step.

Each operation is called by all of them, in the same order. Sums are taken in one order of additions, so that every rank
gets the same bits, and the same from run to run.

Sums of bf16 and fp32 on GPUs that reach each other's memory go through a piece of memory on each that all of them read
and write (torch's symmetric memory), which is quicker than NCCL. That takes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qwen3vl_moe.ops.shared_memory import SharedMemory


class Ranks:
    """This process among those of a process group (torch.distributed's default one); alone unless told otherwise.

    Args:
        rank: of this process. The first one, 0, schedules and samples.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self.shared: SharedMemory | None = None  # where GPUs reach each other's memory

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share_memory(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Set memory aside for sums of up to ``rows`` rows, where these GPUs can; else why NCCL takes them all."""
        if self.alone or device.type != "cuda":
            return None
        problem = SharedMemory.problem(dtype, device, self.rank, self.size)
        if self.least(int(problem is None)):  # of_group waits for all of them
            shared, problem = SharedMemory.of_group(rows, width, dtype, device)
            if self.least(int(problem is None)):
                self.shared = shared
                return None
        return problem or "another rank cannot"

    def room(self, like: Tensor) -> Tensor | None:
        """Memory of the shape and dtype of ``like`` in which a part of a sum is best computed, if there is any.

        It holds the sum until the next one is taken.
        """
        return None if self.shared is None else self.shared.room(like)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of every rank's part, on all of them, in the memory of the part."""
        if self.alone:
            return part
        shared, room = self.shared, self.room(part)
        if shared is None or room is None:
            dist.all_reduce(part)
        elif room.data_ptr() == part.data_ptr():
            shared.sum_(part)
        else:
            part.copy_(shared.sum_(room.copy_(part)))
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
