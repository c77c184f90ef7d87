"""A view -> a picture, by Pillow or by OpenCV; the same pixels for the same view and libraries."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import lru_cache
from random import Random

import cv2
import numpy as np
from PIL import Image, ImageDraw

from demo_training.drawing import Mark
from demo_training.glyphs import Glyphs, affine, glyphs_of, stamp
from demo_training.grounds import crop, paint
from demo_training.palette import RGB
from demo_training.views import Line, Thing, View, Writing

_SHIFT = 4  # OpenCV's fixed point: sixteenths of a pixel
cv2.setNumThreads(1)  # there is a process for every core


def render(view: View) -> Image.Image:
    """The picture, RGB, ``view.width`` x ``view.height``."""
    if view.kind == "photograph":
        canvas = crop(Random(view.seed), view.width, view.height, things=True)
    else:
        canvas = paint(view.ground, view.width, view.height)
    pen = _Pillow(canvas) if view.renderer == "pillow" else _OpenCV(canvas, view.renderer == "smooth")
    for line in view.lines:
        pen.line(line)
    for column in view.columns:
        box = ((column.left, column.top), (column.right, column.top))
        pen.polygon(np.array([*box, (column.right, column.base), (column.left, column.base)]), column.rgb)
    for thing in view.shapes:
        _draw_thing(pen, thing)
    canvas = pen.canvas()
    for writing in view.writings:
        stamp(
            canvas, glyphs_of(writing.text, writing.font).mask, _matrix(writing), writing.rgb, view.renderer != "opencv"
        )
    for hand in view.handwriting:
        mask = digits()[0][hand.number]
        matrix = affine(Glyphs(mask, ()), hand.x, hand.y, hand.side, 1.0, 0.0, hand.angle)
        stamp(canvas, mask, matrix, hand.rgb, True)
    return Image.fromarray(_finish(canvas, view))


def _matrix(writing: Writing) -> np.ndarray:
    glyphs = glyphs_of(writing.text, writing.font)
    return affine(glyphs, writing.x, writing.y, writing.height, writing.stretch, writing.slant, writing.angle)


def outline_of(thing: Thing) -> np.ndarray:
    """Its corners, [n, 2], in pixels."""
    points = _unit(thing.kind, thing.arm) * (thing.radius, thing.high)
    if thing.angle:
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        points = points @ np.array([[cos, sin], [-sin, cos]])
    return np.add(points, (thing.x, thing.y))


@lru_cache(maxsize=256)
def _unit(kind: str, arm: float) -> np.ndarray:
    """Corners of a shape in the square from -1 to 1."""
    if kind == "circle":
        turn = np.linspace(0, 2 * np.pi, 49)[:-1]
        return np.column_stack([np.cos(turn), np.sin(turn)])
    if kind == "cross":
        corners = [(-arm, -1), (arm, -1), (arm, -arm)]
        for _ in range(3):
            corners += [(-y, x) for x, y in corners[-3:]]
        return np.array(corners, float)
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    }
    return np.array(corners[kind], float)


def _draw_thing(pen: _Pillow | _OpenCV, thing: Thing) -> None:
    points = outline_of(thing)
    if thing.line:
        pen.line(Line(tuple(map(tuple, [*points, points[0], points[1]])), thing.rgb, thing.line))
        return
    pen.polygon(points, thing.rgb)
    if thing.edge:
        width = max(1.0, min(thing.radius, thing.high) / 12)
        pen.line(Line(tuple(map(tuple, [*points, points[0], points[1]])), thing.edge, width))


class _Pillow:
    """Hard edges."""

    def __init__(self, canvas: np.ndarray):
        self._image = Image.fromarray(canvas)
        self._pen = ImageDraw.Draw(self._image)

    def polygon(self, points: np.ndarray, rgb: RGB) -> None:
        self._pen.polygon([(float(x), float(y)) for x, y in points], fill=rgb)

    def line(self, line: Line) -> None:
        self._pen.line(line.points, fill=line.rgb, width=max(1, round(line.width)), joint="curve")

    def canvas(self) -> np.ndarray:
        return np.array(self._image)


class _OpenCV:
    """Hard or smooth edges."""

    def __init__(self, canvas: np.ndarray, smooth: bool):
        self._canvas, self._type = canvas, cv2.LINE_AA if smooth else cv2.LINE_8

    def polygon(self, points: np.ndarray, rgb: RGB) -> None:
        cv2.fillPoly(self._canvas, [_fixed(points)], rgb, self._type, _SHIFT)

    def line(self, line: Line) -> None:
        width = max(1, round(line.width))
        cv2.polylines(self._canvas, [_fixed(np.array(line.points))], False, line.rgb, width, self._type, _SHIFT)

    def canvas(self) -> np.ndarray:
        return self._canvas


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.round(points * (1 << _SHIFT)).astype(np.int32)


def _finish(canvas: np.ndarray, view: View) -> np.ndarray:
    finish = view.finish
    if finish.blur:
        canvas = cv2.GaussianBlur(canvas, (0, 0), finish.blur)
    if finish.grey:
        canvas = cv2.cvtColor(cv2.cvtColor(canvas, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if finish.noise:
        height, width = canvas.shape[:2]
        grain, start = _grain(), view.seed % 50_000
        noise = grain[start : start + canvas.size].reshape(height, width, 3)
        canvas = np.clip(canvas + (noise * int(finish.noise * 16) >> 9), 0, 255).astype(np.uint8)
    if finish.jpeg:
        file = io.BytesIO()
        Image.fromarray(canvas).save(file, "JPEG", quality=finish.jpeg)
        canvas = np.asarray(Image.open(file))
    return canvas


@lru_cache
def _grain() -> np.ndarray:
    """Gaussian noise of 32 levels, int16: drawn once, since drawing it costs more than the picture."""
    return (np.random.default_rng(0).standard_normal(3_000_000, np.float32) * 32).astype(np.int16)


@lru_cache
def digits() -> tuple[np.ndarray, tuple[str, ...], int]:
    """scikit-learn's handwritten digits (8 x 8, 16 levels): masks [1797, 64, 64] enlarged smoothly, what each is, and
    how many are for training: the rest, by other hands, are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    masks = [cv2.resize(np.pad(i / 16, 1), (64, 64), interpolation=cv2.INTER_CUBIC) for i in data.images]
    grey = (np.clip(np.array(masks), 0, 1) * 255).astype(np.uint8)
    return grey, tuple(str(int(digit)) for digit in data.target), TRAINING_DIGITS


