"""Tensors from the host to the device, in copies that the host only starts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MUCH = 1 << 15  # bytes: torch copies as many numbers in one thread


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. The copy starts from pinned memory: from any other the host would have to wait for it."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        _fill(pinned, x)
        x = pinned
    return x.to(device, non_blocking=True)


def all_to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Several tensors on a device; those on the host go in one copy, as each copy costs the host a launch."""
    device = torch.device(device)
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    moved = [x for x in tensors if not x.is_cuda]
    # Sections begin at multiples of 16 bytes, which lets kernels be launched from the cache (kernels/launch.py).
    ends = list(itertools.accumulate(-(-x.nbytes // 16) * 16 for x in moved))
    buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=True)
    for x, section in zip(moved, _sections(buffer, moved, ends), strict=True):
        _fill(section, x)
    there = iter(_sections(buffer.to(device, non_blocking=True), moved, ends))
    return [x if x.is_cuda else next(there) for x in tensors]


def _fill(section: Tensor, x: Tensor) -> None:
    if x.nbytes < _MUCH:
        section.copy_(x)
        return
    # Torch would copy in all its threads, for which a busy host takes milliseconds; NumPy copies in this one.
    here, there = (each.contiguous().view(-1).view(torch.uint8).numpy() for each in (x, section))
    np.copyto(there, here)


def _sections(buffer: Tensor, like: Sequence[Tensor], ends: Sequence[int]) -> list[Tensor]:
    begins = [0, *ends[:-1]]
    return [buffer[at : at + x.nbytes].view(x.dtype).view(x.shape) for at, x in zip(begins, like, strict=True)]
