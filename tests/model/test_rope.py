"""Positions and rotary angles against transformers."""

import subprocess
import sys

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import apply_rotary_pos_emb
from transformers.vision_utils import get_vision_position_ids

from qwen3vl_moe.model.rope import (
    inverse_frequencies,
    mrope_angles,
    mrope_positions,
    vision_angles,
    vision_positions,
)
from qwen3vl_moe.ops.reference import rotate
from tests.model.prompts import CASES, VIDEO_CASES, make_prompt


@pytest.mark.parametrize("images", [*CASES.values(), *VIDEO_CASES.values(), [(2, 2), (2, 2)], [(1, 1)], [(9, 1)]])
def test_positions_equal_transformers(tiny, images):
    config = tiny.oracle.config
    prompt = make_prompt(config, images)
    inputs = prompt.oracle_inputs(config)
    theirs, delta = tiny.oracle.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
    )
    ours, next_position = mrope_positions(prompt.ids, prompt.our_grids(config), config.vision_config.spatial_merge_size)
    assert torch.equal(ours, theirs[:, 0])
    assert next_position == len(prompt.ids) + int(delta)


def test_positions_of_a_prompt_worked_by_hand():
    image = 9
    ids = [1, 2, image, image, image, image, image, image, 3]
    positions, next_position = mrope_positions(ids, {image: [(1, 4, 6)]}, 2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert next_position == 6


def test_images_without_text_between_them_keep_their_own_grids():
    image = 9
    positions, next_position = mrope_positions([image] * 4, {image: [(1, 2, 2), (1, 2, 6)]}, 2)
    assert positions.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 2, 3]]
    assert next_position == 4


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, 9, 9, 1], [(1, 4, 4)], "needs 4 consecutive"),
        ([9, 9, 1, 9, 9], [(1, 4, 4)], "needs 4 consecutive"),
        ([1, 9, 9], [(1, 2, 2)], "1 placeholder tokens"),
        ([1, 9], [], "belong to no image"),
        ([1, 2], [(1, 2, 2)], "number 0 of token 9 has no placeholders"),
        ([1, 9, 8], [(1, 2, 2)], "1 placeholder tokens .id 8. belong to no image"),
        ([1, 9, 8], [(1, 2, 4)], "needs 2 consecutive"),
    ],
)
def test_placeholders_and_grids_must_match(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        mrope_positions(ids, {9: grids, 8: []}, 2)


def test_angles_and_rotation_equal_transformers(tiny):
    config = tiny.oracle.config.text_config
    prompt = make_prompt(tiny.oracle.config, [(3, 4), (2, 7)])
    merge = tiny.oracle.config.vision_config.spatial_merge_size
    positions, _ = mrope_positions(prompt.ids, prompt.our_grids(tiny.oracle.config), merge)
    section = tuple(config.rope_parameters["mrope_section"])
    frequencies = inverse_frequencies(config.head_dim, config.rope_parameters["rope_theta"])
    cos, sin = mrope_angles(positions, frequencies, section)

    x = torch.randn(len(prompt.ids), 2, config.head_dim)
    their_cos, their_sin = tiny.oracle.model.language_model.rotary_emb(x, positions[:, None])
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], their_cos, their_sin)
    # Both round cos, sin and two products of values below 5 to fp32.
    torch.testing.assert_close(rotate(x, cos, sin), theirs[0].transpose(0, 1), rtol=0, atol=4e-6)


def test_axes_are_interleaved_and_not_sections():
    """Frequency i of the published [24, 20, 20] is t, h, w, t, h, w, ... up to 60, then t."""
    positions = torch.tensor([[1], [10], [100]])
    cos, _ = mrope_angles(positions, torch.zeros(64) + 0.01, (24, 20, 20))
    of_axis = {round(float(torch.tensor(p * 0.01).cos()), 6): axis for p, axis in ((1, "t"), (10, "h"), (100, "w"))}
    assert "".join(of_axis[round(float(c), 6)] for c in cos[0]) == "thw" * 20 + "tttt"


def test_the_largest_image_wakes_no_threads():
    """Those of torch's own pool, which begins with its first use; in a process that has not used it."""
    program = """
import os, numpy as np, torch
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.model.rope import mrope_positions
from qwen3vl_moe.model.vision import _places
from qwen3vl_moe.ops.transfer import _fill

torch.set_num_threads(3)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
mrope_positions([0, *[9] * 16384, 0], {9: [(1, 256, 256)]}, 2)
_places((1, 256, 256), 48, 2, torch.device("cpu"))
_fill(torch.empty(1 << 22), torch.from_numpy(np.ones(1 << 22, np.float32)))
assert threads() == before, "torch's threads were woken"
torch.ones(1 << 22)
assert threads() > before, "this test sees nothing"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("grids", [[(1, 6, 6)], [(1, 6, 12), (2, 12, 6)]])
def test_vision_positions_and_angles_equal_transformers(tiny, grids):
    config = tiny.oracle.config.vision_config
    ours = vision_positions(grids, config.spatial_merge_size)
    assert torch.equal(ours, get_vision_position_ids(torch.tensor(grids), config.spatial_merge_size))

    head_dim = config.hidden_size // config.num_heads
    cos, sin = vision_angles(ours, inverse_frequencies(head_dim // 2, 10000.0))
    their_cos, their_sin = tiny.oracle.model.visual.rotary_pos_emb(torch.empty(0), ours)
    assert torch.equal(torch.cat((cos, cos), -1), their_cos)
    assert torch.equal(torch.cat((sin, sin), -1), their_sin)
