"""What is in a picture, before it is drawn: every answer is read off this description.

Three kinds of scene: shapes, a bar chart, something written. Nothing overlaps, sizes differ by a factor of two, and no
colour is close to another or to its ground, so that each question has one answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

COLOURS = {
    "red": (205, 30, 35),
    "orange": (245, 135, 15),
    "yellow": (250, 220, 30),
    "green": (30, 145, 60),
    "blue": (35, 80, 215),
    "purple": (135, 45, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
RADII = {"small": (9, 11), "large": (20, 23)}  # pixels, from the centre to the edge of the box around the shape
# fmt: off
WORDS = (
    "cat", "dog", "sun", "moon", "tree", "fish", "bird", "house", "car", "book", "star", "ship", "rain", "snow",
    "milk", "bread", "apple", "green", "stop", "open", "left", "home", "hello", "king", "frog", "lamp", "ring",
    "door", "wolf", "cake",
)
# fmt: on
# Multiples of 32, so that a picture of exactly this size is not resized; areas within SMALLEST and LARGEST.
SIZES = ((128, 128), (160, 128), (128, 160), (160, 160), (192, 128), (128, 192), (192, 160), (224, 128))
SMALLEST_AREA, LARGEST_AREA = 128 * 128, 192 * 192
MOST_SHAPES = 6
CHART_TOP = 6  # highest value of a bar


@dataclass(frozen=True)
class Shape:
    """``x``, ``y`` is the centre and ``radius`` half of the side of the box around it, in pixels."""

    kind: str
    colour: str
    size: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Bar:
    colour: str
    value: int


@dataclass(frozen=True)
class Scene:
    """One picture: exactly one of ``shapes``, ``bars`` and ``text`` is filled. ``seed`` draws what is mere ornament."""

    width: int
    height: int
    ground: tuple[int, int, int]
    ornament: str
    seed: int
    shapes: tuple[Shape, ...] = ()
    bars: tuple[Bar, ...] = ()
    text: str = ""
    ink: str = "black"


def draw_scene(rng: Random, size: tuple[int, int], kind: str, most: int = MOST_SHAPES) -> Scene:
    """Choose a scene.

    Args:
        rng: the only source of chance.
        size: width and height that the processor cuts patches from; the picture itself may be a few pixels off, and is
            then resized to it like any other picture.
        kind: ``shapes``, ``chart``, ``number`` or ``word``.
        most: shapes.
    """
    width, height = size
    if rng.random() < 0.25:
        width, height = width + rng.randint(-9, 9), height + rng.randint(-9, 9)
        if not SMALLEST_AREA <= width * height <= LARGEST_AREA:
            width, height = size
    dark = rng.random() < 0.2
    level = rng.randint(50, 70) if dark else rng.randint(212, 245)
    ground = tuple(level + rng.randint(-6, 6) for _ in range(3))
    colours = [colour for colour in COLOURS if not (dark and colour in ("black", "purple"))]
    common = {
        "width": width,
        "height": height,
        "ground": ground,
        "ornament": rng.choice(("plain", "gradient", "stripes", "dots", "noise")),
        "seed": rng.getrandbits(32),
    }
    if kind == "shapes":
        return Scene(**common, shapes=_place(rng, width, height, colours, most))
    if kind == "chart":
        count = rng.randint(2, 4)
        values = rng.sample(range(1, CHART_TOP + 1), count)  # different heights: one is the highest
        return Scene(**common, bars=tuple(map(Bar, rng.sample(colours, count), values)))
    text = str(rng.randint(0, 10 ** rng.randint(1, 3) - 1)) if kind == "number" else rng.choice(WORDS)
    return Scene(**common, text=text, ink=rng.choice(colours))


def _place(rng: Random, width: int, height: int, colours: list[str], most: int) -> tuple[Shape, ...]:
    """Up to ``most`` shapes that keep a gap of several pixels to each other and to the border."""
    wanted = rng.choice([n for n in (1, 2, 2, 3, 3, 4, 5, MOST_SHAPES) if n <= most])
    # Few colours and few kinds repeat more often, which makes counting worth asking.
    colours = rng.sample(colours, rng.randint(1, min(4, len(colours))))
    kinds = rng.sample(SHAPES, rng.randint(1, 4))
    placed: list[Shape] = []
    for _ in range(wanted * 20):
        if len(placed) == wanted:
            break
        size = rng.choice(("small", "large"))
        radius = rng.randint(*RADII[size])
        x, y = rng.randint(radius + 4, width - radius - 5), rng.randint(radius + 4, height - radius - 5)
        if all(max(abs(x - other.x), abs(y - other.y)) > radius + other.radius + 5 for other in placed):
            placed.append(Shape(rng.choice(kinds), rng.choice(colours), size, x, y, radius))
    return tuple(placed)
