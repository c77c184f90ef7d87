"""Pictures of a step, packed: patches of all sizes one after the other, where they are, and what they show.

The number of patches is fixed, so that every step launches the same work and one CUDA graph serves all of them.

Shape letters: P patches, M = P / 4 image tokens, S = 2 P spots: small letters stand closer than patches do.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from random import Random
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo_training.drawing import draw, marks
from demo_training.layouts import WIDE_SIZES
from demo_training.rendering import render, view_marks
from demo_training.scenes import CHART_TOP, COLOURS, SHAPES, SIZES, Scene
from demo_training.views import View
from qwen3vl_moe.config import VisionConfig
from qwen3vl_moe.model.vision import PatchPlan

IGNORE = -100  # label of what is not learned
PATCH, MERGE, FRAMES, POSITIONS = 16, 2, 2, 256
WHAT = ("nothing", *SHAPES, "bar", *string.digits, *string.ascii_letters)
_WHAT = {what: number for number, what in enumerate(WHAT)}
COLOUR = tuple(COLOURS)
SIZE = ("small", "large", *map(str, range(1, CHART_TOP + 1)))
ALL_SIZES = (*SIZES, *WIDE_SIZES)
FEWEST_PATCHES, MOST_PATCHES = (f(w * h for w, h in ALL_SIZES) // PATCH**2 for f in (min, max))
SPOTS = 2  # left and right halves of a patch
CELLS = 9  # most rows or columns of a grid, and characters of a text
CLASSES = (len(WHAT), len(COLOUR), len(SIZE), CELLS)  # what the tower has to tell of a spot


class Tensors:
    """A dataclass of tensors, or of such dataclasses."""

    def flat(self) -> list[Tensor]:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return [t for value in values for t in (value.flat() if isinstance(value, Tensors) else [value])]

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._each(lambda t: t.pin_memory())

    def _each(self, function: Any) -> Self:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return type(self)(*(v._each(function) if isinstance(v, Tensors) else function(v) for v in values))


@dataclass
class Pictures(Tensors):
    """Packed pictures; what is left of the P patches is filled with pictures of nothing.

    Attributes:
        pixels_P: uint8 [P, PATCH, PATCH, 3], in the tower's order (patches that are merged stand together).
        index_P4, weight_P4: which learned positions a patch mixes, and how (int64, fp32).
        positions_P2: int64 row and column of each patch.
        starts: int32, cumulative patches, as many as there can be pictures, plus one.
        targets_6S: int64, of each spot (half of a patch): what has its centre there, its colour, its size, its number
            along a text or a path, and its row and column in a grid (of a text or a path, its only row); IGNORE where
            there is none. A grid's are for the decoder alone, which shall read them off its own positions.
    """

    pixels_P: Tensor
    index_P4: Tensor
    weight_P4: Tensor
    positions_P2: Tensor
    starts: Tensor
    targets_6S: Tensor


def pixels_of(scene: Scene | View, size: tuple[int, int]) -> np.ndarray:
    """The drawn picture, resized (as processors do) to ``size`` if it differs: uint8 [height, width, 3]."""
    picture = draw(scene) if isinstance(scene, Scene) else render(scene)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))


def patches_of(pixels: np.ndarray) -> Tensor:
    """uint8 [height, width, 3] -> [P, PATCH, PATCH, 3] in the tower's order."""
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    squares = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    return torch.from_numpy(squares.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, PATCH, PATCH, 3))


