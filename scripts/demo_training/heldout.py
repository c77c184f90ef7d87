"""The new held-out questions: pictures, words and phrasings that share no code with the training's.

Pictures are matplotlib's (heldout_board.py), in other fonts; words are of a list of its own; each kind is asked in
phrasings that no training pattern gives (a test expands them all). Question n is the same on every call, and kinds
take turns, so that the first questions are a fair sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from PIL import Image

from demo_training.heldout_board import FACES, FORMS, PAINTS, PAPERS, PHOTOGRAPHS, Board, hands, photograph
from demo_training.heldout_phrases import ASKED, DONT_KNOW, HELDOUT_WORDS, INKS, KINDS, ORDINALS, SIDES, SIGNS


@dataclass(frozen=True)
class HeldOut:
    """A question of ``kind`` about one or two pictures, and its one answer."""

    kind: str
    pictures: tuple[Image.Image, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Form:
    form: str
    colour: str
    x: float
    y: float
    half: float
    size: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.form}"


def heldout_question(number: int) -> HeldOut:
    """Question ``number``; its kind is that of its turn."""
    kind = KINDS[number % len(KINDS)]
    rng = Random(f"held out by another hand/{number}")
    pictures, blanks, answer = _MAKERS[kind](rng)
    text = rng.choice(ASKED[kind]).format(*blanks).replace(" a orange", " an orange")
    return HeldOut(kind, pictures, text.replace("crosss", "crosses"), answer)


Made = tuple[tuple[Image.Image, ...], tuple[str, ...], str]  # pictures, what fills the phrasing, answer


def _board(rng: Random) -> Board:
    width = rng.randint(150, 330)
    board = Board(width, max(140, round(width * rng.uniform(0.62, 1.5))), rng.choice(PAPERS))
    if rng.random() < 0.2:
        board.shaded((rng.uniform(0, 0.15), rng.uniform(0.1, 0.3)), "steelblue")
    return board


def _forms(rng: Random, board: Board, count: int, sizes: tuple[str, ...] = ("small", "large")) -> list[Form]:
    """So many shapes, all of different names, none near another."""
    root, found = math.sqrt(board.width * board.height), []
    names = rng.sample([(colour, form) for colour in PAINTS for form in FORMS], count)
    for _ in range(3000):
        if len(found) == count:
            return found
        size = rng.choice(sizes)
        half = root * (rng.uniform(0.055, 0.075) if size == "small" else rng.uniform(0.13, 0.16))
        x, y = rng.uniform(half + 6, board.width - half - 6), rng.uniform(half + 6, board.height - half - 6)
        if all(max(abs(x - f.x), abs(y - f.y)) > half + f.half + 0.03 * root for f in found):
            colour, form = names[len(found)]
            found.append(Form(form, colour, x, y, half, size))
    return _forms(rng, board, count, ("small",))


def _drawn(rng: Random, board: Board, forms: list[Form]) -> tuple[Image.Image, ...]:
    border = rng.random() < 0.2
    paints = {colour: rng.choice(paints) for colour, paints in PAINTS.items()}
    for f in forms:
        board.form(f.form, f.x, f.y, f.half, paints[f.colour], border)
    return (board.picture(),)


def _sole(forms: list[Form], what: str) -> list[Form]:
    """Those that share ``what`` with no other."""
    values = [getattr(f, what) for f in forms]
    return [f for f in forms if values.count(getattr(f, what)) == 1]


def _named(what: str, answer: str) -> Callable[[Random], Made]:
    """Asks for one attribute of a shape by another."""

    def make(rng: Random) -> Made:
        while True:
            board = _board(rng)
            forms = _forms(rng, board, rng.randint(1, 4))
            if choice := _sole(forms, what):
                one = rng.choice(choice)
                return _drawn(rng, board, forms), (getattr(one, what),), getattr(one, answer)

    return make


def _exists(rng: Random) -> Made:
    board = _board(rng)
    forms = _forms(rng, board, rng.randint(2, 4))
    names = {f.name for f in forms}
    absent = [f"{a.colour} {b.form}" for a in forms for b in forms if f"{a.colour} {b.form}" not in names]
    if rng.random() < 0.5 and absent:
        return _drawn(rng, board, forms), (rng.choice(absent),), "no"
    return _drawn(rng, board, forms), (rng.choice(forms).name,), "yes"


def _count(rng: Random) -> Made:
    board = _board(rng)
    forms = _forms(rng, board, rng.randint(1, 6))
    form, colour = rng.choice(forms).form, rng.choice(forms).colour
    what, count = rng.choice(
        [
            ("shapes", len(forms)),
            (f"{form}es" if form == "cross" else f"{form}s", sum(f.form == form for f in forms)),
            (f"{colour} shapes", sum(f.colour == colour for f in forms)),
        ]
    )
    return _drawn(rng, board, forms), (what,), str(count)


def _side(axis: str, words: tuple[str, str]) -> Callable[[Random], Made]:
    def make(rng: Random) -> Made:
        while True:
            board = _board(rng)
            forms = _forms(rng, board, rng.randint(2, 4))
            one, other = rng.sample(forms, 2)
            gap = getattr(one, axis) - getattr(other, axis)
            if abs(gap) > 0.12 * math.sqrt(board.width * board.height):
                return _drawn(rng, board, forms), (one.name, other.name), words[gap > 0]

    return make


def _describe_one(rng: Random) -> Made:
    board = _board(rng)
    side = min(board.width, board.height)
    half = side * rng.uniform(0.16, 0.44)
    x, y = rng.uniform(half + 4, board.width - half - 4), rng.uniform(half + 4, board.height - half - 4)
    form = Form(rng.choice(FORMS), rng.choice(tuple(PAINTS)), x, y, half, "large")
    return _drawn(rng, board, [form]), (), f"A large {form.name}."


def _describe_several(rng: Random) -> Made:
    while True:
        board = _board(rng)
        forms = sorted(_forms(rng, board, rng.randint(2, 3)), key=lambda f: f.x)
        gaps = [b.x - a.x for a, b in pairwise(forms)]
        if min(gaps) > 0.12 * math.sqrt(board.width * board.height):
            named = [f"a {f.size} {f.name}" for f in forms]
            return _drawn(rng, board, forms), (), f"From left to right: {', '.join(named[:-1])} and {named[-1]}."


def _written(rng: Random, text: str) -> Made:
    board = _board(rng)
    wide, high = board.width * rng.uniform(0.55, 0.93), board.height * rng.uniform(0.3, 0.85)
    x = board.width / 2 + (board.width - wide) / 2 * rng.uniform(-0.9, 0.9)
    y = board.height / 2 + (board.height - high) / 2 * rng.uniform(-0.9, 0.9)
    board.text(text, x, y, wide, high, rng.randrange(len(FACES)), rng.choice(PAINTS[rng.choice(INKS)]))
    return (board.picture(),), (), text


def _number(rng: Random) -> Made:
    return _written(rng, str(rng.randint(0, 10 ** rng.randint(1, 4) - 1)))


def _word(rng: Random) -> Made:
    word = rng.choice(HELDOUT_WORDS)
    return _written(rng, rng.choice((word, word, word.upper(), word.upper(), word.capitalize())))


def _handwritten(rng: Random) -> Made:
    levels, digits = hands()
    number = rng.randrange(len(digits))
    dark = rng.random() < 0.5
    board = Board(rng.randint(140, 260), rng.randint(140, 260), "black" if dark else "white")
    side = min(board.width, board.height)
    board.grey(levels[number], board.width / 2, board.height / 2, side * rng.uniform(0.6, 0.95), dark)
    return (board.picture(),), (), str(digits[number])


def _bars(asked: str) -> Callable[[Random], Made]:
    def make(rng: Random) -> Made:
        board = Board(rng.randint(180, 300), rng.randint(170, 280), rng.choice(PAPERS))
        values = rng.sample(range(1, 7), rng.randint(2, 4))
        colours = rng.sample(tuple(PAINTS), len(values))
        left, base, unit = board.width * 0.08, board.height * 0.93, board.height * 0.86 / 6
        for level in range(7):
            at = base - level * unit
            board.line([(left * 0.6, at), (board.width * 0.96, at)], "black" if level == 0 else "darkgray", 0.9)
        slot = board.width * 0.86 / len(values)
        for n, (value, colour) in enumerate(zip(values, colours, strict=True)):
            start = left + slot * (n + 0.2)
            board.bar(start, start + 0.6 * slot, base - value * unit, base, rng.choice(PAINTS[colour]))
        if asked == "value":
            n = rng.randrange(len(values))
            return (board.picture(),), (colours[n],), str(values[n])
        most = rng.choice(("highest", "lowest"))
        extreme = (max if most == "highest" else min)(values)
        return (board.picture(),), (most,), colours[values.index(extreme)]

    return make


def _two(rng: Random, counted: bool) -> Made:
    boards = _board(rng), _board(rng)
    both = [_forms(rng, board, rng.randint(1, 6 if counted else 4)) for board in boards]
    pictures = tuple(_drawn(rng, board, forms)[0] for board, forms in zip(boards, both, strict=True))
    which = rng.randrange(2)
    if counted:
        return pictures, (ORDINALS[which],), str(len(both[which]))
    only = [f.name for f in both[which] if f.name not in {g.name for g in both[1 - which]}]
    return (pictures, (rng.choice(only),), ORDINALS[which]) if only else _two(rng, counted)


_Grid = list[list[str]]


def _grid(rng: Random, grid: _Grid) -> Image.Image:
    """Signs, or shapes by their names, in rows and columns."""
    rows, columns = len(grid), len(grid[0])
    board = Board(round(columns * rng.uniform(48, 62)), round(rows * rng.uniform(48, 62)), rng.choice(PAPERS))
    wide, high = board.width / columns, board.height / rows
    paints, face = {colour: rng.choice(paints) for colour, paints in PAINTS.items()}, rng.randrange(len(FACES))
    ink = rng.choice(("black", "navy", "darkred", "darkgreen"))
    for r, row in enumerate(grid):
        for c, label in enumerate(row):
            x, y, room = (c + 0.5) * wide, (r + 0.5) * high, min(wide, high)
            if len(label) == 1:
                board.text(label, x, y, room * 0.62, room * 0.62, face, ink)
            else:
                colour, form = label.split()
                board.form(form, x, y, room * 0.31, paints[colour])
    if rng.random() < 0.6:
        for c in range(columns + 1):
            board.line([(c * wide, 0), (c * wide, board.height)], "gray", 0.9)
        for r in range(rows + 1):
            board.line([(0, r * high), (board.width, r * high)], "gray", 0.9)
    return board.picture()


def _labels(rng: Random) -> _Grid:
    rows, columns = rng.randint(2, 4), rng.randint(3, 5)
    if rng.random() < 0.6:
        signs = rng.sample(SIGNS, rows * columns)
    else:
        signs = [f"{rng.choice(tuple(PAINTS))} {rng.choice(FORMS)}" for _ in range(rows * columns)]
    return [signs[r * columns : (r + 1) * columns] for r in range(rows)]


def _cell(rng: Random) -> Made:
    grid = _labels(rng)
    r, c = rng.randrange(len(grid)), rng.randrange(len(grid[0]))
    return (_grid(rng, grid),), (str(r + 1), str(c + 1)), grid[r][c]


def _from_side(rng: Random) -> Made:
    grid = _labels(rng)
    r, n = rng.randrange(len(grid)), rng.randrange(len(grid[0]))
    side = rng.choice(("left", "right"))
    label = grid[r][n] if side == "left" else grid[r][-1 - n]
    return (_grid(rng, grid),), (ORDINALS[n], side, str(r + 1), ORDINALS[r]), label


def _neighbour(rng: Random, grid: _Grid, steps: int) -> tuple[tuple[str, str, str], str]:
    """What fills the phrasing (side, of which sign, direction), and what stands there; signs of a grid differ."""
    while True:
        side = rng.randrange(4)
        r, c = rng.randrange(len(grid)), rng.randrange(len(grid[0]))
        y, x = r + steps * (0, 0, -1, 1)[side], c + steps * (-1, 1, 0, 0)[side]
        if 0 <= y < len(grid) and 0 <= x < len(grid[0]):
            return (SIDES[side][0], grid[r][c], SIDES[side][1]), grid[y][x]


def _signs(rng: Random) -> _Grid:
    rows, columns = rng.randint(2, 4), rng.randint(3, 5)
    signs = rng.sample(SIGNS, rows * columns)
    return [signs[r * columns : (r + 1) * columns] for r in range(rows)]


def _next_to(steps: int) -> Callable[[Random], Made]:
    def make(rng: Random) -> Made:
        grid = _signs(rng)
        blanks, answer = _neighbour(rng, grid, steps)
        return (_grid(rng, grid),), blanks, answer

    return make


def _next_to_of_two(rng: Random) -> Made:
    first, which = _signs(rng), rng.randrange(2)
    flat = [label for row in first for label in row]
    rng.shuffle(flat)
    second = [flat[r * len(first[0]) : (r + 1) * len(first[0])] for r in range(len(first))]
    (side, sign, _), answer = _neighbour(rng, (first, second)[which], 1)
    return (_grid(rng, first), _grid(rng, second)), (side, sign, ORDINALS[which]), answer


def _cell_of_two(rng: Random) -> Made:
    first = _labels(rng)
    flat = [label for row in first for label in row]
    rng.shuffle(flat)
    second = [flat[r * len(first[0]) : (r + 1) * len(first[0])] for r in range(len(first))]
    r, c, which = rng.randrange(len(first)), rng.randrange(len(first[0])), rng.randrange(2)
    pictures = _grid(rng, first), _grid(rng, second)
    return pictures, (str(r + 1), str(c + 1), ORDINALS[which]), (first, second)[which][r][c]


def _along(rng: Random) -> Made:
    """Signs zigzag from one side to the other, or from top to bottom, either way."""
    board = Board(rng.randint(200, 280), rng.randint(200, 280), rng.choice(PAPERS))
    count = rng.randint(3, 5)
    signs, ink = rng.sample(SIGNS, count), rng.choice(("gray", "steelblue", "darkorange"))
    upright, back = rng.random() < 0.5, rng.random() < 0.5
    places = []
    for n in range(count):
        along = (n + 0.5) / count if not back else 1 - (n + 0.5) / count
        across = rng.uniform(0.14, 0.4) if n % 2 else rng.uniform(0.6, 0.86)
        x, y = (across, along) if upright else (along, across)
        places.append((x * board.width, y * board.height))
    half = 0.075 * min(board.width, board.height)
    for (a, b), (c, d) in pairwise(places):
        share = 1.7 * half / math.hypot(c - a, d - b)
        board.line([(a + (c - a) * share, b + (d - b) * share), (c - (c - a) * share, d - (d - b) * share)], ink, 1.8)
    board.ring(*places[0], 1.7 * half, ink)
    face = rng.randrange(len(FACES))
    for sign, (x, y) in zip(signs, places, strict=True):
        board.text(sign, x, y, 2 * half, 2 * half, face, "black")
    return (board.picture(),), (), "".join(signs)


def _twins(rng: Random) -> Made:
    while True:
        board = _board(rng)
        one, two, third = _forms(rng, board, 3, ("small",))
        two = Form(one.form, one.colour, two.x, two.y, one.half, one.size)
        if third.name == one.name:
            continue
        gaps = [math.hypot(f.x - third.x, f.y - third.y) for f in (one, two)]
        axis, words = rng.choice((("x", ("left", "right")), ("y", ("upper", "lower"))))
        low, high = sorted((one, two), key=lambda f: getattr(f, axis))
        far_apart = getattr(high, axis) - getattr(low, axis) > 0.15 * math.sqrt(board.width * board.height)
        if max(gaps) > 1.5 * min(gaps) and far_apart:
            closer = one if gaps[0] < gaps[1] else two
            return _drawn(rng, board, [one, two, third]), (one.name, third.name, *words), words[closer is high]


def _closer_picture(rng: Random) -> Made:
    while True:
        boards = _board(rng), _board(rng)
        one, other = _forms(rng, boards[0], 2, ("small",))
        again = _forms(rng, boards[1], 2, ("small",))
        moved = [
            Form(f.form, f.colour, at.x, at.y, at.half, at.size) for f, at in zip((one, other), again, strict=True)
        ]
        gaps = [
            math.hypot(a.x - b.x, a.y - b.y) / math.sqrt(board.width * board.height)
            for (a, b), board in zip(((one, other), moved), boards, strict=True)
        ]
        if max(gaps) > 1.6 * min(gaps):
            pictures = *_drawn(rng, boards[0], [one, other]), *_drawn(rng, boards[1], moved)
            return pictures, (one.name, other.name), ORDINALS[gaps[1] < gaps[0]]


def _photograph(rng: Random) -> Made:
    whole = photograph(rng.randrange(len(PHOTOGRAPHS)))
    side = round(min(whole.size) * rng.uniform(0.55, 1.0))
    x, y = rng.randrange(whole.width - side + 1), rng.randrange(whole.height - side + 1)
    return (whole.crop((x, y, x + side, y + side)),), (), DONT_KNOW


_MAKERS: dict[str, Callable[[Random], Made]] = {
    "colour": _named("form", "colour"), "shape": _named("colour", "form"), "size": _named("name", "size"),
    "exists": _exists, "count": _count, "left or right": _side("x", ("left", "right")),
    "above or below": _side("y", ("above", "below")), "describe one": _describe_one,
    "describe several": _describe_several, "number": _number, "word": _word, "handwritten digit": _handwritten,
    "value of a bar": _bars("value"), "highest or lowest bar": _bars("extreme"),
    "which of two pictures": lambda rng: _two(rng, False), "count in one of two": lambda rng: _two(rng, True),
    "row and column": _cell, "so many from the side": _from_side, "beside": _next_to(1),
    "two steps away": _next_to(2), "along a line": _along, "nearer of two": _twins,
    "cell in one of two": _cell_of_two, "beside in one of two": _next_to_of_two,
    "nearer in which picture": _closer_picture, "a photograph": _photograph,
}  # fmt: skip
