"""Chooses views: what is in a picture of the wide set, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from demo_training.glyphs import FONTS, extent
from demo_training.grounds import KINDS, choose_ground, clear_of
from demo_training.palette import CLEAR, RGB, any_colour, dark, light, lightness, shade
from demo_training.rendering import TRAINING_DIGITS, digits, outline_of
from demo_training.scenes import COLOURS, SHAPES
from demo_training.views import RENDERERS, Finish, Ground, Handwriting, Line, Thing, View, Writing

# All multiples of 32 with areas that the processor does not change, up to five times as wide as high.
WIDE_SIZES = tuple(
    (w, h)
    for w in range(64, 417, 32)
    for h in range(64, 417, 32)
    if 128 * 128 <= w * h <= 192 * 192 and max(w, h) <= 5 * min(w, h)
)
SMALL, LARGE, HUGE = (0.09, 0.165), (0.235, 0.4), (0.24, 0.95)  # widths of shapes, as shares of the root of the area
GAP = 0.025  # between things, and to the border, of the same
MOST = 8  # shapes


def blank(rng: Random, size: tuple[int, int], kind: str, grounds: tuple[str, ...] = KINDS) -> View:
    """A view with nothing in it yet. One in five is drawn larger or smaller than ``size``, and resized to it then."""
    width, height = size
    chance = rng.random()
    if chance < 0.2:
        scale = rng.uniform(1.05, 1.8) if chance < 0.14 else rng.uniform(0.6, 0.95)
        width, height = round(width * scale * rng.uniform(0.95, 1.05)), round(height * scale)
    finish = Finish(
        blur=rng.uniform(0.4, 0.9) if rng.random() < 0.12 else 0.0,
        noise=rng.uniform(2, 11) if rng.random() < 0.15 else 0.0,
        jpeg=rng.randint(35, 96) if rng.random() < 0.3 else 0,
    )
    ground = choose_ground(rng, grounds)
    return View(kind, size, width, height, ground, rng.choice(RENDERERS), finish, rng.getrandbits(32))


def unit_of(view: View) -> float:
    return math.sqrt(view.width * view.height)


def pens(rng: Random, ground: Ground, least: float = CLEAR) -> dict[str, RGB]:
    """Colours by name, in a shade each that shows on the ground."""
    found = {}
    for name in COLOURS:
        for _ in range(3):
            rgb = shade(rng, name)
            if clear_of(ground, rgb, least):
                found[name] = rgb
                break
    return found


def with_pens(rng: Random, view: View, least: float = CLEAR) -> tuple[View, dict[str, RGB]]:
    """The view, on another ground if fewer than three colours show on its own."""
    while len(found := pens(rng, view.ground, least)) < 3:
        view = replace(view, ground=choose_ground(rng))
    return view, found


def ink_for(rng: Random, ground: Ground, grey: bool = False) -> tuple[str, RGB]:
    """A colour to write in: one with a name, or white on what is dark; white or black alone if all will be ``grey``."""
    for _ in range(0 if grey else 20):
        name = rng.choice((*COLOURS, "black", "black"))
        rgb = shade(rng, name)
        if clear_of(ground, rgb, CLEAR):
            return name, rgb
    return ("", (255, 255, 255)) if lightness(ground.rgb) < 110 else ("black", (0, 0, 0))


def shape(rng: Random, kind: str, colour: str, rgb: RGB, diameter: float, size: str, style: str) -> Thing:
    """A shape at (0, 0)."""
    radius = diameter / 2
    tall = rng.uniform(0.93, 1.07) if kind in ("square", "circle") else rng.uniform(0.8, 1.25)
    high = radius * (tall if rng.random() < 0.35 else 1.0)
    most = {"circle": 0.0, "square": 0.17, "diamond": 0.17, "cross": 0.25, "triangle": 0.35}[kind]
    angle = rng.uniform(-most, most) if rng.random() < 0.4 else 0.0
    if kind == "triangle" and rng.random() < 0.12:
        angle = rng.uniform(0, 2 * math.pi)
    thing = Thing(kind, colour, size, 0.0, 0.0, radius, high, angle, rgb, arm=rng.choice((0.25, 0.3, 0.33, 0.4)))
    if style == "outline":
        return replace(thing, line=max(2.0, diameter * rng.uniform(0.05, 0.14)))
    return replace(thing, edge=(0, 0, 0) if style == "edge" else None)


def boxes_apart(one: tuple, other: tuple, gap: float) -> bool:
    return one[0] > other[2] + gap or other[0] > one[2] + gap or one[1] > other[3] + gap or other[1] > one[3] + gap


def box_of(thing: Thing) -> tuple[float, float, float, float]:
    points, line = outline_of(thing), thing.line / 2
    (left, top), (right, bottom) = points.min(0) - line, points.max(0) + line
    return left, top, right, bottom


def place(rng: Random, view: View, things: Sequence[Thing]) -> View:
    """Each thing somewhere, apart from all others and whole; what finds no room is left out."""
    gap = max(2.0, GAP * unit_of(view))
    placed: list[Thing] = []
    boxes: list[tuple] = []
    for thing in sorted(things, key=lambda thing: -thing.radius):
        left, top, right, bottom = box_of(thing)
        x_room, y_room = view.width - (right - left) - 2 * gap, view.height - (bottom - top) - 2 * gap
        if min(x_room, y_room) < 0:
            continue
        for _ in range(30):
            dx, dy = gap - left + rng.random() * x_room, gap - top + rng.random() * y_room
            box = (left + dx, top + dy, right + dx, bottom + dy)
            if all(boxes_apart(box, other, gap) for other in boxes):
                placed.append(replace(thing, x=dx, y=dy))
                boxes.append(box)
                break
    return replace(view, shapes=tuple(placed))


def style_of(rng: Random) -> str:
    return rng.choice(("fill", "fill", "fill", "fill", "outline", "edge"))


def shapes_view(rng: Random, size: tuple[int, int], count: int | None = None) -> View:
    view, colours = with_pens(rng, blank(rng, size, "shapes"))
    unit, style = unit_of(view), style_of(rng)
    wanted = count or rng.choice((1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, MOST))
    names = rng.sample(sorted(colours), rng.randint(1, min(4, len(colours))))
    kinds = rng.sample(SHAPES, rng.randint(1, 4))
    widths = {"small": SMALL, "large": LARGE if wanted > 1 else HUGE}
    if wanted > 5:
        widths = {"small": SMALL}
    if wanted == 1 and rng.random() < 0.5:
        del widths["small"]
    same = rng.choice(tuple(widths)) if rng.random() < 0.4 else None
    things = []
    for _ in range(wanted):
        label = same or rng.choice(tuple(widths))
        diameter = min(rng.uniform(*widths[label]) * unit, 0.9 * min(view.width, view.height))
        if label == "large" and diameter < LARGE[0] * unit:
            label, diameter = "small", rng.uniform(*SMALL) * unit
        colour = rng.choice(names)
        rgb = colours[colour]
        if rng.random() < 0.2 and clear_of(view.ground, other := shade(rng, colour), CLEAR):
            rgb = other
        things.append(shape(rng, rng.choice(kinds), colour, rgb, diameter, label, style))
    view = place(rng, view, things)
    if not view.shapes:
        return shapes_view(rng, size, 1)
    clear = all(abs(lightness(thing.rgb) - lightness(view.ground.rgb)) > 40 for thing in view.shapes)
    return replace(view, finish=replace(view.finish, grey=clear and rng.random() < 0.06))


def writing_view(rng: Random, size: tuple[int, int], kind: str, text: str) -> View:
    """A number or a word, from as large as fits to a tenth of that; most of them large."""
    view = blank(rng, size, kind)
    view = replace(view, finish=replace(view.finish, grey=rng.random() < 0.12))
    colour, rgb = ink_for(rng, view.ground, view.finish.grey)
    font, stretch = rng.randrange(FONTS), rng.choice((1.0, 1.0, rng.uniform(0.8, 1.3)))
    angle = rng.gauss(0, 0.09) if rng.random() < 0.3 else 0.0
    slant = rng.uniform(-0.2, 0.3) if rng.random() < 0.15 else 0.0
    ratio = extent(text, font, 1.0, stretch) + abs(slant)
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    room_x, room_y = view.width * 0.94, view.height * 0.92
    most = min(room_x / (ratio * cos + sin), room_y / (ratio * sin + cos))
    least = min(most, 18 * view.height / size[1])  # pixels of the resized picture
    height = most * rng.uniform(0.6, 1.0) if rng.random() < 0.65 else rng.uniform(least, most)
    half_x, half_y = height * (ratio * cos + sin) / 2, height * (ratio * sin + cos) / 2
    x = rng.uniform(half_x, view.width - half_x) if rng.random() < 0.7 else view.width / 2
    y = rng.uniform(half_y, view.height - half_y) if rng.random() < 0.7 else view.height / 2
    lines = _frame(rng, view, x, y, half_x, half_y, rgb) if rng.random() < 0.12 and angle == 0 else ()
    return replace(view, writings=(Writing(text, x, y, height, font, rgb, colour, stretch, slant, angle),), lines=lines)


def _frame(rng: Random, view: View, x: float, y: float, half_x: float, half_y: float, rgb: RGB) -> tuple[Line, ...]:
    """A frame around a text, or a line under it."""
    margin = rng.uniform(0.06, 0.12) * view.height + 3
    left, right, top, bottom = x - half_x - margin, x + half_x + margin, y - half_y - margin, y + half_y + margin
    points = [(left, bottom), (right, bottom)]
    if rng.random() < 0.6:
        points += [(right, top), (left, top), (left, bottom)]
    return (Line(tuple(points), rgb, rng.uniform(1, 4)),)


def digit_view(rng: Random, size: tuple[int, int]) -> View:
    view = blank(rng, size, "digit", ("plain", "plain", "gradient"))
    view = replace(view, finish=replace(view.finish, grey=rng.random() < 0.3))
    colour, rgb = ink_for(rng, view.ground, view.finish.grey)
    side = min(view.width, view.height) * rng.uniform(0.4, 1.0)
    number = rng.randrange(TRAINING_DIGITS)
    x = rng.uniform(side / 2, view.width - side / 2)
    y = rng.uniform(side / 2, view.height - side / 2)
    hand = Handwriting(number, digits()[1][number], x, y, side, rng.gauss(0, 0.1), rgb, colour)
    return replace(view, handwriting=(hand,))


def photograph_view(rng: Random, size: tuple[int, int]) -> View:
    view = blank(rng, size, "photograph")
    return replace(view, finish=replace(view.finish, grey=rng.random() < 0.3))


def guide(rng: Random, ground: Ground) -> RGB:
    """A colour for lines: it shows, and is not mistaken for what is asked about."""
    for _ in range(20):
        rgb = rng.choice((light, dark, any_colour))(rng)
        if clear_of(ground, rgb, 45):
            return rgb
    return (150, 150, 150) if sum(ground.rgb) > 500 else (220, 220, 220)
