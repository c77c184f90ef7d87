"""The vision tower's own lesson: what it is told is where it is drawn, and it learns that."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from demo_training.drawing import draw, marks
from demo_training.forward import image_features
from demo_training.model import SMALL, build_model, published_config, token_ids
from demo_training.pictures import COLOUR, IGNORE, MERGE, PATCH, SIZE, WHAT, patches_of, targets_of
from demo_training.scenes import COLOURS, draw_scene
from demo_training.tower import TowerBatches, TowerHeads, train_tower
from demo_training.trainer import TrainingRecipe


@pytest.mark.parametrize("kind", ["shapes", "chart", "number", "word"])
def test_marks_are_on_what_they_name(kind):
    for seed in range(20):
        scene = draw_scene(Random(f"{kind}/{seed}"), (192, 160), kind)
        pixels = np.asarray(draw(scene)).astype(int)
        found = marks(scene)
        assert len(found) == len(scene.shapes) + len(scene.bars) + len(scene.text)
        assert "".join(mark.what for mark in found if len(mark.what) == 1) == scene.text
        for mark in found:
            # A character has holes: its colour is within a few pixels of its centre.
            reach = 9 if kind in ("number", "word") else 1
            x, y = round(mark.x), round(mark.y)
            near = pixels[max(0, y - reach) : y + reach + 2, max(0, x - reach) : x + reach + 2]
            assert (near == COLOURS[mark.colour]).all(-1).any(), mark


def test_targets_stand_in_the_order_of_the_patches():
    """Each patch is filled with a number of its own in place of pixels, and its target has to come with that number."""
    size = (160, 128)
    scene = draw_scene(Random(3), size, "shapes")
    rows, columns = size[1] // PATCH, size[0] // PATCH
    numbers = torch.arange(rows * columns, dtype=torch.uint8).view(rows, columns)
    pixels = numbers.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)[:, :, None].expand(-1, -1, 3)
    order = patches_of(pixels.numpy())[:, 0, 0, 0].long()
    spots = torch.stack([2 * order, 2 * order + 1], 1).flatten()  # halves of a patch stand side by side
    what, colour, extent, *_ = targets_of(scene, size)
    assert int((what > 0).sum()) == len(scene.shapes)
    for mark in marks(scene):
        at = int(
            (
                spots
                == int(mark.y * size[1] / scene.height) // PATCH * 2 * columns
                + int(mark.x * size[0] / scene.width) // (PATCH // 2)
            ).nonzero()
        )
        assert WHAT[what[at]] == mark.what
        assert COLOUR[colour[at]] == mark.colour
        assert SIZE[extent[at]] == mark.size
    assert (colour[what == 0] == IGNORE).all()
    assert len(what) == 2 * rows * columns
    assert rows % MERGE == columns % MERGE == 0


def test_the_tower_learns_and_only_the_tower(untrained):
    model = build_model(published_config(SMALL, token_ids(untrained[0])), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = TowerBatches(pictures=6, steps=1, seed=0)[0]
    lines = []
    train_tower(
        model,
        TowerHeads(model.model.visual),
        [batch] * 40,
        TrainingRecipe(minutes=1, learning_rate=3e-3),
        40,
        device=torch.device("cpu"),
        dtype=torch.float32,
        report=lambda *line: lines.append(line),
        every=10,
    )
    assert lines[-1][0] == 40
    assert lines[-1][1] < 0.5 * lines[0][1]
    assert lines[-1][2] > 0.5  # of some twenty kinds of things
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]) == (not name.startswith("model.visual.")), name


def test_batches_are_reproducible():
    data = TowerBatches(pictures=3, steps=2, seed=0)
    for one, other in zip(data[1].flat(), data[1].flat(), strict=True):
        assert torch.equal(one, other)
    assert [t.shape for t in data[0].flat()] == [t.shape for t in data[1].flat()]
    with pytest.raises(IndexError):
        data[2]


def test_every_output_of_the_tower_is_read(untrained):
    """A head for the merger and one for each DeepStack merger: each part of the tower gets a gradient."""
    model = build_model(published_config(SMALL, token_ids(untrained[0])), seed=0)
    pictures = TowerBatches(pictures=8, steps=1, seed=0)[0]
    loss, _ = TowerHeads(model.model.visual)(image_features(model.model.visual, pictures), pictures.targets_6S)
    loss.backward()
    without = [name for name, p in model.model.visual.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