def targets_of(scene: Scene | View, size: tuple[int, int]) -> Tensor:
    """``targets_6S`` of one picture; ``size`` is that of the resized picture."""
    columns, rows = size[0] // PATCH, size[1] // PATCH
    target = np.full((6, rows, columns * SPOTS), IGNORE)
    target[0] = 0
    has_grid = isinstance(scene, View) and scene.kind in ("grid", "rows")
    for mark in marks(scene) if isinstance(scene, Scene) else view_marks(scene):
        x, y = mark.x / scene.width, mark.y / scene.height
        target[:, int(y * size[1]) // PATCH, int(x * size[0]) * SPOTS // PATCH] = (
            _WHAT[mark.what],
            COLOUR.index(mark.colour) if mark.colour else IGNORE,
            SIZE.index(mark.size) if mark.size else IGNORE,
            IGNORE if mark.cell is None or has_grid else mark.cell[1],
            *(mark.cell or (IGNORE, IGNORE)),
        )
    merged = target.reshape(6, rows // MERGE, MERGE, columns // MERGE, MERGE * SPOTS).swapaxes(2, 3)
    return torch.from_numpy(merged.reshape(6, -1))


@lru_cache
def _plan(size: tuple[int, int]) -> PatchPlan:
    """Of one picture; only the grid and the learned positions count, which all sizes of the demo share."""
    config = VisionConfig(
        depth=1, hidden_size=64, intermediate_size=64, num_heads=1, in_channels=3, patch_size=PATCH,
        temporal_patch_size=FRAMES, merge_size=MERGE, out_hidden_size=64, num_positions=POSITIONS, deepstack_indexes=(),
    )  # fmt: skip
    return PatchPlan.build([(1, size[1] // PATCH, size[0] // PATCH)], config)


@lru_cache(maxsize=4096)
def _moved(size: tuple[int, int], rows_by: int, columns_by: int, flips: int) -> PatchPlan:
    """The plan of one picture with the learned positions of other patches: rows and columns go on by so many, around
    the edge, and backwards where ``flips`` has the bit 1 or 2."""
    plan = _plan(size)
    columns, rows = size[0] // PATCH, size[1] // PATCH
    row, column = plan.positions_P2.numpy().T
    from_row = ((rows - 1 - row if flips & 1 else row) + rows_by) % rows
    from_column = ((columns - 1 - column if flips & 2 else column) + columns_by) % columns
    place = np.empty((rows, columns), np.int64)
    place[row, column] = np.arange(rows * columns)
    source = torch.from_numpy(place[from_row, from_column])
    return replace(plan, index_P4=plan.index_P4[source], weight_P4=plan.weight_P4[source])


def _some_plan(size: tuple[int, int], rng: Random | None, moved: float) -> PatchPlan:
    if rng is None or rng.random() >= moved:
        return _plan(size)
    return _moved(size, rng.randrange(size[1] // PATCH), rng.randrange(size[0] // PATCH), rng.randrange(4))


def pack_pictures(
    scenes: Sequence[tuple[Scene | View, tuple[int, int]]], patches: int, rng: Random | None = None, moved: float = 0.0
) -> Pictures:
    """Draw ``scenes``, each at a size, into ``patches`` patches; a share of ``moved``, drawn by ``rng``, with learned
    positions that are no guide to where things are."""
    plans = [_some_plan(size, rng, moved) for _, size in scenes]
    lengths = [len(plan.index_P4) for plan in plans]
    spare = patches - sum(lengths)
    if spare < 0:
        raise ValueError(f"{len(scenes)} pictures have {sum(lengths)} patches, more than {patches}")
    starts = torch.full((patches // FEWEST_PATCHES + 2,), patches, dtype=torch.int32)
    lengths += [MOST_PATCHES] * (spare // MOST_PATCHES)
    starts[0] = 0
    starts[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)

    def padded(parts: list[Tensor], value: int, dim: int = 0, each: int = 1) -> Tensor:
        shape = list(parts[0].shape)
        shape[dim] = spare * each
        return torch.cat([*parts, parts[0].new_full(shape, value)], dim)

    return Pictures(
        padded([patches_of(pixels_of(scene, size)) for scene, size in scenes], 0),
        padded([plan.index_P4 for plan in plans], 0),
        padded([plan.weight_P4 for plan in plans], 0),
        padded([plan.positions_P2 for plan in plans], 0),
        starts,
        padded([targets_of(scene, size) for scene, size in scenes], IGNORE, dim=1, each=SPOTS),
    )
