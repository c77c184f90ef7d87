"""How much of a device's memory the cache may take: what a step and the graphs need beside it is measured."""

from __future__ import annotations

import math

import torch

from qwen3vl_moe.engine.cuda_graphs import StepGraphs, VisionGraphs, uses_graphs
from qwen3vl_moe.engine.kv_cache import cache_shape, cached_sizes
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.model import Batch, Qwen3VLMoe
from qwen3vl_moe.ops import Segments
from qwen3vl_moe.ops.ahead import allocate_only

_MARGIN = 256 << 20  # for what allocators round up


@torch.inference_mode()
def free_cache_bytes(model: Qwen3VLMoe, options: EngineOptions) -> int | None:
    """Device memory that the cache may take: what is left of ``gpu_memory_utilization`` beside the model and a step.

    Kernels have to be compiled already, as they take memory, too. None on a CPU, where the cache has a bound of its
    own.
    """
    device = model.device
    if device.type != "cuda":
        return None
    needed = _step_bytes(model, options) + _MARGIN
    if uses_graphs(model, options):
        needed += _graph_bytes(model, options)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - options.gpu_memory_utilization) * total - needed)


def _step_bytes(model: Qwen3VLMoe, options: EngineOptions) -> int:
    """Peak of a step: images of ``max_encoder_tokens`` (a thousand each), whose features are kept while
    ``max_prefill_tokens`` go through the decoder beside ``max_num_seqs`` that decode; of all of these a token is drawn.

    Our kernels allocate nothing, so they are left out.
    """
    device, vision = model.device, model.config.vision
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    grid = (-(-options.max_encoder_tokens // 1024), 32 * vision.merge_size, 32 * vision.merge_size)
    pixels_PC = torch.zeros(math.prod(grid), vision.patch_dim, dtype=model.dtype, device=device)
    places = torch.arange(options.max_prefill_tokens + options.seats, device=device)
    segments = Segments.build([len(places)], device=device)
    step = Batch(torch.zeros_like(places), places.expand(3, -1), segments, logit_rows=places[: options.seats])
    with allocate_only():
        features = model.encode_images(pixels_PC, [grid])
        logits_RV = model(step).float()
        _ = logits_RV / 2, logits_RV.softmax(-1), torch.empty_like(logits_RV)  # as sampling does
    del features
    return torch.cuda.max_memory_allocated(device) - before


def _graph_bytes(model: Qwen3VLMoe, options: EngineOptions) -> int:
    """What all graphs take. They are made for this, over a cache of one block, and made again over the real one."""
    text, device = model.config.text, model.device
    dtype = options.cache_dtype(model.dtype)
    cache = torch.zeros(cache_shape(cached_sizes(model), 1, options.block_size, dtype), dtype=dtype, device=device)
    torch.cuda.synchronize(device)
    before, _ = torch.cuda.mem_get_info(device)
    graphs = StepGraphs(model, cache, options.seats, options.model_len(text.max_positions)), VisionGraphs(model)
    for kind in [kind for each in graphs for kind in each.makers()]:
        for make in kind:
            make()
    torch.cuda.synchronize(device)
    return max(0, before - torch.cuda.mem_get_info(device)[0])
