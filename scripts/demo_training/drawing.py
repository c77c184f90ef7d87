"""A scene -> a picture (Pillow), the same pixels for the same scene."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo_training.scenes import CHART_TOP, COLOURS, Scene, Shape


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB, ``scene.width`` x ``scene.height``."""
    picture = _ground(scene)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        _draw_shape(pen, shape)
    if scene.bars:
        _draw_chart(pen, scene)
    if scene.text:
        x, y, font = _text_place(scene)
        pen.text((x, y), scene.text, font=font, fill=COLOURS[scene.ink])
    return picture


def _ground(scene: Scene) -> Image.Image:
    """Ornaments stay within 10 levels of the ground: far from every colour of the palette."""
    rng = np.random.default_rng(scene.seed)
    width, height = scene.width, scene.height
    if scene.ornament == "plain":
        return Image.new("RGB", (width, height), scene.ground)
    if scene.ornament == "noise":
        shift = rng.integers(-8, 9, (height, width), dtype=np.int16)
    elif scene.ornament == "gradient":
        axis = np.linspace(-10, 10, width) if rng.random() < 0.5 else np.linspace(-10, 10, height)[:, None]
        shift = np.broadcast_to(axis, (height, width)).astype(np.int16)
    else:
        pitch = int(rng.integers(6, 14))
        rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
        lines = (rows // pitch % 2) if scene.ornament == "stripes" else (rows % pitch < 2) & (columns % pitch < 2)
        shift = np.broadcast_to(np.where(lines, -9, 4), (height, width)).astype(np.int16)
    pixels = np.clip(np.array(scene.ground, dtype=np.int16) + shift[:, :, None], 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    x, y, r, fill = shape.x, shape.y, shape.radius, COLOURS[shape.colour]
    if shape.kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "triangle":
        pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=fill)
    elif shape.kind == "diamond":
        pen.polygon(((x, y - r), (x + r, y), (x, y + r), (x - r, y)), fill=fill)
    else:
        arm = r // 3
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def chart_frame(scene: Scene) -> tuple[int, int, int, float]:
    """Of a bar chart: left edge, base line and slot width of the bars, and the height of one unit, in pixels."""
    left, base = 14, scene.height - 12
    return left, base, (scene.width - left - 8) // len(scene.bars), (base - 10) / CHART_TOP


def _draw_chart(pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    left, base, slot, unit = chart_frame(scene)
    rule = tuple(level + 60 if sum(scene.ground) < 300 else level - 60 for level in scene.ground)
    for value in range(CHART_TOP + 1):
        y = round(base - value * unit)
        pen.line((left - 4, y, scene.width - 6, y), fill=rule, width=2 if value == 0 else 1)
    for number, bar in enumerate(scene.bars):
        x = left + number * slot + slot // 6
        pen.rectangle((x, round(base - bar.value * unit), x + slot * 2 // 3, base), fill=COLOURS[bar.colour])


@lru_cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(height)


def _text_place(scene: Scene) -> tuple[int, int, ImageFont.FreeTypeFont]:
    """Where the text begins, and its font: as large as drawn, or as fits."""
    rng = np.random.default_rng(scene.seed)
    size = int(rng.integers(26, 41))
    while True:
        left, top, right, bottom = _font(size).getbbox(scene.text)
        if right - left <= scene.width - 8:
            break
        size -= 2
    x = int(rng.integers(4, scene.width - (right - left) - 3)) - left
    y = int(rng.integers(4, scene.height - (bottom - top) - 3)) - top
    return x, y, _font(size)


@dataclass(frozen=True)
class Mark:
    """A thing in a picture: its centre in pixels (of a bar, that of its top), what it is (a shape, ``bar`` or a
    character), its colour, and its size (of a bar, its value; of a character, nothing); its row and column in a grid,
    from 0 on, if it is part of one. A text and a path are a grid of one row."""

    x: float
    y: float
    what: str
    colour: str
    size: str
    cell: tuple[int, int] | None = None


def marks(scene: Scene) -> list[Mark]:
    """Everything in a scene, where it is drawn."""
    found = [Mark(shape.x, shape.y, shape.kind, shape.colour, shape.size) for shape in scene.shapes]
    if scene.bars:
        left, base, slot, unit = chart_frame(scene)
        for number, bar in enumerate(scene.bars):
            x = left + number * slot + slot // 6 + slot // 3
            found.append(Mark(x, base - bar.value * unit, "bar", bar.colour, str(bar.value)))
    if scene.text:
        x, y, font = _text_place(scene)
        _, top, _, bottom = font.getbbox(scene.text)
        for number, character in enumerate(scene.text):
            middle = (font.getlength(scene.text[:number]) + font.getlength(scene.text[: number + 1])) / 2
            found.append(Mark(x + middle, y + (top + bottom) / 2, character, scene.ink, "", (0, number)))
    return found
