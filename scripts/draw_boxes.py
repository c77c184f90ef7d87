"""Draw the boxes that answers name onto their pictures.

    python scripts/draw_boxes.py --answers boxes.jsonl --images pictures --output drawn

An answer is what generate.py wrote for a folder of images: its id is the picture's path from there, and its text holds
boxes as the model gives them, [{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, ...], with whatever text around. The
coordinates count thousandths of the picture's width and height, from its upper left corner, whatever its shape and
however it was resized. A box that cannot be drawn is told of, and the exit status is 1.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console

from program import any_text
from qwen3vl_moe.errors import UserError, one_line
from qwen3vl_moe.json_files import parse_json

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")
_LIST = re.compile(r"[\[{].*[\]}]", re.S)  # the outermost brackets

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    answers: Annotated[Path, typer.Option(help="Answers of generate.py to a folder of images, in JSON lines.")],
    images: Annotated[Path, typer.Option(help="That folder.")],
    output: Annotated[Path, typer.Option(help="A folder for the pictures with their boxes, as PNG.")],
) -> None:
    """Draw the boxes that answers name onto their pictures."""
    failed = 0
    try:
        for line in answers.read_text(encoding="utf-8").splitlines():
            record = parse_json(line)
            name = str(record["id"])
            try:
                if "error" in record:
                    raise UserError(record["error"])
                found = boxes_of(record["text"])
                target = (output / name).with_name(f"{Path(name).name}.png")
                target.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(images / name) as picture:
                    drawn(picture, found).save(target)
                print(f"{target}: {len(found)} boxes")
            except (UserError, OSError) as error:
                failed += 1
                stderr.print(f"{one_line(name)}: {error}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no answers of generate.py ({error})"
        stderr.print(f"error: {answers}: {reason}")
        raise typer.Exit(2) from None
    raise typer.Exit(1 if failed else 0)


def boxes_of(text: str) -> list[tuple[list[float], str]]:
    """The boxes in an answer: four coordinates of 0 to 1000 each, and a label.

    Raises:
        UserError: there is no JSON in it, or something else than boxes.
    """
    found = _LIST.search(text)
    try:
        value: Any = json.loads(found[0]) if found else None
    except ValueError as error:
        raise UserError(f"the answer's JSON is broken ({error}): was it cut off? --max-tokens allows more") from None
    if value is None:
        raise UserError(f"the answer names no boxes: {one_line(text[:60])!r}")
    boxes = []
    for each in value if isinstance(value, list) else [value]:
        box = each.get("bbox_2d") if isinstance(each, dict) else None
        numbers = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
        if not numbers or not (0 <= box[0] <= box[2] <= 1000 and 0 <= box[1] <= box[3] <= 1000):
            raise UserError(f"{one_line(json.dumps(each))[:100]} is no box: [x1, y1, x2, y2] of 0 to 1000 is needed")
        boxes.append((box, str(each.get("label", ""))))
    return boxes


def drawn(picture: Image.Image, boxes: list[tuple[list[float], str]]) -> Image.Image:
    """A copy of a picture, upright as the model saw it, with boxes on it."""
    copy = ImageOps.exif_transpose(picture).convert("RGB")
    pen, (width, height) = ImageDraw.Draw(copy), copy.size
    thick = max(2, max(copy.size) // 300)
    for number, (box, label) in enumerate(boxes):
        x1, y1, x2, y2 = (round(at * side / 1000) for at, side in zip(box, (width, height) * 2, strict=True))
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=thick)
        pen.text((x1 + thick + 1, y1 + thick + 1), label, fill=colour, font_size=max(12, height // 30))
    return copy


if __name__ == "__main__":
    any_text()
    sys.exit(app())
