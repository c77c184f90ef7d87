"""Where a model's parameters go and as what: the device, the dtype, and whether they fit."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.shards import DTYPES


def parse_device(device: torch.device | str) -> torch.device:
    """The device of that name, with its number; for ``"auto"`` a GPU where there is one.

    Raises:
        OptionError: no such device is here, or it is neither a CPU nor a CUDA GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise OptionError(f"device {str(device)!r} is unknown; choose cpu, cuda or, of several GPUs, cuda:1") from None
    if parsed.type not in ("cpu", "cuda"):
        raise OptionError(f"device {str(device)!r} is not supported; choose cpu or cuda")
    try:
        return torch.empty(0, device=parsed).device  # resolves "cuda" to the current one, and fails if there is none
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {str(device)!r} cannot be used here ({reason}); choose another, or cpu") from None


def parse_dtype(dtype: torch.dtype | str, declared: torch.dtype) -> torch.dtype:
    """The dtype of that name; ``declared``, the checkpoint's own, for ``"auto"``.

    Raises:
        OptionError: parameters cannot have this dtype.
    """
    if dtype == "auto":
        return declared
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if parsed not in DTYPES.values():
        raise OptionError(f"dtype {dtype} is not supported; choose from auto, bfloat16, float16, float32")
    return parsed


def require_memory(device: torch.device, model_bytes: int, name: str | Path, dtype: torch.dtype) -> None:
    """Refuse what cannot fit before the first allocation, with both numbers.

    Raises:
        OptionError: ``device`` has less than ``model_bytes`` free.
    """
    free = free_bytes(device)
    if free is not None and model_bytes > free:
        raise OptionError(
            f"{name} takes {model_bytes / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, but {device} has "
            f"{free / 1e9:.1f} GB free: free some, or use another device"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that parameters could take on ``device``; None where that is not known."""
    if device.type == "cuda":
        # What torch holds but does not use counts as taken for the driver and as free for us.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError):
        return None
