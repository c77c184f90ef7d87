"""Nothing compiles while serving: on the CPU by the list of launches, on a card by Triton's own hook."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine import warm_up
from qwen3vl_moe.engine.kv_cache import cache_shape
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.model import Batch, Qwen3VLMoe
from qwen3vl_moe.ops import Segments, attend, cut_patches, patches, residual, resize_picture, rotation
from qwen3vl_moe.ops.ahead import sizes_to_compile
from qwen3vl_moe.ops.fp8_cache import FP8_CACHE
from tma_moe import op, recipe
from tma_moe.launcher import Launch, instead_of_launching

META = torch.device("meta")
OPTIONS = EngineOptions(max_num_seqs=200, max_prefill_tokens=8192)


@pytest.fixture(scope="module")
def model():
    """Two layers of the 30B sizes without memory, which takes every kernel's door as on an H100."""
    config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
    text, vision = replace(config.text, num_layers=2), replace(config.vision, depth=2, deepstack_indexes=(0,))
    with torch.device(META), pytest.MonkeyPatch.context() as patch:
        for module in (attend, patches, residual, rotation, warm_up):
            patch.setattr(module, "takes_kernels", lambda x: True)
        patch.setattr(attend, "gluon_attention_problem", lambda device: None)
        patch.setattr(op, "unavailable", lambda *_, **__: None)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        card = SimpleNamespace(multi_processor_count=132)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        recipe._buckets.cache_clear()
        yield Qwen3VLMoe(replace(config, text=text, vision=vision), moe="tma").to(torch.bfloat16)
    recipe._buckets.cache_clear()


def launched(run) -> set[Launch]:
    met: set[Launch] = set()
    with instead_of_launching(lambda launch, grid, args: met.add(launch)), torch.inference_mode():
        run()
    return met


@pytest.fixture(scope="module", params=[torch.bfloat16, FP8_CACHE], ids=["cache in bf16", "cache in FP8"])
def cache(model, request):
    return torch.empty(cache_shape(model.config.text, 40, 16, request.param), dtype=request.param, device=META)


@pytest.fixture(scope="module")
def warm(model, cache) -> set[Launch]:
    return launched(lambda: warm_up.walk(model, cache, OPTIONS))


def random_step(rng: random.Random, model: Qwen3VLMoe) -> Batch:
    """Some sequences decode, some read their prompt from its beginning or from within; perhaps with padding."""
    decoding = rng.choice([0, 1, 2, 7, 8, 40, 129, 200, rng.randint(0, 200)])
    prompts = rng.choice([0, 1, 1, 2, 5]) if decoding < 190 else 0
    left, q_lens, kv_lens = OPTIONS.max_prefill_tokens, [1] * decoding, [rng.randint(1, 3000) for _ in range(decoding)]
    for _ in range(prompts or not decoding):
        length = max(1, int(left * rng.random() ** rng.choice([1, 8])))
        left -= length
        q_lens.append(length)
        kv_lens.append(length + rng.choice([0, rng.randint(0, 30000)]))
    T, S = sum(q_lens), len(q_lens)
    tables = torch.zeros(S, rng.randint(1, 4000), dtype=torch.int32)
    zeros_T = torch.zeros(T, dtype=torch.int64)
    segments = Segments.build(q_lens, kv_lens, META, tables, 16)
    step = Batch(zeros_T, zeros_T.expand(3, -1), segments, zeros_T, logit_rows=zeros_T[: min(T, 200)])
    if rng.random() < 0.5:
        return step
    in_graph = replace(step, slots_T=zeros_T.int(), padding_T=None if T == 1 else zeros_T > 0)
    return in_graph if segments.reads_cache else replace(in_graph, segments=replace(segments, kv_lens=(T + 1,)))


def test_no_step_launches_what_was_not_compiled(model, cache, warm):
    rng, met = random.Random(0), set()
    for number in range(150):
        step = random_step(rng, model)
        new = launched(lambda step=step: model(step, cache)) - warm
        assert not new, (number, step.segments.q_lens[-5:], [(x.kernel.__name__, x.constants) for x in new])
        met |= launched(lambda step=step: model(step, cache))
    assert len(met) > 0.7 * len(warm)  # nearly all: the rest is the tower's


def test_no_image_launches_what_was_not_compiled(model, warm):
    rng, side = random.Random(1), model.config.vision.patch_size
    for _ in range(40):
        grids = [(1, 2 * rng.randint(1, 60), 2 * rng.randint(1, 60)) for _ in range(rng.randint(1, 5))]
        files = [(rng.randint(1, 2000), rng.randint(1, 2000), 3) for _ in grids]
        pixels = [torch.empty(shape, dtype=torch.uint8, device=META) for shape in files]
        numbers = tuple(rng.random() for _ in range(3))

        def encode(pixels=pixels, grids=grids, numbers=numbers):
            planes = [resize_picture(x, side * h, side * w) for x, (_, h, w) in zip(pixels, grids, strict=True)]
            model.encode_images(cut_patches(planes, (side, 2, 2), numbers, numbers, model.dtype), grids)

        assert launched(encode) <= warm


def test_sizes_end_at_the_most(model):
    experts = model.text.layers[0].moe.experts
    assert sizes_to_compile(8392, [experts], 8, "tma")[-1] == 8392
    assert sizes_to_compile(1, [experts], 8, "triton") == [1]
    assert sizes_to_compile(100, [], 8, "tma") == [1, 2, 4, 8, 16, 32, 64, 100]
