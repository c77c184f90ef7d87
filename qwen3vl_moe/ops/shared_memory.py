"""Memory of one size on each GPU of a group, which all of them read and write: torch's symmetric memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = torch.bfloat16, torch.float32  # of which torch's kernel takes sums


class SharedMemory:
    """Room for one part of a sum on each GPU of torch.distributed's default group; made by :meth:`of_group`."""

    def __init__(self, buffer: Tensor, group: str):
        self._buffer, self._group = buffer, group

    @staticmethod
    def of_group(
        rows: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[SharedMemory | None, str | None]:
        """The memory, or why there is none. All of the group have to call it, each with its own device."""
        from torch.distributed import _symmetric_memory as symmetric  # half a second, which one rank does not need

        if dtype not in _DTYPES:
            return None, f"sums of {dtype} are not taken there"
        index, there = device.index or 0, torch.cuda.device_count()
        if not all(torch.cuda.can_device_access_peer(index, other) for other in range(there) if other != index):
            return None, "these GPUs do not reach each other's memory"
        group = dist.group.WORLD
        assert group is not None  # ranks are in one
        try:
            buffer = symmetric.empty(rows * width, dtype=dtype, device=device)
            symmetric.rendezvous(buffer, group)
        except RuntimeError as error:  # the system may forbid what it needs, as some containers do
            return None, f"torch's symmetric memory: {str(error).splitlines()[0]}"
        return SharedMemory(buffer, group.group_name), None

    def room(self, like: Tensor) -> Tensor | None:
        """Memory of the shape and dtype of ``like``; None if it is too large, or of another dtype."""
        if like.numel() > self._buffer.numel() or like.dtype != self._buffer.dtype:
            return None
        return self._buffer[: like.numel()].view(like.shape)

    def sum_(self, part: Tensor) -> Tensor:
        """The sum of all parts, each of which was written to such room, in place.

        Each GPU adds up a piece of it in the order of the ranks and writes it to all: the bits are the same everywhere.
        It begins when all have their parts ready, and ends when all of it is everywhere.
        """
        return torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self._group)
