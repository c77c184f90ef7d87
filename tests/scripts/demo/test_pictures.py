"""Answers about drawn pictures, computed again from the pixels."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from demo_training.drawing import chart_frame, draw
from demo_training.questions import PHRASINGS, make_example, scene_facts
from demo_training.scenes import COLOURS, LARGEST_AREA, SIZES, SMALLEST_AREA, draw_scene


def scenes_of(kind: str, count: int):
    return [draw_scene(Random(f"{kind}/{n}"), SIZES[n % len(SIZES)], kind) for n in range(count)]


def colour_map(scene) -> np.ndarray:
    """Index into COLOURS of each pixel, -1 where it has none of them exactly."""
    pixels = np.asarray(draw(scene))
    result = np.full(pixels.shape[:2], -1)
    for index, rgb in enumerate(COLOURS.values()):
        result[(pixels == rgb).all(-1)] = index
    return result


def blobs(mask: np.ndarray) -> list[np.ndarray]:
    """Connected components (4 neighbours) of a boolean picture, as lists of (row, column)."""
    left, found = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        edge, blob = [left.pop()], []
        while edge:
            y, x = edge.pop()
            blob.append((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge.extend(near)
        found.append(np.array(blob))
    return found


def answers(scene, kind: str) -> dict[str, str]:
    return {" ".join(blanks.values()): answer for k, blanks, answer in scene_facts(scene, Random(0)) if k == kind}


@pytest.mark.parametrize("scene", scenes_of("shapes", 24))
def test_shapes_are_counted_and_placed_as_the_pixels_say(scene):
    pixels = colour_map(scene)
    found = {name: blobs(pixels == index) for index, name in enumerate(COLOURS)}
    counts = answers(scene, "count")
    assert counts["shapes"] == str(sum(map(len, found.values())))
    for name, parts in found.items():
        assert counts.get(f"{name} shapes", "0") == str(len(parts))
    # With one shape of a colour, its name can be looked up in the picture.
    centres = {name: (p[0].max(0) + p[0].min(0)) / 2 for name, p in found.items() if len(p) == 1}
    boxes = {name: np.ptp(p[0], axis=0) for name, p in found.items() if len(p) == 1}
    for kind, axis, names in (("left_or_right", 1, ("left", "right")), ("above_or_below", 0, ("above", "below"))):
        for _, blanks, answer in (fact for fact in scene_facts(scene, Random(0)) if fact[0] == kind):
            one, other = blanks["name"].split()[0], blanks["other"].split()[0]
            if one in centres and other in centres:
                assert names[int(centres[one][axis] > centres[other][axis])] == answer
    for name, answer in answers(scene, "size").items():
        if (colour := name.split()[0]) in boxes:
            assert ("large" if boxes[colour].max() > 30 else "small") == answer


@pytest.mark.parametrize("scene", scenes_of("shapes", 24))
def test_shapes_are_told_apart_by_how_much_of_their_box_they_fill(scene):
    pixels = colour_map(scene)
    for colour, answer in answers(scene, "shape").items():
        (blob,) = blobs(pixels == list(COLOURS).index(colour))
        height, width = np.ptp(blob, axis=0) + 1
        fill = len(blob) / (height * width)
        rows = np.bincount(blob[:, 0] - blob[:, 0].min())
        if fill > 0.98:
            shape = "square"
        elif fill > 0.7:
            shape = "circle"
        elif rows[-1] > 0.9 * width:
            shape = "triangle"
        else:  # a cross is as wide a quarter down its height as at its top, a diamond grows
            shape = "cross" if rows[height // 4] == rows[1] else "diamond"
        assert shape == answer


@pytest.mark.parametrize("scene", scenes_of("chart", 16))
def test_bars_are_as_high_as_the_answers_say(scene):
    pixels, (_, base, _, unit) = colour_map(scene), chart_frame(scene)
    heights = {}
    for index, name in enumerate(COLOURS):
        if (pixels == index).any():
            heights[name] = (base - np.argwhere(pixels == index)[:, 0].min()) / unit
    values = answers(scene, "chart_value")
    assert values == {name: str(round(height)) for name, height in heights.items()}
    assert answers(scene, "chart_extreme") == {
        "highest": max(heights, key=heights.get),
        "lowest": min(heights, key=heights.get),
    }


@pytest.mark.parametrize("kind", ["number", "word"])
def test_writing_is_whole_and_inside_the_picture(kind):
    for scene in scenes_of(kind, 20):
        pixels = np.asarray(draw(scene)).astype(int)
        ink = np.abs(pixels - COLOURS[scene.ink]).sum(-1) < 60
        assert ink.sum() > 20
        assert not ink[0].any()
        assert not ink[-1].any()
        assert not ink[:, 0].any()
        assert not ink[:, -1].any()


def test_pictures_are_within_the_bounds_that_are_not_resized_to_another_area():
    for kind in ("shapes", "chart", "word"):
        for scene in scenes_of(kind, 60):
            assert SMALLEST_AREA <= scene.width * scene.height <= LARGEST_AREA


def test_every_example_is_the_same_on_every_call():
    for number in range(20):
        first, second = (make_example("train", 3, number, turns=3) for _ in range(2))
        assert first == second
        for one, other in zip(first.scenes, second.scenes, strict=True):
            assert draw(one).tobytes() == draw(other).tobytes()


def test_training_and_heldout_share_no_picture_and_no_phrasing():
    train = [make_example("train", 0, number, turns=5) for number in range(1500)]
    heldout = [make_example("heldout", 0, number) for number in range(1500)]
    assert not {s for e in train for s in e.scenes} & {s for e in heldout for s in e.scenes}
    asked = {q.text for e in heldout for q in e.questions}
    assert not {q.text for e in train for q in e.questions} & asked
    assert {q.kind for e in heldout for q in e.questions} == set(PHRASINGS)
    for kind, phrasings in PHRASINGS.items():
        assert len(phrasings) >= 6, kind
        assert len(set(phrasings)) == len(phrasings), kind
        assert not any(phrasings[-1] in other for other in phrasings[:-1]), kind


def test_no_question_has_two_answers():
    for number in range(300):
        example = make_example("train", 1, number, turns=5)
        for scene in example.scenes:
            seen: dict[tuple, str] = {}
            for kind, blanks, answer in scene_facts(scene, Random(0)):
                key = (kind, *blanks.items())
                assert seen.setdefault(key, answer) == answer
