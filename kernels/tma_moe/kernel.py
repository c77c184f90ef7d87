"""How one kernel is launched with little work on the host."""

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from triton.runtime import driver

from tma_moe.support import interpreting

_HERE = nullcontext()


class Launch:
    """A kernel with its constants. The first call compiles; later ones skip triton's argument binding.

    That is safe because an owner of launches fixes every dtype, all pointers are multiples of 16 bytes, and the kernels
    are declared not to specialise on the values of their integers. Triton's launch hooks (profilers) see first calls
    only. With `pdl`, programmatic dependent launch: the kernel has to wait for the one before it by itself.
    """

    def __init__(self, kernel, constants: tuple, warps: int = 4, stages: int = 1, pdl: bool = True) -> None:
        self.kernel = kernel
        self.constants = constants
        self.options = {"num_warps": warps, "num_stages": stages}
        if pdl and not interpreting():
            self.options["launch_pdl"] = True
        self.compiled = None
        self.direct: Callable | None = None
        self.kinds: tuple[str, ...] = ()  # of the arguments: "tensor", "descriptor", "number"

    def __call__(self, stream: int, grid: tuple[int, int, int], *args) -> None:
        compiled = self.compiled
        if compiled is None:
            # None again under the interpreter, which always takes this path.
            compiled = self.kernel[grid](*args, *self.constants, **self.options)
            self.kinds = tuple(map(_kind, args))
            self.direct = compiled and _direct_launcher(compiled)
            self.compiled = compiled
            return
        if self.direct is not None:
            self.direct(grid, stream, args, self.kinds, self.constants)
            return
        # Addresses rather than tensors: triton asks the driver about every tensor, which costs most of a launch.
        args = [arg.data_ptr() if kind == "tensor" else arg for arg, kind in zip(args, self.kinds, strict=True)]
        # What `compiled[grid](...)` does, less its look-ups of device, stream and hooks.
        scaffold = (compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*grid, stream, *scaffold, *args, *self.constants)


def _kind(arg: object) -> str:
    if isinstance(arg, torch.Tensor):
        return "tensor"
    return "descriptor" if hasattr(arg, "block_shape") else "number"


def _direct_launcher(compiled) -> Callable | None:
    """A call of triton 3.6's launcher in C, past its wrappers in Python; None for a triton with another launcher.

    The wrappers encode a descriptor at every launch. Here one that says `keeps_encoding` is encoded once for an address
    (policy "owned"), all others as they do it.
    """
    run = compiled.run
    if not triton.__version__.startswith("3.6.") or run.global_scratch_size or run.profile_scratch_size:
        return None  # another launcher, or one that has to allocate
    from triton.backends.nvidia.driver import make_tensordesc_arg

    launcher, metas = run.launch, getattr(compiled.metadata, "tensordesc_meta", None)
    if inspect.isfunction(launcher):  # the wrapper for kernels with descriptors
        launcher = inspect.getclosurevars(launcher).nonlocals["launcher"]
    function, packed = compiled.function, compiled.packed_metadata
    cooperative, pdl = run.launch_cooperative_grid, run.launch_pdl

    def encoded(descriptor, meta) -> list:
        if not getattr(descriptor, "keeps_encoding", False):
            return make_tensordesc_arg(descriptor, meta)
        address = descriptor.base.data_ptr()
        kept = descriptor.__dict__.get("encoding")
        if kept is None or kept[0] != address or kept[1] is not meta:
            kept = descriptor.__dict__["encoding"] = address, meta, make_tensordesc_arg(descriptor, meta)
        return kept[2]

    def launch(grid, stream, args, kinds, constants) -> None:
        flat, number = [], 0
        for arg, kind in zip(args, kinds, strict=True):
            if kind == "tensor":
                flat.append(arg.data_ptr())
            elif kind == "number":
                flat.append(arg)
            else:
                flat += encoded(arg, metas[number] if metas else None)
                number += 1
        launcher(*grid, stream, function, cooperative, pdl, None, None, packed, None, None, None, *flat, *constants)

    return launch


def device_guard(device: torch.device) -> AbstractContextManager:
    """Makes `device` current, as triton launches on the current device; free if it already is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@functools.cache
def _stream_of_index() -> Callable[[int], int]:
    return driver.active.get_current_stream


def current_stream(device: torch.device) -> int:
    """The handle of the stream that torch currently uses on `device`; 0 for the CPU, in the interpreter."""
    return _stream_of_index()(device.index) if device.type == "cuda" else 0
