"""Sizes and switches of the engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.ops.fp8_cache import FP8_CACHE

_MOST_SEQS, _CPU_SEQS, _TOKENS_PER_SEAT = 512, 128, 128
_DEFAULT_MODEL_LEN = 32768  # the published model could do 262144, which is 24 GiB of cache for a single sequence


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine.

    Attributes:
        max_model_len: most tokens of prompt and answer; None: 32768, or fewer where the model or the cache hold fewer.
        max_num_seqs: most sequences in a step; None: 512 on a GPU, or fewer where the cache has not 128 tokens for each
            of them; 128 on a CPU, where more gain nothing.
        max_prefill_tokens: most prompt tokens in a step.
        max_encoder_tokens: most tokens of images that are encoded in a step, which bounds the tower's memory and time
            in it. A larger image is encoded in a step of its own.
        block_size: tokens in a cache block.
        num_blocks: cache blocks; None sizes the cache from the memory of the device.
        gpu_memory_utilization: part of the device's memory that weights, steps and cache may take together.
        seed: of the tokens of requests that bring none: the same calls in the same order give the same tokens.
        enforce_eager: launch every kernel of every step, instead of replaying small steps from CUDA graphs.
        async_scheduling: launch a step of decoding before the tokens of the last one are read, so that the device does
            not wait for the host. A sequence that turns out to have ended is computed once more for nothing. None: on
            a GPU; on a CPU it gains nothing.
        kv_cache_dtype: "auto", that of the model, or "fp8": half the bytes, with a scale for every token and head.
        enable_prefix_caching: let a prompt that begins like an earlier one, images included, reuse its cache blocks.

    Raises:
        OptionError: a value is outside of what is possible; the message names it.
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_prefill_tokens: int = 8192
    max_encoder_tokens: int = 8192
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        sizes = "max_model_len", "max_num_seqs", "max_prefill_tokens", "max_encoder_tokens", "block_size", "num_blocks"
        for name in sizes:
            value = getattr(self, name)
            is_left_open = value is None and name in ("max_model_len", "max_num_seqs", "num_blocks")
            if not is_left_open and (type(value) is not int or value < 1):
                raise OptionError(f"{name}={value!r}: an integer of at least 1 is needed")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise OptionError(f"seed={self.seed!r}: an integer from 0 to 2**63 - 1 is needed")
        for name in ("enforce_eager", "enable_prefix_caching"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name}={getattr(self, name)!r}: True or False is needed")
        if self.async_scheduling is not None and type(self.async_scheduling) is not bool:
            raise OptionError(f"async_scheduling={self.async_scheduling!r}: True, False or None is needed")
        if self.kv_cache_dtype not in ("auto", "fp8"):
            raise OptionError(f"kv_cache_dtype={self.kv_cache_dtype!r} is unknown; choose from auto, fp8")
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise OptionError(f"gpu_memory_utilization={share!r}: a number in (0, 1] is needed")

    def with_seats(self, num_blocks: int | None, on_gpu: bool) -> EngineOptions:
        """The same with ``max_num_seqs`` settled: by the size of the cache, or as it may be at most."""
        if self.max_num_seqs is not None:
            return self
        fed = _MOST_SEQS if num_blocks is None else num_blocks * self.block_size // _TOKENS_PER_SEAT
        return replace(self, max_num_seqs=max(1, min(fed, _MOST_SEQS)) if on_gpu else _CPU_SEQS)

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the tensor that holds keys and values, beside a model of ``dtype``."""
        return FP8_CACHE if self.kv_cache_dtype == "fp8" else dtype

    @property
    def seats(self) -> int:
        """``max_num_seqs`` once it is settled."""
        assert self.max_num_seqs is not None, "with_seats() settles it"
        return self.max_num_seqs

    def model_len(self, max_positions: int) -> int:
        """The length limit before the cache has its say.

        Raises:
            OptionError: longer than the model's positions.
        """
        if self.max_model_len is not None and self.max_model_len > max_positions:
            raise OptionError(
                f"max_model_len={self.max_model_len} is longer than the model's {max_positions} positions "
                "(max_position_embeddings); lower it"
            )
        return self.max_model_len or min(max_positions, _DEFAULT_MODEL_LEN)
