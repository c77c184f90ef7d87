"""Pictures of the wide set before they are drawn: what is in them, where, and by which hand.

Where a scene (scenes.py) is drawn in one way by one library, a view says how: which renderer, at what scale, on what
ground, with which shades, and what happens to it afterwards. Everything is known here, so that answers are read off it.
"""

from __future__ import annotations

from dataclasses import dataclass

from demo_training.palette import RGB
from demo_training.scenes import Bar

RENDERERS = ("pillow", "opencv", "smooth", "smooth", "smooth")  # hard edges, hard edges, smooth edges


@dataclass(frozen=True)
class Ground:
    """What stands behind (grounds.py). ``rgb``: its colour, or the one around which it varies; ``seed`` draws the
    rest."""

    kind: str
    rgb: RGB
    seed: int


@dataclass(frozen=True)
class Thing:
    """A shape. ``x``, ``y``: the middle of the box around it, ``radius`` and ``high``: half of its width and height
    before it is turned by ``angle`` (radians); ``line``: width of an outline that is not filled, 0 if filled;
    ``edge``: colour of a line around what is filled; ``arm``: half of the width of a cross's arms, as a share."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    high: float
    angle: float
    rgb: RGB
    line: float = 0.0
    edge: RGB | None = None
    arm: float = 0.3

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Writing:
    """A line of text around (x, y), ``height`` pixels from its highest to its lowest ink; ``colour``: "" if it has no
    name of ours (white)."""

    text: str
    x: float
    y: float
    height: float
    font: int
    rgb: RGB
    colour: str
    stretch: float = 1.0
    slant: float = 0.0
    angle: float = 0.0


@dataclass(frozen=True)
class Line:
    """Mere guidance: of a grid, a path or a chart."""

    points: tuple[tuple[float, float], ...]
    rgb: RGB
    width: float


@dataclass(frozen=True)
class Handwriting:
    """A handwritten digit, ``number`` in the set; a square of ``side`` pixels around (x, y), turned by ``angle``."""

    number: int
    digit: str
    x: float
    y: float
    side: float
    angle: float
    rgb: RGB
    colour: str


@dataclass(frozen=True)
class Column:
    """A bar of a chart, in pixels."""

    bar: Bar
    left: float
    right: float
    top: float
    base: float
    rgb: RGB


@dataclass(frozen=True)
class Finish:
    """What happens to a drawn picture: ``grey``, ``blur`` (pixels), ``noise`` (levels), ``jpeg`` (quality, 0 for
    none)."""

    grey: bool = False
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int = 0


@dataclass(frozen=True)
class View:
    """One picture of ``kind``: ``shapes``, ``chart``, ``number``, ``word``, ``grid``, ``rows``, ``path``, ``nearer``,
    ``digit`` or ``photograph``.

    Attributes:
        size: width and height that it is resized to, as the processor would; it is drawn at ``width`` x ``height``.
        cells: of a grid, row by row, what stands in each; of rows, the same, of different lengths; of a path, one row,
            from its start.
        bars: in the order drawn, as in a chart of scenes.py.
    """

    kind: str
    size: tuple[int, int]
    width: int
    height: int
    ground: Ground
    renderer: str
    finish: Finish
    seed: int
    shapes: tuple[Thing, ...] = ()
    writings: tuple[Writing, ...] = ()
    lines: tuple[Line, ...] = ()
    columns: tuple[Column, ...] = ()
    handwriting: tuple[Handwriting, ...] = ()
    cells: tuple[tuple[str, ...], ...] = ()

    @property
    def bars(self) -> tuple[Bar, ...]:
        return tuple(column.bar for column in self.columns)

    @property
    def text(self) -> str:
        """What is to be read; the numbers beside a chart are not."""
        return self.writings[0].text if self.kind in ("number", "word") else ""
