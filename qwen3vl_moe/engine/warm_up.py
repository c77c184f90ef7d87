"""Every kernel that a step may launch, compiled before the first request, so that none compiles while serving.

Which kernels a step launches depends on how many tokens it has, on whether sequences decode or read their prompts, on
whether these have a past, and on nothing else that changes from step to step. So a walk through a few steps of each
kind, of sizes that stand for all, meets every kernel. Nothing is computed: the launches only compile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from qwen3vl_moe.engine.kv_cache import cache_shape, cached_sizes
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.model import Batch, Qwen3VLMoe
from qwen3vl_moe.model.text import DecoderLayer
from qwen3vl_moe.ops import Segments, cut_patches, resize_picture
from qwen3vl_moe.ops.ahead import compile_ahead, sizes_to_compile
from qwen3vl_moe.ops.dispatch import takes_kernels

_IMAGE_SIDES = (4, 32)  # in merged patches: of each of the two ways in which the tower's rotation is launched


def steps(sizes: list[int], max_num_seqs: int, block_size: int, device: torch.device) -> Iterator[Batch]:
    """Steps of every kind and size: prompts from their beginning; prompts with a past; and decoding.

    The last two are as graphs have them: padded, with slots of 32 bits.
    """
    for T in sizes:
        kinds: list[tuple[tuple[int, ...], tuple[int, ...], bool]] = [((T,), (T,), False), ((T,), (T + 1,), True)]
        if max_num_seqs >= T:
            kinds.append(((1,) * T, (2,) * T, True))
        for q_lens, kv_lens, in_graph in kinds:
            zeros_T = torch.zeros(T, dtype=torch.int64, device=device)
            tables = torch.zeros(len(q_lens), -(-kv_lens[0] // block_size), dtype=torch.int32, device=device)
            yield Batch(
                input_ids_T=zeros_T,
                positions_3T=zeros_T.expand(3, -1),
                segments=Segments.build(q_lens, kv_lens, device, tables, block_size),
                slots_T=zeros_T.int() if in_graph else zeros_T,
                logit_rows=zeros_T[:max_num_seqs],
                padding_T=zeros_T > 0 if in_graph else None,
            )


@torch.inference_mode()
def compile_kernels(model: Qwen3VLMoe, options: EngineOptions, progress: bool) -> None:
    """Compile what any step of these options may launch, with a bar if ``progress``; nothing on a CPU."""
    if not takes_kernels(model.lm_head.weight):
        return
    lock = threading.Lock()
    with tqdm(desc="compiling kernels", disable=not progress) as bar:

        def report(done: int, asked: int) -> None:
            with lock:
                bar.total, bar.n = asked, done
                bar.refresh()

        with compile_ahead(report):
            dtype = options.cache_dtype(model.dtype)
            shape = cache_shape(cached_sizes(model), 1, options.block_size, dtype)
            cache = torch.empty(shape, dtype=dtype, device=model.device)
            walk(model, cache, options)


def walk(model: Qwen3VLMoe, cache: Tensor, options: EngineOptions) -> None:
    """Launch, whatever launching means here, every kernel that a step or an image may need."""
    layers = [cast(DecoderLayer, layer) for layer in model.text.layers]
    kinds = {layer.moe.experts.down.dtype: layer.moe.experts for layer in layers} if model.moe != "reference" else {}
    most, k = options.max_prefill_tokens + options.seats, model.config.text.experts_per_token
    sizes = sizes_to_compile(most, kinds.values(), k, model.moe)
    # The largest first, whose kernels take longest to compile.
    for step in steps(sizes[::-1], options.seats, cache.shape[3], model.device):
        model(step, cache)
    vision = model.config.vision
    sides = vision.patch_size, vision.merge_size, vision.temporal_patch_size
    half = 0.5, 0.5, 0.5
    for side in _IMAGE_SIDES:
        grid = (1, side * vision.merge_size, side * vision.merge_size)
        pixels_HW3 = torch.zeros(side, side, 3, dtype=torch.uint8, device=model.device)
        planes = resize_picture(pixels_HW3, grid[1] * vision.patch_size, grid[2] * vision.patch_size)
        model.encode_images(cut_patches([planes], sides, half, half, model.dtype), [grid])
