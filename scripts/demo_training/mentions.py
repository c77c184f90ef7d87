"""What a question names, and where that stands: the decoder learns to find it (places.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from demo_training.scenes import Scene
from demo_training.views import View

NAMES = ("item", "name", "other", "shape", "colour")  # of a fact's blanks, those that name things


@dataclass(frozen=True)
class Mention:
    """``text`` names a thing of picture ``picture``, the only one of this name in all that is asked about; ``x`` and
    ``y``: its centre, as shares of width and height; ``cell``: its row and column, if it is part of a grid."""

    text: str
    picture: int
    x: float
    y: float
    cell: tuple[int, int] | None = None

    def end_in(self, question: str) -> int | None:
        """Where its name ends in a question, the last time; None where the question says it in other words."""
        found = list(re.finditer(rf"(?<!\w){re.escape(self.text)}(?!\w)", question))
        return found[-1].end() if found else None


def mentions_of(scenes: Sequence[Scene | View], blanks: dict[str, str]) -> tuple[Mention, ...]:
    """Of what fills a phrasing about ``scenes``: each name that only one thing has."""
    asked = {"first": (0,), "second": (1,)}.get(blanks.get("which", ""), range(len(scenes)))
    found = []
    for key in NAMES:
        if name := blanks.get(key):
            things = [mention for number in asked for mention in _called(scenes[number], number, name)]
            found += things if len(things) == 1 else []
    return tuple(found)


def _called(scene: Scene | View, number: int, name: str) -> list[Mention]:
    """Everything in a picture that goes by this name: a colour, a shape, both, or a character."""
    words = set(name.split())
    things: list[tuple[bool, float, float]] = [(words <= {s.colour, s.kind}, s.x, s.y) for s in scene.shapes]
    cells: list[tuple[int, int]] = []
    if isinstance(scene, View):
        things += [(writing.text == name and not scene.columns, writing.x, writing.y) for writing in scene.writings]
        things += [
            (column.bar.colour == name, (column.left + column.right) / 2, column.top) for column in scene.columns
        ]
        if scene.cells:  # what fills them comes in the order of the cells
            cells = [(r, c) for r, row in enumerate(scene.cells) for c in range(len(row))]
    return [
        Mention(name, number, x / scene.width, y / scene.height, cells[n] if cells else None)
        for n, (called, x, y) in enumerate(things)
        if called
    ]
