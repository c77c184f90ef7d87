"""Questions about scenes, each with its one answer. Kinds have names, so that accuracy can be reported by kind.

The last phrasing of each kind is held out: training never shows it, the held-out set asks nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from demo_training.mentions import Mention, mentions_of
from demo_training.scenes import CHART_TOP, COLOURS, SHAPES, SIZES, Scene, draw_scene
from demo_training.views import View

PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {shape}?",
        "What color is the {shape} in the picture?",
        "Which colour does the {shape} have?",
        "Name the colour of the {shape}.",
        "Tell me: what colour is this {shape}?",
        "Which color is the {shape}?",
    ),
    "shape": (
        "What shape is {colour}?",
        "What is the shape of the {colour} object?",
        "Name the {colour} shape.",
        "Which kind of shape is the {colour} one?",
        "What shape does the {colour} object have?",
        "Which shape is {colour} in the picture?",
    ),
    "size": (
        "Is the {name} large or small?",
        "What size is the {name}, small or large?",
        "Is the {name} small or large?",
        "Tell me the size of the {name}: large or small?",
        "Would you call the {name} large or small?",
        "Which size is the {name}: small or large?",
    ),
    "count": (
        "How many {what} are there?",
        "How many {what} are in the picture?",
        "How many {what} do you see?",
        "Count the {what}.",
        "What is the number of {what}?",
        "Count the {what} in the picture: how many are there?",
    ),
    "exists": (
        "Is there a {name}?",
        "Is there a {name} in the picture?",
        "Do you see a {name}?",
        "Does the picture show a {name}?",
        "Is a {name} in this picture?",
        "Does the picture have a {name}?",
    ),
    "left_or_right": (
        "Is the {name} left or right of the {other}?",
        "Is the {name} to the right or to the left of the {other}?",
        "Where is the {name}, left or right of the {other}?",
        "On which side of the {other} is the {name}, left or right?",
        "Is the {name} to the left or right of the {other} in the picture?",
        "Where do you see the {name}: to the left or to the right of the {other}?",
    ),
    "above_or_below": (
        "Is the {name} above or below the {other}?",
        "Is the {name} below or above the {other}?",
        "Where is the {name}, above or below the {other}?",
        "Tell me: is the {name} above or below the {other}?",
        "Is the {name} above or below the {other} in the picture?",
        "Where do you see the {name}: above or below the {other}?",
    ),
    "describe": (
        "What is in this picture?",
        "What do you see?",
        "Describe the picture.",
        "What does the picture show?",
        "Tell me what is in the picture.",
        "What do you see in this picture?",
    ),
    "number": (
        "What number is written?",
        "Which number is in the picture?",
        "Read the number.",
        "What number do you see?",
        "Tell me the number in the picture.",
        "Which number is written in the picture?",
    ),
    "word": (
        "What word is written?",
        "Which word is in the picture?",
        "Read the word.",
        "What word do you see?",
        "Tell me the word in the picture.",
        "Which word is written in the picture?",
    ),
    "chart_extreme": (
        "Which bar is the {most}?",
        "What colour is the {most} bar?",
        "Name the colour of the {most} bar.",
        "Tell me the color of the {most} bar.",
        "Which colour does the {most} bar have?",
        "What is the color of the {most} bar?",
    ),
    "chart_value": (
        "What is the value of the {colour} bar?",
        "How high is the {colour} bar?",
        "Read the value of the {colour} bar.",
        "Which value does the {colour} bar have?",
        "Tell me the value of the {colour} bar.",
        "What value does the {colour} bar have?",
    ),
    "which_picture": (
        "Which picture has a {name}, the first or the second?",
        "In which picture is there a {name}, first or second?",
        "Is the {name} in the first or in the second picture?",
        "Where do you see a {name}, in the first or the second picture?",
        "Which picture shows a {name}: first or second?",
        "Which picture has the {name}: the first or the second?",
    ),
    "count_in_one": (
        "How many shapes are in the {which} picture?",
        "How many shapes are there in the {which} picture?",
        "Count the shapes in the {which} picture.",
        "What is the number of shapes in the {which} picture?",
        "In the {which} picture, how many shapes do you see?",
        "How many shapes do you see in the {which} picture?",
    ),
}
_OPENINGS = ("", "", "", "Look at the picture. ", "Please answer: ", "A question: ")
NEAREST = 16  # pixels that two centres differ by before one is said to be left of, or above, the other
SCENE_KINDS = ("shapes",) * 5 + ("chart",) * 2 + ("number",) * 3 + ("word",) * 2


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    spelled: bool = False  # learned letter by letter, whatever longer tokens the tokenizer has
    mentions: tuple[Mention, ...] = ()


@dataclass(frozen=True)
class Example:
    """One conversation about one or two scenes."""

    scenes: tuple[Scene | View, ...]
    questions: tuple[Question, ...]


def make_example(
    split: str,
    seed: int,
    number: int,
    *,
    size: tuple[int, int] | None = None,
    images: int | None = None,
    turns: int = 1,
    easy: bool = False,
) -> Example:
    """Example ``number`` of a split, the same on every call.

    Args:
        split: ``train`` or ``heldout``; they share neither random streams nor phrasings.
        seed: of the whole split.
        size: of all pictures; None draws one.
        images: 1 or 2; None draws it, one in five has two.
        turns: most questions asked about the pictures, all different.
        easy: one picture with few shapes.
    """
    rng = Random(f"{split}/{seed}/{number}")
    size = size or rng.choice(SIZES)
    scenes: tuple[Scene, ...]
    if easy:
        scenes = (draw_scene(rng, size, "shapes", most=rng.choice((1, 1, 2, 3))),)
    elif (images or (2 if rng.random() < 0.2 else 1)) == 1:
        kind = rng.choice(SCENE_KINDS)
        scenes = (draw_scene(rng, size, kind),)
    else:
        scenes = (draw_scene(rng, size, "shapes"), draw_scene(rng, size, "shapes"))
    facts = two_picture_facts(*scenes, rng) if len(scenes) == 2 else scene_facts(scenes[0], rng)
    # Kinds first, then a question of that kind: kinds with many possible questions shall not crowd out the others.
    by_kind: dict[str, list[tuple[dict[str, str], str]]] = {}
    for kind, blanks, answer in facts:
        by_kind.setdefault(kind, []).append((blanks, answer))
    questions: list[Question] = []
    while len(questions) < turns and by_kind:
        kind = rng.choice(list(by_kind))
        blanks, answer = by_kind[kind].pop(rng.randrange(len(by_kind[kind])))
        if not by_kind[kind]:
            del by_kind[kind]
        phrasing = rng.choice(PHRASINGS[kind][:-1]) if split == "train" else PHRASINGS[kind][-1]
        opening = rng.choice(_OPENINGS) if split == "train" else ""
        text = opening + _with_article(phrasing.format(**blanks))
        questions.append(Question(kind, text, answer, kind == "word", mentions_of(scenes, blanks)))
    return Example(scenes, tuple(questions))


Fact = tuple[str, dict[str, str], str]  # kind, what fills the phrasing, answer


def scene_facts(scene: Scene | View, rng: Random) -> list[Fact]:
    """Everything that can be asked about one picture; yes and no, and zero, are kept in proportion by ``rng``."""
    if scene.text:
        return [("number" if scene.text.isdigit() else "word", {}, scene.text)]
    if scene.bars:
        highest, lowest = (pick(scene.bars, key=lambda bar: bar.value).colour for pick in (max, min))
        facts: list[Fact] = [
            ("chart_extreme", {"most": "highest"}, highest),
            ("chart_extreme", {"most": "lowest"}, lowest),
        ]
        assert all(bar.value <= CHART_TOP for bar in scene.bars)
        return facts + [("chart_value", {"colour": bar.colour}, str(bar.value)) for bar in scene.bars]
    return shape_facts(scene, rng)


def shape_facts(scene: Scene | View, rng: Random, nearest: float = NEAREST) -> list[Fact]:
    """Of shapes; two centres differ by ``nearest`` at least where it is asked which is left, or above."""
    shapes = scene.shapes
    kinds, colours, names = (Counter(getattr(s, what) for s in shapes) for what in ("kind", "colour", "name"))
    facts: list[Fact] = [("count", {"what": "shapes"}, str(len(shapes)))]
    facts += [("count", {"what": f"{kind}s" if kind != "cross" else "crosses"}, str(n)) for kind, n in kinds.items()]
    facts += [("count", {"what": f"{colour} shapes"}, str(n)) for colour, n in colours.items()]
    absent = rng.choice([colour for colour in COLOURS if colour not in colours])
    facts.append(("count", {"what": f"{absent} shapes"}, "0"))
    facts += [("colour", {"shape": s.kind}, s.colour) for s in shapes if kinds[s.kind] == 1]
    facts += [("shape", {"colour": s.colour}, s.kind) for s in shapes if colours[s.colour] == 1]
    unique = [s for s in shapes if names[s.name] == 1]
    facts += [("size", {"name": s.name}, s.size) for s in unique]
    facts.append(("exists", {"name": rng.choice(list(names))}, "yes"))
    facts.append(("exists", {"name": rng.choice(_absent_names(names))}, "no"))
    for first in unique:
        for other in unique:
            blanks = {"name": first.name, "other": other.name}
            if abs(first.x - other.x) >= nearest:
                facts.append(("left_or_right", blanks, "left" if first.x < other.x else "right"))
            if abs(first.y - other.y) >= nearest:
                facts.append(("above_or_below", blanks, "above" if first.y < other.y else "below"))
    described = describe(scene, nearest)
    return [*facts, ("describe", {}, described)] if described else facts


def describe(scene: Scene | View, nearest: float = NEAREST) -> str | None:
    """One sentence from left to right, for up to three shapes whose order from left to right is clear."""
    ordered = sorted(scene.shapes, key=lambda shape: shape.x)
    gaps = [b.x - a.x for a, b in pairwise(ordered)]
    if len(ordered) > 3 or any(gap < nearest for gap in gaps):
        return None
    parts = [f"a {shape.size} {shape.name}" for shape in ordered]
    if len(parts) == 1:
        return f"{parts[0].capitalize()}."
    return f"From left to right: {', '.join(parts[:-1])} and {parts[-1]}."


def two_picture_facts(first: Scene | View, second: Scene | View, rng: Random) -> list[Fact]:
    """Questions that only the right one of two pictures answers."""
    facts: list[Fact] = [
        ("count_in_one", {"which": "first"}, str(len(first.shapes))),
        ("count_in_one", {"which": "second"}, str(len(second.shapes))),
    ]
    names = [{shape.name for shape in scene.shapes} for scene in (first, second)]
    for which, mine, theirs in (("first", *names), ("second", *reversed(names))):
        if only := sorted(mine - theirs):
            facts.append(("which_picture", {"name": rng.choice(only)}, which))
    return facts


def _with_article(text: str) -> str:
    return text.replace(" a orange", " an orange")


def _absent_names(names: Counter[str]) -> list[str]:
    """Names that are not there; those that share colour or shape with something, if any, since these are harder."""
    present = {tuple(name.split()) for name in names}
    absent = [(c, k) for c in COLOURS for k in SHAPES if (c, k) not in present]
    near = [(c, k) for c, k in absent if any(c == pc for pc, _ in present) and any(k == pk for _, pk in present)]
    return [" ".join(pair) for pair in near or absent]
