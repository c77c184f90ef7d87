"""How one kernel is launched with little work on the host."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from triton.runtime import driver

from tma_moe.support import interpreting

_HERE = nullcontext()


class Launch:
    """A kernel with its constants. The first call compiles; later ones skip triton's argument binding.

    That is safe because an owner of launches fixes every dtype, all pointers are multiples of 16 bytes, and the kernels
    are declared not to specialise on the values of their integers. Triton's launch hooks (profilers) see first calls
    only. With `pdl`, programmatic dependent launch: the kernel has to keep the contract of pdl.py.
    """

    def __init__(self, kernel: Any, constants: tuple, warps: int = 4, stages: int = 1, pdl: bool = True) -> None:
        self.kernel = kernel
        self.constants = constants
        self.options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
        if pdl and not interpreting():
            self.options["launch_pdl"] = True
        self.compiled: Any = None

    def __call__(self, stream: int, grid: tuple[int, int, int], *args: Any) -> None:
        compiled = self.compiled
        if compiled is None:
            # None again under the interpreter, which always takes this path.
            self.compiled = self.kernel[grid](*args, *self.constants, **self.options)
            return
        # Addresses rather than tensors: triton asks the driver about every tensor, which costs most of a launch.
        plain = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        # What `compiled[grid](...)` does, less its look-ups of device, stream and hooks.
        scaffold = (compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*grid, stream, *scaffold, *plain, *self.constants)


def device_guard(device: torch.device) -> AbstractContextManager:
    """Makes `device` current, as triton launches on the current device; free if it already is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@functools.cache
def _stream_of_index() -> Callable[[int], int]:
    active: Any = driver.active  # of NVIDIA's back end, which its base class does not promise
    return active.get_current_stream


def current_stream(device: torch.device) -> int:
    """The handle of the stream that torch currently uses on `device`; 0 for the CPU, in the interpreter."""
    return _stream_of_index()(device.index) if device.type == "cuda" else 0
