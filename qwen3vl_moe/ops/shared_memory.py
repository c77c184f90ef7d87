"""Memory of one size on each GPU of a group, which all of them read and write: torch's symmetric memory."""

from __future__ import annotations

import ctypes

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = torch.bfloat16, torch.float32  # of which torch's kernel takes sums
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of the CUDA driver's API

_had_some = False  # this process, of any group


class SharedMemory:
    """Room for a part of a sum on each GPU of torch.distributed's default group; made by :meth:`of_group`.

    Attributes:
        rank, size: this GPU's place in the group, and how many there are.
        joined_rows: most rows of a sum that the norm after it takes by itself (kernels/ranks.py): so few that a launch
            costs more than reading every part on every GPU.
        rooms, flags: int64 [size], where memory for such sums and their flags lie on each GPU.
    """

    joined_rows = 128

    def __init__(self, rank: int, size: int, group: str, buffer: Tensor, rooms: Tensor, flags: Tensor, owned: object):
        self.rank, self.size, self._group, self._buffer = rank, size, group, buffer
        self.rooms, self.flags, self._owned, self._turn = rooms, flags, owned, 0

    @staticmethod
    def problem(dtype: torch.dtype, device: torch.device, rank: int, size: int) -> str | None:
        """Why this process can have none, as far as it knows by itself. Its group is on GPUs that follow each other."""
        if dtype not in _DTYPES:
            return f"sums of {dtype} are not taken there"
        index = device.index or 0
        if not all(_reaches(index, other) for other in range(index - rank, index - rank + size) if other != index):
            return "these GPUs have no atomic operations on each other's memory, as over NVLink"
        return "this process has had such memory in a group that has ended" if _had_some else None

    @classmethod
    def of_group(
        cls, rows: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[SharedMemory | None, str | None]:
        """The memory, or why there is none. All of the group have to call it, each with its own device.

        Only where none of them has a :meth:`problem`: they wait for each other. Flags have to be down on all GPUs
        before the first use: wait for all of the group once after it.
        """
        from torch.distributed import _symmetric_memory as symmetric  # half a second, which one rank does not need

        # Torch keeps what it knows of a group by its name, and all default groups of a process have the same one: the
        # second would look for its members where those of the first met.
        global _had_some
        _had_some = True
        group = dist.group.WORLD
        assert group is not None  # ranks are in one
        size = dist.get_world_size()
        try:
            buffer = symmetric.empty(rows * width, dtype=dtype, device=device)
            symmetric.rendezvous(buffer, group)
            joined = symmetric.empty(2 * cls.joined_rows * width, dtype=dtype, device=device)
            flags = symmetric.empty(cls.joined_rows * size, dtype=torch.int32, device=device)
            flags.zero_()
            torch.cuda.synchronize(device)
            addresses = [
                torch.tensor(symmetric.rendezvous(each, group).buffer_ptrs, dtype=torch.int64, device=device)
                for each in (joined, flags)
            ]
        except RuntimeError as error:  # the system may forbid what it needs, as some containers do
            return None, f"torch's symmetric memory: {str(error).splitlines()[0]}"
        return cls(dist.get_rank(), size, group.group_name, buffer, *addresses, owned=(joined, flags)), None

    def room(self, like: Tensor) -> Tensor | None:
        """Memory of the shape and dtype of ``like``; None if it is too large, or of another dtype."""
        if like.numel() > self._buffer.numel() or like.dtype != self._buffer.dtype:
            return None
        return self._buffer[: like.numel()].view(like.shape)

    def joins(self, x_TH: Tensor) -> bool:
        """Whether the norm after a sum of this shape takes the sum by itself."""
        return 0 < len(x_TH) <= self.joined_rows and x_TH.dtype == self._buffer.dtype

    def next_turn(self) -> int:
        """0 and 1 by turns."""
        self._turn ^= 1
        return self._turn

    def sum_(self, part: Tensor) -> Tensor:
        """The sum of all parts, each of which was written to such room, in place.

        Each GPU adds up a piece of it in the order of the ranks and writes it to all: the bits are the same everywhere.
        It begins when all have their parts ready, and ends when all of it is everywhere.
        """
        return torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self._group)


def _reaches(index: int, other: int) -> bool:
    """Whether one GPU can read and write another's memory, and exchange values there atomically: not over PCIe."""
    if not torch.cuda.can_device_access_peer(index, other):
        return False
    atomic = ctypes.c_int(0)
    failed = ctypes.CDLL("libcuda.so.1").cuDeviceGetP2PAttribute(ctypes.byref(atomic), _NATIVE_ATOMICS, index, other)
    return not failed and atomic.value == 1
