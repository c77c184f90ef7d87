"""What backend "tma" needs, and one clear sentence when it is not there."""

import functools
import importlib
import os
import re

import torch

from tma_moe.block_fp8 import FP8

MIN_TRITON = (3, 6)
CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
WAY_OUT = 'use backend="reference"'
GLUON_PRODUCTS = ("weights_m_ws", "tokens_m_ws", "fp8_tokens_m_ws")  # files of gemm/ that are written in Gluon


@functools.cache
def interpreting() -> bool:
    """Whether triton runs kernels in its interpreter on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Whether kernels on this device can be launched with programmatic dependent launch (pdl.py)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


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
    device: torch.device | str, dtype: torch.dtype, sizes: tuple[int, ...] = (), weights: torch.dtype | None = None
) -> str | None:
    """Why backend "tma" cannot run on `device` with activations and weights of `dtype`; None if it can.

    `sizes` are the hidden size and the expert width, where they are known: rows have to be whole 16 bytes. `weights` is
    the dtype of the weights where it is another one: float8_e4m3fn, with block scales.
    It needs triton >= 3.6, a GPU of compute capability 9.0 (H100, H200) and bfloat16 or float16. Under triton's
    interpreter it runs on the CPU, for tests, in float16 and float32 (the interpreter's bf16 products are wrong).
    """
    problem = _problem(torch.device(device), dtype)
    weights = dtype if weights is None else weights
    if problem is None and weights not in (dtype, FP8):
        return f"weights of {weights} do not go with activations of {dtype}"
    odd = [size for size in sizes if size * weights.itemsize % 16]
    if problem is None and odd:
        return f"rows of {odd[0]} values in {weights} are no whole 16 bytes, which TMA needs"
    return problem


@functools.cache
def _problem(device: torch.device, dtype: torch.dtype) -> str | None:
    problem = triton_problem()
    if problem is not None:
        return problem
    if interpreting():
        if device.type != "cpu":
            return f"triton's interpreter (TRITON_INTERPRET) is on and needs CPU tensors, not {device}"
        if dtype not in (torch.float16, torch.float32):
            return f"triton's interpreter computes float16 and float32 only, not {dtype}"
        return None
    if device.type != "cuda":
        return f"a Hopper GPU is needed, the device is {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    capability = torch.cuda.get_device_capability(index)
    if capability != CAPABILITY:
        name = f"{torch.cuda.get_device_name(index)} ({capability[0]}.{capability[1]})"
        return f"a Hopper GPU (compute capability 9.0) is needed, cuda:{index} is {name}"
    if dtype not in DTYPES:
        return f"bfloat16 or float16 is needed, not {dtype}"
    return None
