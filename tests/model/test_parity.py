"""The whole model against transformers, and against itself: packed, chunked and cached."""

import dataclasses

import pytest
import torch

from benchmarking.random_weights import random_model
from qwen3vl_moe.model import Batch, Qwen3VLMoe, VisionFeatures
from qwen3vl_moe.model.rope import mrope_positions
from qwen3vl_moe.ops import Segments
from tests.model.prompts import CASES, VIDEO_CASES, assert_close_to_scale, make_prompt, oracle_logits


@pytest.fixture(scope="module")
def models(tiny):
    return {layout: Qwen3VLMoe.from_pretrained(path, progress=False) for layout, path in tiny.paths.items()}


@pytest.mark.parametrize("layout", ["transformers5", "published"])
@pytest.mark.parametrize("case", [*CASES, *VIDEO_CASES])
def test_logits_equal_transformers(tiny, models, layout, case):
    prompt = make_prompt(tiny.oracle.config, (CASES | VIDEO_CASES)[case])
    ours = models[layout].logits(*prompt.our_inputs())
    assert_close_to_scale(ours, oracle_logits(tiny.oracle, prompt))


def steps_of(model, prompts, cuts, block_size=4):
    """Run prompts through the paged cache, all of them in each step, each cut into chunks; the logits of each.

    Blocks are dealt out in a scattered order, so that a sequence's cache is not contiguous.
    """
    config = model.config
    blocks_each = max(-(-len(prompt.ids) // block_size) for prompt in prompts)
    order = torch.randperm(blocks_each * len(prompts), generator=torch.Generator().manual_seed(1))
    tables = order.view(len(prompts), blocks_each).int()
    cache = torch.full(
        (config.text.num_layers, 2, tables.numel(), block_size, config.text.num_kv_heads, config.text.head_dim),
        torch.nan,
    )
    cache = cache.to(model.dtype).to(model.device)
    features = [model.encode_images(p.pixels, p.grids) if p.grids else None for p in prompts]
    positions = [mrope_positions(p.ids, p.our_grids(config), config.vision.merge_size)[0] for p in prompts]
    out = [[] for _ in prompts]
    done = [0] * len(prompts)
    for cut in cuts:
        chosen = [i for i, prompt in enumerate(prompts) if done[i] < len(prompt.ids)]
        ids, places, slots, rows, visual, lengths = [], [], [], [], [], []
        for i in chosen:
            stop = min(done[i] + cut, len(prompts[i].ids))
            images_before = prompts[i].ids[: done[i]].count(config.image_token_id)
            images_until = prompts[i].ids[:stop].count(config.image_token_id)
            if images_until > images_before:
                visual.append(features[i].rows(images_before, images_until))
            for place in range(done[i], stop):
                if prompts[i].ids[place] == config.image_token_id:
                    rows.append(len(ids))
                ids.append(prompts[i].ids[place])
                slots.append(int(tables[i, place // block_size]) * block_size + place % block_size)
            places.append(positions[i][:, done[i] : stop])
            lengths.append(stop - done[i])
            done[i] = stop
        batch = Batch(
            input_ids_T=torch.tensor(ids, device=model.device),
            positions_3T=torch.cat(places, dim=1).to(model.device),
            segments=Segments.build(
                lengths,
                [done[i] for i in chosen],
                model.device,
                block_tables=tables[chosen].to(model.device),
                block_size=block_size,
            ),
            slots_T=torch.tensor(slots, device=model.device),
            visual=VisionFeatures.cat(visual).at(torch.tensor(rows, device=model.device)) if visual else None,
        )
        for i, logits in zip(chosen, model(batch, cache).split(lengths), strict=True):
            out[i].append(logits)
    return [torch.cat(parts) for parts in out]


def test_a_packed_batch_equals_transformers_alone(tiny, models):
    prompts = [make_prompt(tiny.oracle.config, images, seed) for seed, images in enumerate(CASES.values())]
    for ours, prompt in zip(steps_of(models["published"], prompts, [10_000]), prompts, strict=True):
        assert_close_to_scale(ours, oracle_logits(tiny.oracle, prompt))


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_chunks_equal_the_whole(tiny, models, cut):
    """Boundaries fall inside images; a cut of one token is decoding."""
    prompts = [make_prompt(tiny.oracle.config, images, seed) for seed, images in enumerate(CASES.values())]
    longest = max(len(prompt.ids) for prompt in prompts)
    for ours, prompt in zip(
        steps_of(models["transformers5"], prompts, [cut] * -(-longest // cut)), prompts, strict=True
    ):
        assert_close_to_scale(ours, models["transformers5"].logits(*prompt.our_inputs()), tolerance=2e-5)


def test_wanted_rows_are_the_same_logits(tiny, models):
    prompt = make_prompt(tiny.oracle.config, [])
    model = models["published"]
    positions, _ = mrope_positions(prompt.ids, {}, 2)
    batch = Batch(torch.tensor(prompt.ids), positions, Segments.build([len(prompt.ids)]))
    rows = torch.tensor([4, 1])
    some = model(dataclasses.replace(batch, logit_rows=rows))
    assert_close_to_scale(some, model(batch)[rows], tolerance=1e-5)  # the head's product has another shape


def broken_logits(model, prompt, *, section=None, deepstack=True, shift=0):
    """Our logits with one thing wrong."""
    config = model.config
    if section:
        model.text.config = dataclasses.replace(config.text, mrope_section=section)
    features = model.encode_images(prompt.pixels, prompt.grids)
    if not deepstack:
        features = VisionFeatures(features.embeds_MH, features.deepstack_LMH[:0])
    if shift:
        features = VisionFeatures(features.embeds_MH, features.deepstack_LMH.roll(shift, dims=1))
    ids = torch.tensor(prompt.ids)
    positions, _ = mrope_positions(prompt.ids, prompt.our_grids(config), config.vision.merge_size)
    rows = (ids == config.image_token_id).nonzero().flatten()
    try:
        return model(Batch(ids, positions, Segments.build([len(ids)]), visual=features.at(rows)))
    finally:
        model.text.config = config.text


@pytest.mark.parametrize(
    "fault",
    [
        {"deepstack": False},
        {"shift": 1},
        {"section": "swapped"},
    ],
    ids=["DeepStack removed", "DeepStack one token off", "two M-RoPE sections swapped"],
)
def test_the_comparison_notices_faults(make_tiny, fault):
    """The tolerance of the tests above is worth something: each fault moves the logits by ten times it and more."""
    tiny = make_tiny("odd")
    model = Qwen3VLMoe.from_pretrained(tiny.path, progress=False)
    if fault.get("section"):
        time, height, width = model.config.text.mrope_section
        fault = {"section": (time, width, height)}
    prompt = make_prompt(tiny.oracle.config, [(3, 4), (5, 2)])
    theirs = oracle_logits(tiny.oracle, prompt)
    assert_close_to_scale(broken_logits(model, prompt), theirs)
    error = (broken_logits(model, prompt, **fault) - theirs).abs().max() / theirs.abs().max()
    assert error > 10 * 1e-4


def test_pixels_and_grids_go_together(models, tiny):
    prompt = make_prompt(tiny.oracle.config, [(2, 2)])
    model = models["published"]
    with pytest.raises(ValueError, match="go together"):
        model.logits(prompt.ids, prompt.pixels)
    with pytest.raises(ValueError, match="belong to no image"):
        model.logits(prompt.ids)
    with pytest.raises(ValueError, match="pixel_values_videos and video_grid_thw go together"):
        model.logits(prompt.ids, *prompt.our_inputs()[1:3], prompt.pixels)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [10_000, 7, 1])
def test_the_gpu_path_is_as_good_as_plain_torch(make_tiny, cut):
    """bf16 on the card, through our attention and norm kernels: at most twice the error of plain torch in bf16.

    The checkpoint routes every token to every expert: else rounding sends a token near a tie to another expert now and
    then, and its error, and that of every token that attends to it, is that of the weights, not of the arithmetic.
    """
    tiny = make_tiny("dense_routing")
    prompts = [make_prompt(tiny.oracle.config, images, seed) for seed, images in enumerate(CASES.values())]
    cuts = [cut] * -(-max(len(prompt.ids) for prompt in prompts) // cut)
    plain = Qwen3VLMoe.from_pretrained(tiny.path, dtype=torch.bfloat16, progress=False)
    exact = Qwen3VLMoe.from_pretrained(tiny.path, dtype=torch.bfloat16, progress=False).float()
    fused = Qwen3VLMoe.from_pretrained(tiny.path, device="cuda", dtype=torch.bfloat16, moe="reference", progress=False)
    ours = torch.cat(steps_of(fused, prompts, cuts)).float().cpu()
    truth, peer = (torch.cat([model.logits(*p.our_inputs()).float() for p in prompts]) for model in (exact, plain))
    assert (ours - truth).norm() <= 2 * (peer - truth).norm()


def test_random_weights_are_reproducible_and_finite(plain):
    from qwen3vl_moe.config import Qwen3VLMoeConfig

    config = Qwen3VLMoeConfig.from_pretrained(plain.path)
    one, two, other = (random_model(config, seed=seed) for seed in (0, 0, 1))
    prompt = make_prompt(plain.oracle.config, [(2, 3)])
    logits = one.logits(*prompt.our_inputs())
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, two.logits(*prompt.our_inputs()))
    assert not torch.equal(logits, other.logits(*prompt.our_inputs()))