TRAINING_DIGITS = 1300


def view_marks(view: View) -> list[Mark]:
    """Everything in a view, where it is drawn; its colours have no names if the picture is grey."""
    cells = [(r, c) for r, row in enumerate(view.cells) for c in range(len(row))]
    found = [Mark(thing.x, thing.y, thing.kind, thing.colour, thing.size) for thing in view.shapes]
    for column in view.columns:
        found.append(
            Mark((column.left + column.right) / 2, column.top, "bar", column.bar.colour, str(column.bar.value))
        )
    for writing in view.writings:
        glyphs, matrix = glyphs_of(writing.text, writing.font), _matrix(writing)
        middle = glyphs.mask.shape[0] / 2
        for number, (character, at) in enumerate(zip(writing.text, glyphs.centres, strict=True)):
            x, y = matrix @ np.array([at, middle, 1.0])
            found.append(Mark(float(x), float(y), character, writing.colour, "", (0, number) if view.text else None))
    if cells:  # what fills them comes in their order
        found = [replace(mark, cell=cell) for mark, cell in zip(found, cells, strict=True)]
    found += [Mark(hand.x, hand.y, hand.digit, hand.colour, "") for hand in view.handwriting]
    if view.finish.grey:
        found = [replace(mark, colour="") for mark in found]
    return [mark for mark in found if 0 <= mark.x < view.width and 0 <= mark.y < view.height]
