"""Launching small kernels with little work on the host: a compiled kernel is kept for its dtypes and constants.

Triton's own launch finds out from its arguments, every time, which compiled kernel they need; a
:class:`tma_moe.launcher.Launch` is told once.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from tma_moe.launcher import Launch, current_stream, device_guard
from tma_moe.support import interpreting


@functools.cache
def _kept(
    kernel, device: torch.device, dtypes: tuple[torch.dtype, ...], constants: tuple, warps: int, early: bool
) -> Launch:
    # Device and dtypes are only part of the key: a compiled kernel belongs to both.
    return Launch(kernel, constants, warps, pdl=early)


def run_kept(
    kernel,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple,
    constants: tuple,
    warps: int,
    early: bool = True,
) -> None:
    """Launch a small kernel with little work on the host.

    Its arguments are tensors, numbers and constants; it does not specialise on its numbers. One that may begin before
    the kernel before it has ended (``early``; not behind a copy) has a last constant that says whether it does.
    """
    if early:
        constants = (*constants, not interpreting())
    if any(x.data_ptr() % 16 for x in tensors):
        # A kept kernel relies on addresses that are multiples of 16 bytes, which the engine's are.
        kernel[grid](*tensors, *numbers, *constants, num_warps=warps)
        return
    device = tensors[0].device
    launch = _kept(kernel, device, tuple(x.dtype for x in tensors), constants, warps, early)
    with device_guard(device):
        launch(current_stream(device), grid, *tensors, *numbers)


def row_block(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds a row of this width."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 8)
