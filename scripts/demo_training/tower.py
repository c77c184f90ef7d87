"""Stage one: the vision tower learns what stands where, before it is asked anything in words.

Published models start from a vision tower that has been trained on pictures. Here its image tokens (of the merger and
of each DeepStack merger) have to tell, through a linear head that is dropped afterwards, which thing has its centre in
each of their patches: a shape, a bar or a character, its colour and its size. That is an answer per patch instead of
one per question, and costs nothing in the decoder.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from demo_training.batches import IGNORE, MERGE, PATCH, Movable, pixels_of
from demo_training.drawing import marks
from demo_training.model import patches_of
from demo_training.scenes import CHART_TOP, COLOURS, SHAPES, SIZES, Scene, draw_scene
from demo_training.trainer import MasterWeights, Recipe

WHAT = ("nothing", *SHAPES, "bar", *string.digits, *string.ascii_lowercase)
COLOUR = tuple(COLOURS)
SIZE = ("small", "large", *map(str, range(1, CHART_TOP + 1)))
KINDS = ("shapes", "shapes", "chart", "number", "word")
NOTHING = 0.1  # weight of a patch without anything: most are


@dataclass
class TowerBatch(Movable):
    """Pictures of one size, uint8 [n, height, width, 3], and per patch, in the tower's order, int64 [n * P]: what is
    there, and its colour and size (IGNORE where there is none)."""

    pixels: torch.Tensor
    what: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor


class TowerBatches(Dataset):
    """Item ``step`` is the batch of that step, the same on every call."""

    def __init__(self, *, pictures: int, steps: int, seed: int):
        self._pictures, self._steps, self._seed = pictures, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> TowerBatch:
        if not 0 <= step < self._steps:
            raise IndexError(step)
        rng = Random(f"tower/{self._seed}/{step}")
        size = rng.choice(SIZES)
        scenes = [draw_scene(rng, size, rng.choice(KINDS)) for _ in range(self._pictures)]
        targets = torch.stack([targets_of(scene, size) for scene in scenes], dim=1).flatten(1)
        pixels = torch.stack([torch.from_numpy(pixels_of(scene, size).copy()) for scene in scenes])
        return TowerBatch(pixels, *targets)


def targets_of(scene: Scene, size: tuple[int, int]) -> torch.Tensor:
    """What, colour and size per patch, int64 [3, P], in the tower's order; ``size`` is that of the resized picture."""
    columns, rows = size[0] // PATCH, size[1] // PATCH
    target = torch.full((3, rows, columns), IGNORE)
    target[0] = 0
    for mark in marks(scene):
        column = int(mark.x * size[0] / scene.width) // PATCH
        row = int(mark.y * size[1] / scene.height) // PATCH
        target[0, row, column] = WHAT.index(mark.what)
        target[1, row, column] = COLOUR.index(mark.colour)
        target[2, row, column] = SIZE.index(mark.size) if mark.size else IGNORE
    return target.view(3, rows // MERGE, MERGE, columns // MERGE, MERGE).transpose(2, 3).reshape(3, -1)


class TowerReader(nn.Module):
    """A model's vision tower with a linear head on each of its outputs."""

    def __init__(self, model: Any):
        super().__init__()
        self.visual = model.model.visual
        width = self.visual.config.out_hidden_size
        outputs = 1 + len(self.visual.config.deepstack_visual_indexes)
        classes = len(WHAT) + len(COLOUR) + len(SIZE)
        self.register_buffer("weights_of_what", torch.tensor([NOTHING] + [1.0] * (len(WHAT) - 1)))
        self.heads = nn.ModuleList(nn.Linear(width, MERGE**2 * classes) for _ in range(outputs))

    def forward(self, batch: TowerBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the share of things that the merger's output names rightly."""
        patches, grid = patches_of(batch.pixels, self.heads[0].weight.dtype)
        out = self.visual(patches, grid_thw=grid)
        loss = 0.0
        for head, tokens in zip(self.heads, (out.pooler_output, *out.deepstack_features), strict=True):
            logits = head(tokens).float().view(len(batch.what), -1)
            what, colour, size = logits.split([len(WHAT), len(COLOUR), len(SIZE)], dim=-1)
            loss = loss + F.cross_entropy(what, batch.what, self.weights_of_what)
            loss = loss + _mean_loss(colour, batch.colour) + _mean_loss(size, batch.size)
            if tokens is out.pooler_output:
                named = (what.argmax(-1) == batch.what) & (batch.what > 0)
                right = named.sum() / (batch.what > 0).sum()
        return loss, right


def _mean_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy where there is a target; zero where there is none at all."""
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def train_tower(
    model: Any,
    batches: Iterable[TowerBatch],
    recipe: Recipe,
    steps: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    report: Callable[[int, float, float], None] = lambda step, loss, right: None,
    every: int = 100,
) -> None:
    """Train the tower of ``model`` in place, for ``steps`` batches, with the rates of ``recipe``."""
    reader = TowerReader(model).to(device)
    weights = MasterWeights(reader, recipe, dtype)
    for step, batch in enumerate(batches):
        if step == steps:
            break
        loss, right = reader(batch.to(device))
        loss.backward()
        weights.step(recipe.rate(step / steps))
        if (step + 1) % every == 0 or step + 1 == steps:
            report(step + 1, loss.item(), float(right))
    weights.restore()
