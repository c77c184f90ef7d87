"""Which operations run in our Triton kernels, and which in plain torch.

The kernels take bf16 and fp16 tensors on any CUDA device; only the resize and the cutting of patches, whose input is
bytes, run in theirs for every dtype. The Gluon attention also needs a Hopper GPU, rows that TMA can address, and a
Triton whose Gluon API it supports; if only the last is missing, one warning says so, since nobody would notice
otherwise.
"""

from __future__ import annotations

import functools
import importlib
import warnings

import torch
from torch import Tensor

from tma_moe.support import CAPABILITY, capability, has_fp8_products

KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def takes_kernels(x: Tensor) -> bool:
    """Whether our small kernels take this tensor; if not, plain torch computes the same."""
    return x.is_cuda and x.dtype in KERNEL_DTYPES


def fp8_cache_problem(device: torch.device) -> str | None:
    """Why keys and values cannot be kept in FP8 on a device, or None: below 8.9 kernels cannot convert them."""
    if device.type != "cuda" or has_fp8_products(device):
        return None
    major, minor = capability(device)
    return f"it needs compute capability 8.9 or above, {device} has {major}.{minor}"


def attention_takes(head_dim: int) -> bool:
    """Whether our attention kernels take heads of this width.

    A matrix product needs at least 16 channels, and loads of 16 bytes need a multiple of 8.
    """
    return head_dim >= 16 and head_dim % 8 == 0


@functools.cache
def gluon_attention_problem(device: torch.device) -> str | None:
    """Why the Gluon attention does not run on a CUDA device, or None if it does."""
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return "it is written for Hopper GPUs"
    try:
        importlib.import_module("qwen3vl_moe.ops.kernels.hopper_attention")
    except Exception as error:  # Gluon is experimental: a new triton may break the import in any way
        reason = f"it cannot be imported ({type(error).__name__}: {error})"
        warnings.warn(
            f"the attention kernel for Hopper is off, {reason}; the Triton kernel does its work, a quarter slower",
            stacklevel=2,
        )
        return reason
    return None


def kernels_in_use(
    device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...], layer_cache: Tensor
) -> dict[str, str]:
    """What attention and the small operations run as, for people to read: "gluon", "triton" or "torch".

    A cache that the Gluon attention does not take, as one in FP8, is named beside it.
    """
    if device.type != "cuda" or dtype not in KERNEL_DTYPES:
        return {"attention": "torch", "small_ops": "torch"}
    if not all(map(attention_takes, head_dims)):
        return {"attention": "torch", "small_ops": "triton"}
    if gluon_attention_problem(device) is None:
        from qwen3vl_moe.ops.kernels.hopper_attention import takes_cache, takes_width

        if all(map(takes_width, head_dims)):
            attention = "gluon" if takes_cache(layer_cache) else "gluon; over the cache triton"
            return {"attention": attention, "small_ops": "triton"}
    return {"attention": "triton", "small_ops": "triton"}
