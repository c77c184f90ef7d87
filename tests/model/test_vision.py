"""The vision tower against transformers, part by part."""

import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.model.vision import PatchPlan
from qwen3vl_moe.ops.reference import mix_positions
from tests.model.prompts import assert_close_to_scale, make_prompt


@pytest.fixture(scope="module")
def tower(tiny):
    return Qwen3VLMoe.from_pretrained(tiny.path, progress=False).vision


def test_patch_embedding_is_the_convolution(tiny, tower):
    pixels = make_prompt(tiny.oracle.config, [(3, 4)]).pixels
    theirs = tiny.oracle.model.visual.patch_embed(pixels)
    assert tower.patch_embed.weight.shape == theirs.shape[1:] + pixels.shape[1:]
    # A sum of some hundred products in another order: 100 roundings of 6e-8, and every one of them at its worst.
    assert_close_to_scale(tower.patch_embed(pixels), theirs, tolerance=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (8, 8), (13, 2)])
def test_position_embeddings_are_interpolated_alike(tiny, tower, size):
    config = tower.config
    grids = [(1, size[0] * config.merge_size, size[1] * config.merge_size), (2, config.merge_size, config.merge_size)]
    index, weight = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), config.grid_side, "bilinear", True, config.merge_size
    )
    table = tiny.oracle.model.visual.pos_embed.weight
    theirs = (table[index] * weight[:, :, None]).sum(1)
    plan = PatchPlan.build(grids, config)
    assert_close_to_scale(mix_positions(table, plan.index_P4, plan.weight_P4), theirs, tolerance=1e-6)


@pytest.mark.parametrize("images", [[(3, 4)], [(1, 5), (7, 2), (3, 3)], [(1, 1)]])
def test_features_and_deepstack_equal_transformers(tiny, tower, images):
    prompt = make_prompt(tiny.oracle.config, images)
    with torch.no_grad():
        theirs = tiny.oracle.model.visual(prompt.pixels, torch.tensor(prompt.grids))
        ours = tower(prompt.pixels, prompt.grids)
    assert_close_to_scale(ours.embeds_MH, theirs.pooler_output, tolerance=2e-5)
    assert len(ours.deepstack_LMH) == len(theirs.deepstack_features) == len(tower.config.deepstack_indexes)
    for our_layer, their_layer in zip(ours.deepstack_LMH, theirs.deepstack_features, strict=True):
        assert_close_to_scale(our_layer, their_layer, tolerance=2e-5)


def test_images_do_not_see_each_other(tiny, tower):
    prompt = make_prompt(tiny.oracle.config, [(3, 4), (2, 5)])
    with torch.no_grad():
        together = tower(prompt.pixels, prompt.grids)
        patches = prompt.grids[0][1] * prompt.grids[0][2]
        alone = [tower(prompt.pixels[:patches], prompt.grids[:1]), tower(prompt.pixels[patches:], prompt.grids[1:])]
    # The same sums, though a matrix product of another shape may add in another order.
    assert_close_to_scale(together.embeds_MH, torch.cat([part.embeds_MH for part in alone]), tolerance=2e-5)
    for start, stop, part in ((0, 12, alone[0]), (12, 22, alone[1])):
        if len(tower.config.deepstack_indexes):
            assert_close_to_scale(together.rows(start, stop).deepstack_LMH, part.deepstack_LMH, tolerance=2e-5)


def test_wrong_patches_are_refused(tower):
    with pytest.raises(ValueError, match="but the grids say"):
        tower(torch.zeros(3, tower.config.patch_dim), [(1, 6, 6)])
