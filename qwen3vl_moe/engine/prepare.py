"""What an engine needs before its first step: compiled kernels, and a cache of the size that the memory allows."""

from __future__ import annotations

import warnings

from qwen3vl_moe.engine.kv_cache import KVCache, cached_sizes, plan_cache
from qwen3vl_moe.engine.memory import free_cache_bytes
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.engine.warm_up import compile_kernels
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops.dispatch import fp8_cache_problem


def prepare(model: Qwen3VLMoe, options: EngineOptions, progress: bool) -> tuple[KVCache, EngineOptions, int]:
    """The cache, the options with the number of seats settled, and the longest sequence. All ranks have to call it.

    Raises:
        OptionError: there is no memory for what was asked for, or the device cannot do it.
    """
    problem = fp8_cache_problem(model.device) if options.kv_cache_dtype == "fp8" else None
    if problem is not None:
        raise OptionError(f"kv_cache_dtype='fp8' cannot be used here: {problem}; use kv_cache_dtype='auto'")
    on_gpu, ranks = model.device.type == "cuda", model.ranks
    most = options.with_seats(None, on_gpu)
    rows = most.max_prefill_tokens + most.seats
    slower = ranks.share_memory(rows, model.config.text.hidden_size, model.dtype, model.device)
    if slower is not None and ranks.first:
        warnings.warn(f"NCCL takes the sums over ranks, which is slower: {slower}", stacklevel=2)
    compile_kernels(model, most, progress)
    free_bytes = None if options.num_blocks else free_cache_bytes(model, most)
    if free_bytes is not None:
        free_bytes = ranks.least(free_bytes)
    dtype = options.cache_dtype(model.dtype)
    num_blocks, max_model_len = plan_cache(cached_sizes(model), dtype, most, free_bytes)
    num_blocks = ranks.least(num_blocks)
    options = options.with_seats(num_blocks, on_gpu)
    cache = KVCache(cached_sizes(model), num_blocks, options.block_size, dtype, model.device)
    return cache, options, max_model_len
