"""Steps replayed from CUDA graphs against the same steps launched eagerly, at the published widths with few layers."""

import dataclasses

import pytest
import torch

from benchmarking.random_weights import random_model
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine.cuda_graphs import StepGraphs, VisionGraphs, bucket_of, can_capture
from qwen3vl_moe.model import Batch, Qwen3VLMoe, VisionFeatures
from qwen3vl_moe.model.batch import VisualTokens
from qwen3vl_moe.ops import Segments

BLOCK = 16


def test_buckets():
    assert [bucket_of(n, (1, 2, 4)) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, None]


def test_a_cpu_model_is_not_captured(plain):
    assert not can_capture(Qwen3VLMoe.from_pretrained(plain.path, progress=False))


@pytest.fixture(scope="module")
def model():
    config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
    config = dataclasses.replace(
        config,
        # Every token goes to every expert: rounding cannot send it elsewhere.
        text=dataclasses.replace(config.text, num_layers=3, num_experts=8),
        vision=dataclasses.replace(config.vision, depth=3, deepstack_indexes=(0, 1)),
    )
    return random_model(config, "cuda", torch.bfloat16, moe="tma")


def step(new, lens, seed, visual_rows=()):
    """A step on the host: scattered blocks, all logits of last tokens, some rows visual."""
    generator = torch.Generator().manual_seed(seed)
    S, width = len(new), -(-max(lens) // BLOCK)
    tables = torch.randperm(S * width, generator=generator).view(S, width).int()
    slots, positions = [], []
    for s, (count, length) in enumerate(zip(new, lens, strict=True)):
        place = torch.arange(length - count, length)
        slots.append(tables[s, place // BLOCK].long() * BLOCK + place % BLOCK)
        positions.append(place)
    T, rows = sum(new), torch.tensor(visual_rows, dtype=torch.int64)
    visual = None
    if len(rows):
        embeds = torch.randn(len(rows), 2048, device="cuda", dtype=torch.bfloat16)
        visual = VisionFeatures(embeds, torch.randn(2, len(rows), 2048, device="cuda", dtype=torch.bfloat16))
    return Batch(
        input_ids_T=torch.randint(0, 150_000, (T,), generator=generator),
        positions_3T=torch.cat(positions).expand(3, -1),
        segments=Segments.build(new, lens, block_tables=tables, block_size=BLOCK),
        slots_T=torch.cat(slots),
        visual=visual and visual.at(rows),
        logit_rows=torch.tensor(new).cumsum(0) - 1,
    )


@pytest.mark.gpu
@torch.inference_mode()
def test_replayed_steps_equal_eager_ones(model):
    """A bucket may choose other tiles than the exact shape: at most twice the eager step's own error against fp32."""
    exact = Qwen3VLMoe(model.config, "reference").cuda()
    exact.load_state_dict(model.state_dict())
    cache = torch.randn(3, 2, 512, BLOCK, 4, 128, device="cuda", dtype=torch.bfloat16)
    graphs = StepGraphs(model, cache, max_num_seqs=8, max_model_len=640)
    steps = [
        step([1] * 3, [5, 300, 64], 0),
        step([1], [640], 1),
        step([100], [100], 2, range(10, 60)),
        step([1, 40, 1, 7], [30, 40, 200, 77], 3),
        step([1, 300], [9, 350], 4, range(1, 20)),
        step([50], [50], 5),
        step([1] * 8, [17] * 8, 6),
    ]
    for each in [*steps, *steps]:
        before = cache.clone()
        ours = graphs.run(each).clone()
        ours_cache = cache.clone()
        cache.copy_(before)
        eager = model(each.to("cuda"), cache)
        in_fp32 = each.to("cuda")
        if each.visual is not None:
            visual = in_fp32.visual
            in_fp32 = dataclasses.replace(
                in_fp32, visual=VisualTokens(visual.rows_M, visual.embeds_MH.float(), visual.deepstack_LMH.float())
            )
        exact_cache = before.float()
        truth = exact(in_fp32, exact_cache)
        assert (ours - truth).norm() <= 2 * (eager - truth).norm()
        rows = each.slots_T.cuda()
        written, eagerly, truth = (c.flatten(2, 3)[:, :, rows].float() for c in (ours_cache, cache, exact_cache))
        assert (written - truth).norm() <= 2 * (eagerly - truth).norm()
        untouched = torch.ones(512 * BLOCK, dtype=torch.bool, device="cuda")
        untouched[rows] = False
        assert torch.equal(ours_cache.flatten(2, 3)[:, :, untouched], before.flatten(2, 3)[:, :, untouched])


@pytest.mark.gpu
@torch.inference_mode()
def test_tokens_may_be_on_the_device_already(model):
    """Those of a decode step, as the step before has sampled them; a bucket's padding and its last ids do not show."""
    cache = torch.randn(3, 2, 512, BLOCK, 4, 128, device="cuda", dtype=torch.bfloat16)
    graphs = StepGraphs(model, cache, max_num_seqs=8, max_model_len=640)
    for seed in range(3):
        each = step([1] * 3, [5, 300, 64], seed)
        expected = graphs.run(each).clone()
        before = cache.clone()
        graphs.run(step([1] * 4, [9, 9, 9, 9], seed + 10))
        cache.copy_(before)  # that step may have written into blocks of this one
        on_device = dataclasses.replace(each, input_ids_T=each.input_ids_T.cuda())
        assert torch.equal(graphs.run(on_device), expected)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_step_that_fits_no_bucket_is_left_to_eager_launches(model):
    cache = torch.zeros(3, 2, 512, BLOCK, 4, 128, device="cuda", dtype=torch.bfloat16)
    graphs = StepGraphs(model, cache, max_num_seqs=2, max_model_len=4096)
    assert graphs.run(step([3000], [3000], 0)) is None
    assert graphs.run(step([1, 1, 1], [4, 4, 4], 0)) is None


@pytest.mark.gpu
@torch.inference_mode()
def test_replayed_images_equal_eager_ones(model):
    graphs = VisionGraphs(model)
    small, several = [(1, 12, 20)], [(1, 4, 4), (1, 36, 36), (1, 2, 30)]
    # Of one bucket: the same grids again, others of as many patches, and the first once more.
    for grids in (small, small, [(1, 20, 12)], small, several, [(1, 2, 2)]):
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), 1536)
        ours, eager = graphs.run(pixels, grids), model.encode_images(pixels, grids)
        for a, b in ((ours.embeds_MH, eager.embeds_MH), (ours.deepstack_LMH, eager.deepstack_LMH)):
            assert a.shape == b.shape
            assert (a - b).float().abs().max() <= 0.02 * b.float().abs().max()
    assert graphs.run(torch.randn(33 * 4, 1536), [(1, 2, 2)] * 33) is None
