"""The wide set: what it says is in a picture is there, and none of it is in a held-out set."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from demo_training import asking, heldout_board
from demo_training.asking import ONE, make_wide_example, one_view, two_view_facts, two_views, view_facts, wide_size
from demo_training.glyphs import FONTS, _files
from demo_training.grounds import _PHOTOGRAPHS
from demo_training.heldout_phrases import ASKED, HELDOUT_WORDS
from demo_training.layouts import WIDE_SIZES, shapes_view
from demo_training.ordered import grid_view
from demo_training.palette import CLEAR, distance, shade
from demo_training.patterns import PATTERNS
from demo_training.phrases import ENDINGS, FILLERS, OPENINGS, UNKNOWN, expansions, phrase, phrasings_of
from demo_training.pictures import targets_of
from demo_training.questions import PHRASINGS
from demo_training.rendering import TRAINING_DIGITS, outline_of, render, view_marks
from demo_training.scenes import COLOURS
from demo_training.scenes import WORDS as SCENE_WORDS
from demo_training.views import RENDERERS, Finish, Ground
from demo_training.words import WORDS, number_to_read, word_to_read
from qwen3vl_moe.inputs.images import smart_resize

PLAIN = {"ground": Ground("plain", (255, 255, 255), 0), "finish": Finish()}


def views(kind: str, count: int):
    for number in range(count):
        rng = Random(f"{kind}/{number}")
        yield one_view(rng, wide_size(rng), kind)


@pytest.mark.parametrize("kind", ONE)
def test_views_are_the_same_on_every_call_and_have_a_question(kind):
    for first, second in zip(views(kind, 4), views(kind, 4), strict=True):
        assert first == second
        picture = render(first)
        assert picture.size == (first.width, first.height)
        assert picture.tobytes() == render(second).tobytes()
        assert view_facts(first, Random(0))


@pytest.mark.parametrize("renderer", sorted(set(RENDERERS)))
def test_shapes_have_their_colour_and_their_edges_where_it_is_said(renderer):
    for number in range(12):
        rng = Random(f"shapes/{number}")
        view = replace(shapes_view(rng, wide_size(rng)), renderer=renderer, **PLAIN)
        pixels = np.asarray(render(view)).astype(int)
        covered = np.zeros(pixels.shape[:2], bool)
        for thing in view.shapes:
            points = outline_of(thing)
            if not thing.line:
                middle = points.mean(0).round().astype(int)
                assert np.abs(pixels[middle[1], middle[0]] - thing.rgb).max() <= 2
            line = max(thing.line, thing.radius / 10) + 2
            low, high = points.min(0) - line, points.max(0) + line
            left, top = np.floor(low).astype(int)
            right, bottom = np.ceil(high).astype(int)
            assert 0 <= points[:, 0].min() <= points[:, 0].max() <= view.width
            assert 0 <= points[:, 1].min() <= points[:, 1].max() <= view.height
            covered[max(0, top) : bottom + 2, max(0, left) : right + 2] = True
        assert (pixels[~covered] == 255).all()  # nothing anywhere else


def test_marks_are_in_the_cells_that_the_answers_name():
    for number in range(30):
        rng = Random(f"grid/{number}")
        view = grid_view(rng, wide_size(rng))
        rows, columns = len(view.cells), len(view.cells[0])
        at = {}
        for mark in view_marks(view):
            name = mark.what if len(mark.what) == 1 else f"{mark.colour} {mark.what}"
            at[int(mark.y / view.height * rows), int(mark.x / view.width * columns)] = name
        assert at == {(r, c): view.cells[r][c] for r in range(rows) for c in range(columns)}


@pytest.mark.parametrize("kind", ["number", "word"])
def test_writing_is_whole_and_spelled_by_its_marks(kind):
    for view in views(kind, 25):
        view = replace(view, lines=(), **PLAIN)
        (writing,) = view.writings
        view = replace(view, writings=(replace(writing, rgb=(0, 0, 0)),))
        ink = np.asarray(render(view)).min(-1) < 128
        assert ink.sum() > 12
        assert not np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]]).any()
        found = view_marks(view)
        assert (writing.rgb == (255, 255, 255)) <= (writing.colour == "")
        assert "".join(mark.what for mark in found) == writing.text
        for mark in found:
            reach = int(writing.height)
            x, y = int(mark.x), int(mark.y)
            assert ink[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].any()


def test_targets_name_every_mark():
    for kind in ("shapes", "word", "grid", "digit", "chart"):
        for view in views(kind, 5):
            target = targets_of(view, view.size)
            assert target.shape == (6, view.size[0] * view.size[1] // 128)
            assert 0 < int((target[0] > 0).sum()) <= len(view_marks(view))
            assert (target[3] >= 0).any() == (kind == "word")
            assert torch.equal(target[4] >= 0, target[0] > 0) == (kind in ("grid", "word"))


def test_sizes_are_not_resized_by_the_processor():
    for width, height in WIDE_SIZES:
        assert smart_resize(height, width, 32, 128 * 128, 192 * 192) == (height, width)
    assert max(w / h for w, h in WIDE_SIZES) > 3
    assert max(h / w for w, h in WIDE_SIZES) > 3


def test_no_question_of_an_example_has_two_answers_and_all_kinds_come():
    kinds = set()
    for number in range(700):
        rng = Random(number)
        example = make_wide_example(0, number, size=wide_size(rng), images=1 + number % 5 // 4, turns=5)
        assert example.questions
        kinds |= {question.kind for question in example.questions}
        asked: dict[str, str] = {}
        for question in example.questions:
            assert "{" not in question.text
            assert asked.setdefault(question.text, question.answer) == question.answer
            assert question.answer == question.answer.strip() != ""
    assert kinds == {*PATTERNS, "unknown"}


def test_a_picture_with_nothing_clear_to_ask_about_is_drawn_anew(monkeypatch):
    drawn, facts_of = [], asking.view_facts

    def facts(view, rng):
        drawn.append(view)
        return facts_of(view, rng) if len(drawn) == 3 else []

    monkeypatch.setattr(asking, "view_facts", facts)
    example = make_wide_example(0, 5, size=(96, 224), turns=3)
    assert example.questions
    assert example.scenes == (drawn[2],)
    with pytest.raises(ValueError, match="turns"):
        make_wide_example(0, 5, size=(96, 224), turns=0)


def test_two_pictures_differ_where_it_is_said():
    for number in range(40):
        rng = Random(f"two/{number}")
        first, second = two_views(rng, wide_size(rng))
        assert first.kind == second.kind
        if first.kind == "grid":
            assert [len(row) for row in first.cells] == [len(row) for row in second.cells]


def test_shades_are_told_apart():
    """Two shades of different names never look alike."""
    rng = Random(0)
    shades = [(name, shade(rng, name)) for _ in range(60) for name in COLOURS]
    close = [(a, b) for a in shades for b in shades if a[0] != b[0] and distance(a[1], b[1]) < 14]
    assert not close
    assert distance((255, 255, 255), (0, 0, 0)) > CLEAR


def test_words_to_read_are_held_out_nowhere():
    assert not set(WORDS) & set(SCENE_WORDS)
    assert not set(HELDOUT_WORDS) & {*WORDS, *SCENE_WORDS}
    assert len(WORDS) > 900
    rng = Random(0)
    for longest in (2, 5, 9):
        for _ in range(100):
            assert 2 <= len(word_to_read(rng, longest)) <= longest
            assert number_to_read(rng, longest).isdigit()


def test_no_phrasing_is_held_out():
    """Every phrasing of every pattern, against the phrasings of both held-out sets, whatever fills the blanks."""

    def bare(text: str) -> str:
        for blank in ("{", "}"):
            text = text.replace(blank, "|")
        pieces = text.split("|")
        return "*".join(pieces[::2]).lower().rstrip("?.")

    ours = {bare(text) for kind in PATTERNS for group in phrasings_of(kind) for text in group}
    ours |= {bare(text) for texts in PHRASINGS.values() for text in texts[:-1]}
    assert not ours & {bare(texts[-1]) for texts in PHRASINGS.values()}
    assert not ours & {bare(text) for texts in ASKED.values() for text in texts}
    assert all(group for kind in PATTERNS for group in phrasings_of(kind))
    assert sum(1 for patterns in PATTERNS.values() for p in patterns for _ in expansions(p)) > 800


def test_every_phrasing_is_filled_by_what_its_kind_knows():
    blanks: dict[str, dict[str, str]] = {}
    for number in range(300):
        rng = Random(f"blanks/{number}")
        pair = two_views(rng, wide_size(rng))
        facts = two_view_facts(*pair, rng)
        facts += [fact for kind in ONE for fact in view_facts(one_view(rng, wide_size(rng), kind), rng)]
        for kind, filled, _ in facts:
            blanks.setdefault(kind, filled)
        if blanks.keys() >= PATTERNS.keys():
            break
    for kind in PATTERNS:
        for group in phrasings_of(kind):
            for text in group:
                assert text.format(**blanks[kind], any="gub")


def test_questions_are_typed_in_several_ways():
    blanks = {"name": "orange circle"}
    texts = {phrase(Random(number), "exists", blanks) for number in range(200)}
    assert len(texts) > 30
    assert not any(" a orange" in text.lower() for text in texts)


def test_words_that_are_none_leave_the_names_whole():
    blanks = {"side": "left of", "item": "7"}
    texts = [phrase(Random(number), "beside", blanks) for number in range(400)]
    assert all(re.search(r"\bleft of\b.*\b7\b|\b7\b.*\bleft of\b", text, re.IGNORECASE) for text in texts)
    known = {word for group in phrasings_of("beside") for text in group for word in re.findall("[a-z]+", text.lower())}
    known |= {word for text in (*OPENINGS, *ENDINGS, *FILLERS) for word in re.findall("[a-z]+", text.lower())}
    strange = [set(re.findall("[a-z]+", text.lower())) - known - {"left", "of"} for text in texts]
    assert len(texts) * UNKNOWN / 2 < sum(map(bool, strange)) < len(texts) / 2


def test_fonts_photographs_and_hands_are_held_out_nowhere():
    heldout = {path.rsplit("/", 1)[-1] for _, path in (*heldout_board.FACES, *heldout_board.PHOTOGRAPHS)}
    assert not heldout & {path.name for path in _files()}
    assert not heldout & {file for _, _, files in _PHOTOGRAPHS for file in files}
    assert len(_files()) == FONTS - 1
    assert heldout_board.FIRST_HAND >= TRAINING_DIGITS
