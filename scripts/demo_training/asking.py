"""Questions about views, each with its one answer, and the examples of the wide set.

Facts are read off the view's description; how a fact is asked for stands in phrases.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from random import Random

from demo_training.layouts import WIDE_SIZES, digit_view, photograph_view, shapes_view, unit_of, writing_view
from demo_training.mentions import mentions_of
from demo_training.ordered import CELL, chart_view, grid_view, nearer_view, path_view, rows_view
from demo_training.phrases import phrase
from demo_training.questions import Example, Fact, Question, scene_facts, shape_facts, two_picture_facts
from demo_training.views import View
from demo_training.words import number_to_read, word_to_read

UNKNOWN = "I do not know this one."
NUMBERS = {2: "two", 3: "three"}
NTH = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
# Of one picture, and of two, by weight. Plain shapes have many kinds of questions; reading is hardest to learn.
ONE = {
    "shapes": 27, "word": 30, "number": 8, "grid": 22, "rows": 6, "path": 12, "nearer": 7, "chart": 5, "digit": 3,
    "photograph": 3,
}  # fmt: skip
TWO = {"shapes": 6, "grid": 7, "nearer": 3}
# Kinds that are asked more often than others of the same picture: it takes longest to find out what they are about.
OFTEN = {
    "left_or_right": 3.0, "above_or_below": 3.0, "beside": 3.0, "beside_in_one": 2.0, "steps": 2.0, "path": 2.0,
    "path_next": 0.5, "cell_same": 0.5, "describe": 1.5, "colour": 1.5, "shape": 1.5, "size": 1.5,
}  # fmt: skip
SPELLED = frozenset(("word", "number", "path", "digit"))  # answered letter by letter


def make_wide_example(
    seed: int, number: int, *, size: tuple[int, int], images: int = 1, turns: int = 1, easy: bool = False
) -> Example:
    """Example ``number`` of the wide set, the same on every call; arguments as of :func:`make_example`."""
    if turns < 1:
        raise ValueError(f"turns {turns}: at least 1 is needed")
    rng = Random(f"wide/{seed}/{number}")
    questions: list[Question] = []
    while not questions:  # about a narrow picture of things that are close together there may be nothing clear to ask
        views = _drawn(rng, size, images, easy)
        facts = view_facts(views[0], rng) if len(views) == 1 else two_view_facts(*views, rng)
        questions = _asked(rng, views, facts, turns)
    return Example(views, tuple(questions))


def _drawn(rng: Random, size: tuple[int, int], images: int, easy: bool) -> tuple[View, ...]:
    if easy:
        return (_easy_view(rng, size),)
    if images == 1:
        return (one_view(rng, size, rng.choices(tuple(ONE), tuple(ONE.values()))[0]),)
    return two_views(rng, size)


def _asked(rng: Random, views: tuple[View, ...], facts: list[Fact], turns: int) -> list[Question]:
    by_kind: dict[str, list[Fact]] = {}
    for fact in facts:
        by_kind.setdefault(fact[0], []).append(fact)
    questions: list[Question] = []
    while len(questions) < turns and by_kind:
        kind = rng.choices(list(by_kind), [OFTEN.get(kind, 1.0) for kind in by_kind])[0]
        _, blanks, answer = by_kind[kind].pop(rng.randrange(len(by_kind[kind])))
        if not by_kind[kind] or (kind in ("count", "cell", "in_row") and rng.random() < 0.4):
            by_kind.pop(kind)
        asked = "describe" if kind == "unknown" else kind
        text = phrase(rng, asked, blanks)
        questions.append(Question(kind, text, answer, kind in SPELLED, mentions_of(views, blanks)))
    return questions


def _easy_view(rng: Random, size: tuple[int, int]) -> View:
    if rng.random() < 0.25:
        return writing_view(rng, size, "number", number_to_read(rng, 1))
    return shapes_view(rng, size, rng.choice((1, 1, 2, 3)))


def one_view(rng: Random, size: tuple[int, int], kind: str) -> View:
    if kind in ("word", "number"):
        longest = max(2, min(9, size[0] // 14))
        return writing_view(rng, size, kind, (word_to_read if kind == "word" else number_to_read)(rng, longest))
    makers: dict[str, Callable[[Random, tuple[int, int]], View]] = {
        "shapes": shapes_view, "grid": grid_view, "rows": rows_view, "path": path_view, "nearer": nearer_view,
        "chart": chart_view, "digit": digit_view, "photograph": photograph_view,
    }  # fmt: skip
    return makers[kind](rng, size)


def two_views(rng: Random, size: tuple[int, int]) -> tuple[View, View]:
    """The first has this size; the second, in half of the cases, another."""
    kind = rng.choices(tuple(TWO), tuple(TWO.values()))[0]
    other = size if rng.random() < 0.5 else wide_size(rng)
    if kind == "shapes":
        return shapes_view(rng, size), shapes_view(rng, other)
    if kind == "grid":
        first = grid_view(rng, size)
        fits = other[0] >= CELL * len(first.cells[0]) and other[1] >= CELL * len(first.cells)
        return first, grid_view(rng, other if fits else size, like=first)
    first = nearer_view(rng, size)
    names = (first.shapes[1].name, first.shapes[0].name)
    for _ in range(20):
        pair = nearer_view(rng, size, names), nearer_view(rng, other, names)
        near, far = sorted(_gap(view) for view in pair)
        if far > 1.4 * near:
            return pair
    return shapes_view(rng, size), shapes_view(rng, size)


def _gap(view: View) -> float:
    """Between the first two shapes of a view, as a share of the picture."""
    one, other = view.shapes[:2]
    return math.hypot(one.x - other.x, one.y - other.y) / unit_of(view)


def view_facts(view: View, rng: Random) -> list[Fact]:
    """Everything that can be asked about one picture."""
    if view.kind == "shapes":
        return _shapes_facts(view, rng)
    if view.kind == "chart":
        return scene_facts(view, rng)
    if view.kind in ("number", "word"):
        return [(view.kind, {}, view.text)]
    if view.kind == "digit":
        return [("digit", {}, view.handwriting[0].digit)]
    if view.kind == "photograph":
        return [("unknown", {}, UNKNOWN)]
    if view.kind == "nearer":
        return _nearer_facts(view)
    if view.kind == "path":
        return _path_facts(view)
    return _grid_facts(view) if view.kind == "grid" else _row_facts(view)


def _shapes_facts(view: View, rng: Random) -> list[Fact]:
    facts = shape_facts(view, rng, nearest=0.11 * unit_of(view))
    if len(view.shapes) == 1:
        facts += [("only_shape", {}, view.shapes[0].kind), ("only_colour", {}, view.shapes[0].colour)]
        facts = [fact for fact in facts if fact[0] != "count" or rng.random() < 0.3]
    if view.finish.grey:  # nothing about colours
        named = {"only_shape", "count"}
        facts = [f for f in facts if f[0] in named and not any(" " in blank for blank in f[1].values())]
        facts = facts or [("count", {"what": "shapes"}, str(len(view.shapes)))]
    return facts


def _grid_facts(view: View) -> list[Fact]:
    facts = _row_facts(view)
    rows = len(view.cells)
    all_cells = Counter(label for row in view.cells for label in row)
    for r, row in enumerate(view.cells):
        for c, label in enumerate(row):
            where = {"row": str(r + 1), "column": str(c + 1), "nth_row": NTH[r], "nth_column": NTH[c]}
            facts.append(("cell", where, label))
            down, side = (r, "top") if r <= rows - 1 - r else (rows - 1 - r, "bottom")
            facts.append(("in_column", {**where, "nth": NTH[down], "side": side}, label))
            if all_cells[label] > 1:
                continue
            facts.append(("cell_of", {"item": label}, f"row {r + 1}, column {c + 1}"))
    for label, side, to, steps, other in _neighbours(view):
        if steps == 1:
            facts.append(("beside", {"item": label, "side": side}, other))
        else:
            facts.append(("steps", {"item": label, "side": side, "to": to, "steps": NUMBERS[steps]}, other))
    return facts


def _neighbours(view: View) -> list[tuple[str, str, str, int, str]]:
    """Of what stands once in a grid: ``(it, "left of", "to the left", steps, what is there)``, for one to three."""
    counts = Counter(label for row in view.cells for label in row)
    found = []
    for r, row in enumerate(view.cells):
        for c, label in enumerate(row):
            for steps in (1, 2, 3) if counts[label] == 1 else ():
                for side, to, y, x in (
                    ("left of", "to the left", r, c - steps),
                    ("right of", "to the right", r, c + steps),
                    ("above", "up", r - steps, c),
                    ("below", "down", r + steps, c),
                ):
                    if 0 <= y < len(view.cells) and 0 <= x < len(row):
                        found.append((label, side, to, steps, view.cells[y][x]))
    return found


def _row_facts(view: View) -> list[Fact]:
    facts: list[Fact] = []
    for r, row in enumerate(view.cells):
        for c, label in enumerate(row):
            for nth, side in ((c, "left"), (len(row) - 1 - c, "right")):
                blanks = {"nth": NTH[nth], "side": side, "row": str(r + 1), "nth_row": NTH[r]}
                facts.append(("in_row", blanks, label))
    return facts


def _path_facts(view: View) -> list[Fact]:
    (labels,) = view.cells
    facts: list[Fact] = [("path", {}, "".join(labels))]
    return facts + [("path_next", {"item": a}, b) for a, b in pairwise(labels)]


def _nearer_facts(view: View) -> list[Fact]:
    third, one, two = view.shapes
    closer = one if math.hypot(one.x - third.x, one.y - third.y) < math.hypot(two.x - third.x, two.y - third.y) else two
    facts: list[Fact] = []
    for axis, names in (("x", ("left", "right")), ("y", ("upper", "lower"))):
        low, high = sorted((one, two), key=lambda thing: getattr(thing, axis))
        if getattr(high, axis) - getattr(low, axis) > 0.12 * unit_of(view):
            blanks = {"name": one.name, "other": third.name, "one": names[0], "two": names[1]}
            facts.append(("nearer", blanks, names[closer is high]))
    return facts


def two_view_facts(first: View, second: View, rng: Random) -> list[Fact]:
    """Questions about two pictures."""
    if first.kind == "shapes":
        return two_picture_facts(first, second, rng)
    if first.kind == "nearer":
        blanks = {"name": first.shapes[1].name, "other": first.shapes[0].name}
        return [("nearer_picture", blanks, "first" if _gap(first) < _gap(second) else "second")]
    facts: list[Fact] = []
    for which, view in (("first", first), ("second", second)):
        for r, row in enumerate(view.cells):
            for c, label in enumerate(row):
                facts.append(("cell_in_one", {"row": str(r + 1), "column": str(c + 1), "which": which}, label))
        for label, side, _, steps, other in _neighbours(view):
            if steps == 1:
                facts.append(("beside_in_one", {"item": label, "side": side, "which": which}, other))
    answers: dict[str, list[Fact]] = {"yes": [], "no": []}
    for r, rows in enumerate(zip(first.cells, second.cells, strict=True)):
        for c, (one, other) in enumerate(zip(*rows, strict=True)):
            answer = "yes" if one == other else "no"
            answers[answer].append(("cell_same", {"row": str(r + 1), "column": str(c + 1)}, answer))
    least = min(map(len, answers.values()))
    return facts + [fact for group in answers.values() for fact in rng.sample(group, least)]


def wide_size(rng: Random) -> tuple[int, int]:
    return rng.choice(WIDE_SIZES)
