"""What this machine is, which kernels would run on it, and which checkpoints fit into its memory."""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarking.card import card
from benchmarking.random_weights import in_fp8
from qwen3vl_moe import Qwen3VLMoe, Qwen3VLMoeConfig
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.model.part import why_not
from qwen3vl_moe.ops import Ranks
from qwen3vl_moe.ops.dispatch import KERNEL_DTYPES, fp8_cache_problem, kernels_in_use
from qwen3vl_moe.weights.placement import free_bytes, not_taken, resolve_moe
from tma_moe.portable.targets import shared_memory
from tma_moe.support import has_fp8_products, has_pdl, interpreting

CONFIG = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
CHECKPOINTS = {"bf16": CONFIG, "FP8": in_fp8(CONFIG)}
CARDS = 1, 2, 4, 8
_STEP_BYTES = 2_000_000_000  # beside weights and cache: a step of 8,192 tokens, compiled kernels, torch itself
_CACHED_TOKENS = 8192


def describe(device: torch.device) -> dict[str, str]:
    """Card, capability, memory, versions: what a report about this machine has to say."""
    found = dict(card(device))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = properties.major, properties.minor
        found |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "shared memory of a program": f"{shared_memory(capability) // 1024} KB",
            "cards": str(torch.cuda.device_count()),
        }
    found["memory free"] = _gigabytes(free_bytes(device))
    if device.type == "cuda":
        found["memory"] = _gigabytes(torch.cuda.get_device_properties(device).total_memory)
    found["torch"] = torch.__version__  # with the build, which some packages' names leave out
    for name in ("triton", "transformers", "qwen3vl-moe"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"cuda": str(torch.version.cuda), "python": platform.python_version(), "system": platform.platform()}


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What would run as what for the 30B model on a device, and why not something faster."""
    text = CONFIG.text
    found = {}
    for name, config in CHECKPOINTS.items():
        taken = resolve_moe("auto", device, dtype, config.text)
        why = not_taken(taken, device, dtype, config.text)
        found[f"experts, {name}"] = taken if why is None else f"{taken} ({why})"
    cache = torch.empty(2, 1, 16, text.num_kv_heads, text.head_dim, dtype=dtype, device=device)
    heads = text.head_dim, CONFIG.vision.head_dim
    found |= kernels_in_use(device, dtype, heads, cache)
    on_card = device.type == "cuda" and dtype in KERNEL_DTYPES
    kernels_everywhere = on_card and not found["experts, bf16"].startswith("reference")
    found["CUDA graphs"] = "yes" if kernels_everywhere else "no"
    found["dependent launches"] = "yes" if on_card and has_pdl(device) else "no"
    multiplies = "in FP8" if on_card and has_fp8_products(device) else "widened to 16 bits"
    found["FP8 weights are multiplied"] = multiplies if kernels_everywhere else "in plain torch"
    found["FP8 cache"] = fp8_cache_problem(device) or "can be used"
    if interpreting():
        found["triton"] = "in its interpreter, on the CPU; FP8, which it rounds wrongly, is not checked"
    return found


def tile_notes(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What the tile files say about this card: that none was timed on it, or that Gluon is off."""
    from tma_moe import recipe

    moe = resolve_moe("auto", device, dtype, CONFIG.text)
    if moe == "reference" or interpreting():
        return []
    sizes = CONFIG.text.num_experts, CONFIG.text.experts_per_token, CONFIG.text.hidden_size, CONFIG.text.expert_width
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for fp8 in (False, True):
            recipe._Buckets(device, *sizes, fp8, moe)
    return list(dict.fromkeys(str(warning.message) for warning in caught))


@dataclass(frozen=True)
class Fit:
    """One way to hold a checkpoint: bytes that each card needs for weights, and in all; whether they are there."""

    checkpoint: str
    cards: int
    weights: int
    needed: int
    fits: bool


def fits(memory: int) -> Iterator[Fit]:
    """Every division of each checkpoint among cards of so many bytes of memory, of which the engine takes a part."""
    usable = int(memory * EngineOptions().gpu_memory_utilization)
    for name, config in CHECKPOINTS.items():
        for size in CARDS:
            if why_not(config.text, size) is not None:
                continue
            weights = max(_weight_bytes(name, rank, size) for rank in (0, size - 1))
            text = config.text
            cached = 2 * text.num_layers * max(1, text.num_kv_heads // size) * text.head_dim * 2 * _CACHED_TOKENS
            needed = weights + cached + _STEP_BYTES
            yield Fit(name, size, weights, needed, needed <= usable)


@functools.cache
def _weight_bytes(checkpoint: str, rank: int, size: int) -> int:
    with torch.device("meta"):
        model = Qwen3VLMoe(CHECKPOINTS[checkpoint], ranks=Ranks(rank, size)).set_dtype(torch.bfloat16)
    return sum(parameter.nbytes for parameter in model.parameters())


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
