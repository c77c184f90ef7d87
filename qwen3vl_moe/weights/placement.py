"""Where a model's parameters go and what computes with them: the device, the dtype, whether they fit, the experts."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import tma_moe
from qwen3vl_moe.config import Qwen3VLMoeConfig, TextConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.model.part import Part, why_not
from qwen3vl_moe.ops import Ranks
from qwen3vl_moe.weights.shards import DTYPES
from tma_moe.support import triton_problem

MOE_BACKENDS = ("auto", "tma", "triton", "reference")  # the faster ones first
_NARROW = 512  # hidden size: on a CPU, products of narrower models end before a second thread has begun
_THREADS_CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # the user's word on threads, in the environment


def parse_device(device: torch.device | str) -> torch.device:
    """The device of that name, with its number; for ``"auto"`` a GPU where there is one.

    Raises:
        OptionError: no such device is here, it is neither a CPU nor a CUDA GPU, or triton is missing for a GPU.
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
        found = torch.empty(0, device=parsed).device  # resolves "cuda" to the current one, and fails if there is none
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {str(device)!r} cannot be used here ({reason}); choose another, or cpu") from None
    if found.type == "cuda" and (problem := triton_problem()) is not None:  # of experts, attention, resize and all else
        raise OptionError(f"device {str(device)!r} cannot be used here: {problem}; install it, or choose cpu")
    return found


def settle_threads(device: torch.device, config: TextConfig) -> None:
    """Let torch compute narrow models in one thread on a CPU, in this whole process.

    More would gain nothing on an idle machine, and wait for each other most of the time on a busy one. What the
    environment says of threads holds.
    """
    chosen = any(os.environ.get(name) for name in _THREADS_CHOSEN)
    if device.type == "cpu" and config.hidden_size <= _NARROW and not chosen:
        torch.set_num_threads(1)


def parse_dtype(dtype: torch.dtype | str, declared: torch.dtype) -> torch.dtype:
    """The dtype of that name; ``declared``, the checkpoint's own, for ``"auto"``.

    Raises:
        OptionError: parameters cannot have this dtype.
    """
    if dtype == "auto":
        return declared
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or parsed not in DTYPES.values():
        raise OptionError(f"dtype {dtype} is not supported; choose from auto, bfloat16, float16, float32")
    return parsed


def resolve_moe(moe: str, device: torch.device | str, dtype: torch.dtype, config: TextConfig, ranks: int = 1) -> str:
    """``"tma"``, ``"triton"`` or ``"reference"`` for a device, dtype and sizes; ``"auto"`` takes the first that runs.

    Raises:
        OptionError: an unknown name, or kernels where something that they need is missing.
    """
    if moe not in MOE_BACKENDS:
        raise OptionError(f"moe={moe!r} is unknown; choose from {', '.join(MOE_BACKENDS)}")
    if moe == "auto":
        return next(each for each in MOE_BACKENDS[1:] if moe_problem(each, device, dtype, config, ranks) is None)
    reason = moe_problem(moe, device, dtype, config, ranks)
    if reason is not None:
        raise OptionError(f"moe={moe!r} cannot run here: {reason}; use moe='auto' or moe='reference'")
    return moe


def moe_problem(
    moe: str, device: torch.device | str, dtype: torch.dtype, config: TextConfig, ranks: int = 1
) -> str | None:
    """Why a backend cannot run a decoder of these sizes there, divided among so many ranks, or None."""
    if moe == "reference":
        return None
    sizes = config.hidden_size, len(Part.of(config, 0, ranks).width)
    kinds = [tma_moe.FP8] * bool(config.fp8_experts) + [dtype] * (len(config.fp8_experts) < config.num_layers)
    problems = (tma_moe.unavailable(device, dtype, sizes, weights, moe) for weights in kinds)
    return next((problem for problem in problems if problem is not None), None)


def not_taken(moe: str, device: torch.device, dtype: torch.dtype, config: TextConfig, ranks: int = 1) -> str | None:
    """Why ``"auto"``, which came to ``moe``, did not take the faster backend before it; None if there is none."""
    before = MOE_BACKENDS[MOE_BACKENDS.index(moe) - 1]
    return None if before == "auto" else moe_problem(before, device, dtype, config, ranks)


def require_division(config: TextConfig, ranks: int) -> None:
    """Refuse a number of ranks among which a decoder cannot be divided.

    Raises:
        OptionError: naming the size at fault; or it is no number of ranks.
    """
    if type(ranks) is not int or ranks < 1:
        raise OptionError(f"tensor_parallel_size={ranks!r}: a whole number from 1 on is needed")
    problem = why_not(config, ranks)
    if problem is not None:
        fitting = [size for size in range(1, config.num_heads + 1) if why_not(config, size) is None]
        choice = ", ".join(map(str, fitting))
        raise OptionError(f"tensor_parallel_size={ranks} cannot divide this model: {problem}; choose from {choice}")


def require_memory(
    device: torch.device,
    model_bytes: int,
    name: str | Path,
    dtype: torch.dtype,
    divided: Qwen3VLMoeConfig | None = None,
) -> None:
    """Refuse what cannot fit before the first allocation, with both numbers.

    Args:
        divided: of a model that could be divided among several GPUs: the refusal says among how many at least.

    Raises:
        OptionError: ``device`` has less than ``model_bytes`` free.
    """
    free = free_bytes(device)
    if free is None or model_bytes <= free:
        return
    way_out = "free some, or use another device"
    if divided is not None and device.type == "cuda" and (found := ranks_that_fit(divided, dtype, free)):
        way_out += f", or divide it: with tensor_parallel_size={found[0]}, {found[1] / 1e9:.1f} GB go to each GPU"
    raise OptionError(
        f"{name} takes {model_bytes / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, but {device} has "
        f"{free / 1e9:.1f} GB free: {way_out}"
    )


def rank_bytes(config: Qwen3VLMoeConfig, dtype: torch.dtype, ranks: int) -> int:
    """Bytes of the parameters that the first of ``ranks`` ranks holds; no other holds more."""
    with torch.device("meta"):
        model = Qwen3VLMoe(config, ranks=Ranks(0, ranks)).set_dtype(dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def ranks_that_fit(config: Qwen3VLMoeConfig, dtype: torch.dtype, free: int) -> tuple[int, int] | None:
    """The least number of ranks of which each has room in ``free`` bytes, and what it holds; None: there is none."""
    for ranks in range(1, config.text.num_heads + 1):
        if why_not(config.text, ranks) is None and (needed := rank_bytes(config, dtype, ranks)) <= free:
            return ranks, needed
    return None


def free_bytes(device: torch.device) -> int | None:
    """Memory that parameters could take on ``device``; None where that is not known."""
    if device.type == "cuda":
        # Torch's cached but unused memory is free for us, though the driver counts it as used.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError):
        return None
