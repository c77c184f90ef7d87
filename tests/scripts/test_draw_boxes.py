"""scripts/draw_boxes.py: thousandths of each side become pixels, whatever the picture's shape."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import draw_boxes
from qwen3vl_moe.errors import UserError


@pytest.mark.parametrize("size", [(300, 100), (100, 400), (200, 200)])
def test_boxes_lie_where_they_are_said_to(size):
    width, height = size
    red = tuple(bytes.fromhex(draw_boxes.COLOURS[0][1:]))
    text = 'Here:\n```json\n[{"bbox_2d": [100, 200, 500, 900], "label": ""}]\n```'
    picture = draw_boxes.drawn(Image.new("RGB", size, "white"), draw_boxes.boxes_of(text))
    marked = [(x, y) for x in range(width) for y in range(height) if picture.getpixel((x, y)) == red]
    assert (min(x for x, _ in marked), max(x for x, _ in marked)) == (width // 10, width // 2)
    assert (min(y for _, y in marked), max(y for _, y in marked)) == (height // 5, height * 9 // 10)
    assert picture.getpixel((width * 3 // 10, height // 2)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat", "the answer names no boxes: 'a cat'"),
        ('[{"bbox_2d": [1', "names no boxes"),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2', "is broken .* was it cut off"),
        ('[{"bbox_2d": [1, 2, 3]}]', "is no box"),
        ('[{"bbox_2d": [500, 0, 100, 10]}]', "is no box"),
        ('[{"bbox_2d": [0, 0, 1200, 10]}]', "is no box"),
        ("[1]", "1 is no box"),
    ],
)
def test_what_is_no_box(text, message):
    with pytest.raises(UserError, match=message):
        draw_boxes.boxes_of(text)


def test_the_program(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.png"):
        Image.new("RGB", (30, 20), "white").save(tmp_path / "in" / name)
    box = '{"bbox_2d": [0, 0, 999, 999], "label": "all"}'
    answers = [{"id": "a.jpg", "text": box}, {"id": "sub/b.png", "text": f"[{box}, {box}]"}, {"id": "c", "error": "no"}]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    arguments = ["--answers", tmp_path / "answers.jsonl", "--images", tmp_path / "in", "--output", tmp_path / "out"]
    result = CliRunner().invoke(draw_boxes.app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stderr) == (1, "c: no\n")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["a.jpg.png", "b.png.png"]
    result = CliRunner().invoke(draw_boxes.app, ["--answers", str(tmp_path / "in/a.jpg"), *map(str, arguments[2:])])
    assert (result.exit_code, "no answers of generate.py" in result.stderr) == (2, True)
