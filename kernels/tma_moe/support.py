"""What backends "tma" and "triton" need, and one clear sentence when it is not there."""

import functools
import importlib
import os
import re

import torch

from tma_moe.block_fp8 import FP8

MIN_TRITON = (3, 6)
CAPABILITY = (9, 0)  # of backend "tma"
PORTABLE_CAPABILITY = (8, 0)  # the first of backend "triton": tensor cores that multiply bf16
FP8_PRODUCTS = (8, 9)  # the first whose tensor cores multiply FP8
DTYPES = (torch.bfloat16, torch.float16)
WAY_OUT = 'use backend="reference"'
GLUON_PRODUCTS = ("weights_m_ws", "tokens_m_ws", "fp8_tokens_m_ws")  # files of gemm/ that are written in Gluon


@functools.cache
def interpreting() -> bool:
    """Whether triton runs kernels in its interpreter on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU that kernels for this device run on; Hopper's where there is none, and only code is made."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else CAPABILITY


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Whether kernels on this device are launched with programmatic dependent launch (pdl.py)."""
    return not interpreting() and capability(device) >= CAPABILITY


@functools.cache
def multiplies_from_shared_memory(device: torch.device) -> bool:
    """Whether matrix instructions read shared memory (wgmma, tcgen05), so that operands take no registers."""
    return capability(device)[0] in (9, 10)


@functools.cache
def has_fp8_products(device: torch.device) -> bool:
    """Whether tensor cores multiply FP8 there, and triton knows the type. The interpreter does."""
    return capability(device) >= FP8_PRODUCTS


@functools.cache
def triton_problem() -> str | None:
    """Why triton cannot be used in this process, or None."""
    try:
        triton = importlib.import_module("triton")
        importlib.import_module("triton.language")
        importlib.import_module("triton.tools.tensor_descriptor")
    except Exception as error:  # a broken install raises far more than ImportError
        return f"triton >= 3.6 is needed and cannot be imported ({type(error).__name__}: {error})"
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found is None or tuple(map(int, found.groups())) < MIN_TRITON:
        return f"triton >= 3.6 is needed, found {triton.__version__}"
    return None


@functools.cache
def gluon_problem() -> str | None:
    """Why the kernels in Gluon cannot be imported, or None: Gluon is experimental and may change with any triton."""
    problem = triton_problem()
    if problem is not None:
        return problem
    try:
        for name in GLUON_PRODUCTS:
            importlib.import_module(f"tma_moe.gemm.{name}")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def unavailable(
    device: torch.device | str,
    dtype: torch.dtype,
    sizes: tuple[int, ...] = (),
    weights: torch.dtype | None = None,
    backend: str = "tma",
) -> str | None:
    """Why a backend ("tma" or "triton") cannot run on `device` with activations and weights of `dtype`; None if it can.

    `sizes` are the hidden size and the expert width, where they are known: rows have to be whole 16 bytes for "tma".
    `weights` is the dtype of the weights where it is another one: float8_e4m3fn, with block scales.
    Both need triton >= 3.6 and bfloat16 or float16, "tma" a GPU of compute capability 9.0 (H100, H200), "triton" one of
    8.0 or above. Under triton's interpreter they run on the CPU, for tests, in float16 and float32 (the interpreter's
    bf16 products are wrong).
    """
    problem = _problem(torch.device(device), dtype, backend)
    weights = dtype if weights is None else weights
    if problem is None and weights not in (dtype, FP8):
        return f"weights of {weights} do not go with activations of {dtype}"
    odd = [size for size in sizes if size * weights.itemsize % 16 and backend == "tma"]
    if problem is None and odd:
        return f"rows of {odd[0]} values in {weights} are no whole 16 bytes, which TMA needs"
    return problem


@functools.cache
def _problem(device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    problem = triton_problem()
    if problem is not None:
        return problem
    if interpreting():
        if device.type != "cpu":
            return f"triton's interpreter (TRITON_INTERPRET) is on and needs CPU tensors, not {device}"
        if dtype not in (torch.float16, torch.float32):
            return f"triton's interpreter computes float16 and float32 only, not {dtype}"
        return None
    needed = "a Hopper GPU" if backend == "tma" else "a CUDA GPU"
    if device.type != "cuda":
        return f"{needed} is needed, the device is {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    found = torch.cuda.get_device_capability(index)
    if found != CAPABILITY if backend == "tma" else found < PORTABLE_CAPABILITY:
        which = "9.0" if backend == "tma" else "8.0 or above"
        name = f"{torch.cuda.get_device_name(index)} ({found[0]}.{found[1]})"
        return f"{needed} (compute capability {which}) is needed, cuda:{index} is {name}"
    if dtype not in DTYPES:
        return f"bfloat16 or float16 is needed, not {dtype}"
    return None
