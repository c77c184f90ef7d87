"""What the vision tower is told in words of its own: what stands where.

Published models start from a vision tower that has been trained on pictures. Here its image tokens (of the merger and
of each DeepStack merger) have to tell, through a linear head that is dropped afterwards, which thing has its centre in
each half of their patches (a shape, a bar or a character), its colour, its size and its number along a text or a path.
That is an answer per place instead of one per question, and costs nothing in the decoder. The tower learns this alone
at first, and goes on with it while the model learns to answer, since it would forget it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from demo_training.asking import one_view, wide_size
from demo_training.batches import WIDE
from demo_training.forward import image_features
from demo_training.pictures import CLASSES, IGNORE, MERGE, MOST_PATCHES, SPOTS, WHAT, Pictures, pack_pictures
from demo_training.places import NOTHING, mean_loss
from demo_training.repeated import Repeated
from demo_training.scenes import SIZES, Scene, draw_scene
from demo_training.trainer import MasterWeights, TrainingRecipe
from demo_training.views import View

KINDS = ("shapes", "shapes", "chart", "number", "word")
WIDE_KINDS = (
    *("shapes",) * 3, *("word",) * 4, *("number",) * 2, *("path",) * 2, "grid", "rows", "chart", "digit",
)  # fmt: skip


class TowerBatches(Dataset):
    """Item ``step`` holds the pictures of that step, of all sizes, the same on every call."""

    def __init__(self, *, pictures: int, steps: int, seed: int):
        self._pictures, self._steps, self._seed = pictures, steps, seed

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Pictures:
        if not 0 <= step < self._steps:
            raise IndexError(step)
        rng = Random(f"tower/{self._seed}/{step}")
        scenes: list[tuple[Scene | View, tuple[int, int]]] = []
        for _ in range(self._pictures):
            if rng.random() < WIDE:
                size = wide_size(rng)
                scenes.append((one_view(rng, size, rng.choice(WIDE_KINDS)), size))
            else:
                size = rng.choice(SIZES)
                scenes.append((draw_scene(rng, size, rng.choice(KINDS)), size))
        return pack_pictures(scenes, self._pictures * MOST_PATCHES)


class TowerHeads(nn.Module):
    """A linear head on each of a tower's outputs."""

    def __init__(self, visual: Any):
        super().__init__()
        outputs = 1 + len(visual.config.deepstack_visual_indexes)
        width = visual.config.out_hidden_size
        self.register_buffer("weights_of_what", torch.tensor([NOTHING / SPOTS] + [1.0] * (len(WHAT) - 1)))
        self.heads = nn.ModuleList(nn.Linear(width, MERGE**2 * SPOTS * sum(CLASSES)) for _ in range(outputs))

    def forward(self, features: list[Tensor], targets_6S: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the share of things that the merger's output names rightly."""
        loss = right = torch.zeros((), device=targets_6S.device)
        what = targets_6S[0]
        for number, (head, tokens) in enumerate(zip(self.heads, features, strict=True)):
            parts = head(tokens).float().view(targets_6S.shape[1], -1).split(CLASSES, dim=-1)
            weights = self.weights_of_what.float()
            loss = loss + F.cross_entropy(parts[0], what, weights, ignore_index=IGNORE)
            for logits, targets in zip(parts[1:], targets_6S[1 : len(CLASSES)], strict=True):
                loss = loss + mean_loss(logits, targets)
            if number == 0:
                right = ((parts[0].argmax(-1) == what) & (what > 0)).sum() / (what > 0).sum()
        return loss, right


def train_tower(
    model: Any,
    heads: TowerHeads,
    batches: Iterable[Pictures],
    recipe: TrainingRecipe,
    steps: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    graphs: bool = True,
    report: Callable[[int, float, float], None] = lambda step, loss, right: None,
    every: int = 100,
) -> None:
    """Train the tower of ``model``, and ``heads``, in place, for ``steps`` batches, with the rates of ``recipe``."""
    visual = model.model.visual
    weights = MasterWeights(nn.ModuleDict({"visual": visual, "heads": heads}).to(device), recipe, dtype)

    def learn(pictures: Pictures) -> list[Tensor]:
        loss, right = heads(image_features(visual, pictures), pictures.targets_6S)
        loss.backward()
        weights.step()
        return [loss.detach(), right]

    repeated = Repeated(learn, device, graphs)
    for step, batch in enumerate(islice(batches, steps)):
        weights.set_rate(recipe.rate(step / steps))
        loss, right = repeated(batch)
        if (step + 1) % every == 0 or step + 1 == steps:
            report(step + 1, float(loss), float(right))
    weights.restore()
