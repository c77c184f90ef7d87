"""How one kernel is launched with little work on the host, and how many are compiled ahead of their first launch."""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
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
        if (act := _instead.get()) is not None:
            act(self, grid, args)
            return
        if compiled is None:
            # None again under the interpreter, which always takes this path.
            self.compiled = self.kernel[grid](*args, *self.constants, **self.options)
            return
        # Addresses rather than tensors: triton asks the driver about every tensor, which costs most of a launch.
        plain = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        # What `compiled[grid](...)` does, less its look-ups of device, stream and hooks.
        scaffold = (compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*grid, stream, *scaffold, *plain, *self.constants)


Instead = Callable[[Launch, tuple[int, int, int], tuple], None]
_instead: ContextVar[Instead | None] = ContextVar("what this thread's launches do instead of launching", default=None)


@contextmanager
def instead_of_launching(act: Instead) -> Iterator[None]:
    """Within it, every launch of this thread calls ``act(launch, grid, arguments)``, and nothing runs on the device."""
    token = _instead.set(act)
    try:
        yield
    finally:
        _instead.reset(token)


@contextmanager
def compile_ahead(report: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Within it, launches run nothing: their kernels are only compiled, side by side in threads.

    A program that walks through all that it will ever launch, on tensors of any content, has every kernel ready on
    leaving. Without this, each is compiled at its first launch, while everything waits. (Triton's compiler releases the
    interpreter lock, so threads use all cores.) Begin with what takes longest.

    Args:
        report: called, in any thread, with how many kernels are compiled and how many there are, as either grows.
    """
    done, asked = 0, 0

    def tell() -> None:
        if report is not None:
            report(done, asked)

    class Pool(ThreadPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            nonlocal asked
            asked += 1
            tell()
            future = super().submit(_load, fn, *args, **kwargs)
            future.add_done_callback(finished)
            return future

    def finished(_: object) -> None:
        nonlocal done
        done += 1
        tell()

    met: set[Launch] = set()

    def compile_it(launch: Launch, grid: tuple[int, int, int], args: tuple) -> None:
        if launch.compiled is None and launch not in met:
            met.add(launch)
            launch.kernel.warmup(*args, *launch.constants, grid=grid, **launch.options)

    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def begin() -> None:
        if device is not None:
            torch.cuda.set_device(device)

    pool = Pool(len(os.sched_getaffinity(0)), "compile", begin)
    with pool, triton.AsyncCompileMode(pool), instead_of_launching(compile_it):
        yield


def _load(compile_it: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compile a kernel and load it, too: for its first launch triton calls a C compiler, which takes as long."""
    kernel = compile_it(*args, **kwargs)
    _ = kernel.run  # loads where it is first looked at
    return kernel


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
