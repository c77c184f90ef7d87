"""Views in which it counts where things stand: grids, rows, paths, charts, and which of two is nearer."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from random import Random

from demo_training.glyphs import FONTS, extent
from demo_training.layouts import (
    GAP,
    LARGE,
    SMALL,
    blank,
    box_of,
    boxes_apart,
    guide,
    ink_for,
    shape,
    style_of,
    unit_of,
    with_pens,
)
from demo_training.scenes import CHART_TOP, SHAPES, Bar
from demo_training.views import Column, Line, Thing, View, Writing

LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"  # no two that some font draws alike
CELL = 28  # fewest pixels a cell of the resized picture
Place = tuple[float, float, float]  # middle and width of the square that an item fits in


def _items(rng: Random, view: View, places: list[Place], labels: list[str] | None) -> tuple[View, list[str]]:
    """An item at each place: characters in one font, or shapes. ``labels`` names them beforehand."""
    if (labels[0] in LETTERS) if labels else rng.random() < 0.6:
        labels = labels or _few_twice(rng, len(places))
        colour, rgb = ink_for(rng, view.ground)
        font = rng.randrange(FONTS)
        share = rng.uniform(0.55, 0.85)
        writings = []
        for label, (x, y, room) in zip(labels, places, strict=True):
            height = min(room * share, room * 0.9 / extent(label, font, 1.0, 1.0))
            writings.append(Writing(label, x, y, height, font, rgb, colour))
        return replace(view, writings=tuple(writings)), labels
    view, colours = with_pens(rng, view)
    style = style_of(rng)
    if labels is None:
        names = rng.sample(sorted(colours), rng.randint(2, min(5, len(colours))))
        labels = [f"{rng.choice(names)} {rng.choice(SHAPES)}" for _ in places]
    things = []
    share = rng.uniform(0.5, 0.75)
    for label, (x, y, room) in zip(labels, places, strict=True):
        colour, kind = label.split()
        if colour not in colours:  # of the other picture, whose ground is another
            return _items(rng, replace(view, ground=replace(view.ground, rgb=(235, 235, 235))), places, labels)
        diameter = room * share
        size = "large" if diameter > 0.2 * unit_of(view) else "small"
        thing = shape(rng, kind, colour, colours[colour], diameter, size, style)
        things.append(replace(thing, x=x, y=y))
    return replace(view, shapes=tuple(things)), labels


def _few_twice(rng: Random, count: int) -> list[str]:
    return rng.sample(LETTERS, count) if count <= len(LETTERS) else [rng.choice(LETTERS) for _ in range(count)]


def grid_view(rng: Random, size: tuple[int, int], like: View | None = None) -> View:
    """A grid of two to six rows and columns, filled. ``like``: of the same rows and columns as that, and of its items:
    most in their places, or shuffled, so that it matters in which of the two one looks."""
    view = blank(rng, size, "grid", ("plain", "plain", "gradient", "texture"))
    if like:
        rows, columns = len(like.cells), len(like.cells[0])
    else:
        rows, columns = (rng.randint(2, max(2, min(5, side // CELL))) for side in (size[1], size[0]))
    even = not like and max(size) <= 288 and rng.random() < 0.4
    if even:  # of many: a cell for each image token
        rows, columns = size[1] // 32, size[0] // 32
    margin = 0.0 if even else rng.uniform(0, 0.06)
    left, top = view.width * margin, view.height * margin
    wide, high = (view.width - 2 * left) / columns, (view.height - 2 * top) / rows
    places = [
        (left + (column + 0.5) * wide, top + (row + 0.5) * high, min(wide, high, 0.4 * unit_of(view)))
        for row in range(rows)
        for column in range(columns)
    ]
    labels = [label for row in like.cells for label in row] if like else None
    if labels and rng.random() < 0.6:
        rng.shuffle(labels)
    elif labels:
        for at in rng.sample(range(len(labels)), rng.randint(1, len(labels) // 2)):
            labels[at] = rng.choice(labels if " " in labels[0] else LETTERS)
    view, labels = _items(rng, view, places, labels)
    cells = tuple(tuple(labels[row * columns : (row + 1) * columns]) for row in range(rows))
    lines: list[Line] = []
    if rng.random() < 0.65:
        rgb, width = guide(rng, view.ground), rng.uniform(1, 2.5)
        right, bottom = view.width - left, view.height - top
        lines += [Line(((left + c * wide, top), (left + c * wide, bottom)), rgb, width) for c in range(columns + 1)]
        lines += [Line(((left, top + r * high), (right, top + r * high)), rgb, width) for r in range(rows + 1)]
    return replace(view, cells=cells, lines=tuple(lines))


def rows_view(rng: Random, size: tuple[int, int]) -> View:
    """Two to four rows of two to six things each, in no columns."""
    view = blank(rng, size, "rows", ("plain", "plain", "gradient", "texture"))
    rows = rng.randint(2, max(2, min(4, size[1] // CELL)))
    high = view.height / rows
    places, counts = [], []
    for row in range(rows):
        count = rng.randint(2, max(2, min(6, size[0] // CELL)))
        counts.append(count)
        wide = view.width * rng.uniform(0.75, 1.0) / count
        left = rng.uniform(0, view.width - wide * count)
        room = min(wide, high, 0.4 * unit_of(view))
        for column in range(count):
            slack = max(0.0, (wide - room) * 0.4)
            x = left + (column + 0.5) * wide + rng.uniform(-slack, slack)
            places.append((x, (row + 0.5) * high + rng.uniform(-0.04, 0.04) * high, room * 0.9))
    view, labels = _items(rng, view, places, None)
    left_over = iter(labels)
    return replace(view, cells=tuple(tuple(next(left_over) for _ in range(count)) for count in counts))


def path_view(rng: Random, size: tuple[int, int]) -> View:
    """A line from a ring through three to six characters; half of them go to and fro from one side to the other."""
    view = blank(rng, size, "path", ("plain", "plain", "gradient"))
    room = min(rng.uniform(0.13, 0.17) * unit_of(view), 0.4 * min(view.width, view.height))
    stations = (_zigzag if rng.random() < 0.5 else _anyhow)(rng, view, rng.randint(3, 6), room)
    if len(stations) < 3:
        return path_view(rng, size)
    labels = _few_twice(rng, len(stations))
    colour, rgb = ink_for(rng, view.ground)
    font, line_rgb, width = rng.randrange(FONTS), guide(rng, view.ground), rng.uniform(1.5, 3.5)
    writings, parts = [], []
    for label, (x, y) in zip(labels, stations, strict=True):
        height = min(room * 0.95, room * 1.1 / extent(label, font, 1.0, 1.0))
        writings.append(Writing(label, x, y, height, font, rgb, colour))
    for (a, b), (c, d) in pairwise(stations):
        share = 0.85 * room / math.hypot(c - a, d - b)  # the line stops short of the characters
        ends = ((a + (c - a) * share, b + (d - b) * share), (c - (c - a) * share, d - (d - b) * share))
        parts.append(Line(ends, line_rgb, width))
    turn = [2 * math.pi * n / 24 for n in range(26)]
    (x, y), radius = stations[0], 0.85 * room
    ring = Line(tuple((x + radius * math.cos(t), y + radius * math.sin(t)) for t in turn), line_rgb, width)
    return replace(view, writings=tuple(writings), lines=(*parts, ring), cells=(tuple(labels),))


def _zigzag(rng: Random, view: View, wanted: int, room: float) -> list[tuple[float, float]]:
    """Stations one after the other along the width or the height, from either end."""
    upright = view.height > view.width if rng.random() < 0.5 else rng.random() < 0.5
    length, across = (view.height, view.width) if upright else (view.width, view.height)
    count = min(wanted, int(length / (1.9 * room)))
    step, back = length / max(count, 1), rng.random() < 0.5
    found = []
    for number in range(count):
        jitter = rng.uniform(-1, 1) * min(0.25 * step, max(0.0, step - 1.8 * room) / 2)
        along = min(max((number + 0.5) * step + jitter, room), length - room)
        along, aside = length - along if back else along, rng.uniform(room, across - room)
        found.append((aside, along) if upright else (along, aside))
    return found


def _anyhow(rng: Random, view: View, wanted: int, room: float) -> list[tuple[float, float]]:
    """Stations anywhere, joined by lines that do not meet; fewer if no more find room."""
    found: list[tuple[float, float]] = []
    for _ in range(200):
        if len(found) == wanted:
            break
        x, y = rng.uniform(room, view.width - room), rng.uniform(room, view.height - room)
        far = all(math.hypot(x - a, y - b) > 1.8 * room for a, b in found)
        if far and _clear_path([*found, (x, y)], 1.1 * room):
            found.append((x, y))
    return found


def _clear_path(stations: list[tuple[float, float]], reach: float) -> bool:
    """No part of the path comes near a station that is not at its ends, or crosses another part."""
    parts = list(pairwise(stations))
    for n, part in enumerate(parts):
        if any(_off(station, *part) < reach for m, station in enumerate(stations) if m not in (n, n + 1)):
            return False
        if any(_cross(part, other) for other in parts[: max(0, n - 1)]):
            return False
    return True


def _off(point: tuple[float, float], start: tuple[float, float], end: tuple[float, float]) -> float:
    (x, y), (a, b), (c, d) = point, start, end
    share = max(0.0, min(1.0, ((x - a) * (c - a) + (y - b) * (d - b)) / ((c - a) ** 2 + (d - b) ** 2)))
    return math.hypot(x - a - share * (c - a), y - b - share * (d - b))


def _cross(one: tuple, other: tuple) -> bool:
    def side(a: tuple, b: tuple, c: tuple) -> bool:
        return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])

    return side(*one, other[0]) != side(*one, other[1]) and side(*other, one[0]) != side(*other, one[1])


def nearer_view(rng: Random, size: tuple[int, int], names: tuple[str, str] | None = None) -> View:
    """Two equal things and a third that is clearly nearer to one of them; with ``names``, one of each."""
    view, colours = with_pens(rng, blank(rng, size, "nearer"))
    if names and any(name.split()[0] not in colours for name in names):
        view = replace(view, ground=replace(view.ground, kind="plain", rgb=(230, 230, 230)))
        colours = with_pens(rng, view)[1]
    kinds, style = rng.sample(SHAPES, 2), style_of(rng)
    twin, third = names or tuple(f"{rng.choice(sorted(colours))} {kind}" for kind in kinds)
    unit = unit_of(view)
    label, span = rng.choice((("small", SMALL), ("large", (LARGE[0], 0.28))))
    diameter = min(rng.uniform(*span) * unit, 0.3 * min(view.width, view.height))
    if diameter < LARGE[0] * unit:
        label, diameter = "small", min(diameter, SMALL[1] * unit)
    first = shape(rng, twin.split()[1], twin.split()[0], colours[twin.split()[0]], diameter, label, style)
    other = shape(rng, third.split()[1], third.split()[0], colours[third.split()[0]], diameter, label, style)
    wanted = [other, first] if names else [other, first, first]
    gap, placed = GAP * unit, []
    for _ in range(300):
        if len(placed) == len(wanted):
            break
        left, top, right, bottom = box_of(wanted[len(placed)])
        dx = gap - left + rng.random() * (view.width - (right - left) - 2 * gap)
        dy = gap - top + rng.random() * (view.height - (bottom - top) - 2 * gap)
        thing = replace(wanted[len(placed)], x=dx, y=dy)
        if all(boxes_apart(box_of(thing), box_of(each), gap) for each in placed):
            placed.append(thing)
            if len(placed) == 3 and _even(placed):
                placed.pop()
    if len(placed) < len(wanted):
        return nearer_view(rng, size, names)
    return replace(view, shapes=tuple(placed))


def _even(things: list[Thing]) -> bool:
    """Whether it is not clear which of the last two is nearer to the first."""
    near, far = sorted(math.hypot(things[0].x - t.x, things[0].y - t.y) for t in things[1:])
    return far < 1.4 * near


def chart_view(rng: Random, size: tuple[int, int]) -> View:
    """Two to five bars over lines at every unit, some of them numbered."""
    view, colours = with_pens(rng, blank(rng, size, "chart", ("plain", "plain", "gradient")))
    count = rng.randint(2, min(5, len(colours)))
    values = rng.sample(range(1, CHART_TOP + 1), count)
    numbered = rng.random() < 0.4
    left = view.width * (0.13 if numbered else rng.uniform(0.04, 0.1))
    base, top = view.height * rng.uniform(0.88, 0.96), view.height * rng.uniform(0.05, 0.12)
    unit, right = (base - top) / CHART_TOP, view.width * rng.uniform(0.9, 0.97)
    slot = (right - left) / count
    share, rgb = rng.uniform(0.5, 0.85), guide(rng, view.ground)
    lines = [
        Line(((left * 0.8, base - v * unit), (right, base - v * unit)), rgb, 2 if v == 0 else 1)
        for v in range(CHART_TOP + 1)
    ]
    columns = []
    for number, (value, name) in enumerate(zip(values, rng.sample(sorted(colours), count), strict=True)):
        start = left + slot * (number + (1 - share) / 2)
        columns.append(Column(Bar(name, value), start, start + slot * share, base - value * unit, base, colours[name]))
    writings: list[Writing] = []
    if numbered:
        colour, ink = ink_for(rng, view.ground)
        font = rng.randrange(FONTS)
        for value in range(1, CHART_TOP + 1):
            height = min(unit * 0.8, left * 0.6)
            at = left * 0.42, base - value * unit
            writings.append(Writing(str(value), *at, height, font, ink, colour))
    return replace(view, lines=tuple(lines), columns=tuple(columns), writings=tuple(writings))
