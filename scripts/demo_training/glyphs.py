"""Characters of many fonts as masks: each is drawn once a process and then scaled, slanted and turned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen3vl_moe.errors import OptionError

# Package, folder in it, files. Those of the held-out pictures (heldout_drawing.py) are others.
_SOURCES = (
    ("matplotlib", "mpl-data/fonts/ttf", (
        "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansMono.ttf",
        "DejaVuSansMono-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf",
        "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf",
    )),
    ("font_roboto", "files", (
        "Roboto-Light.ttf", "Roboto-Regular.ttf", "Roboto-Bold.ttf", "Roboto-Black.ttf", "Roboto-Italic.ttf",
    )),
    ("font_source_sans_pro", "files", ("SourceSansPro-Regular.ttf", "SourceSansPro-Bold.ttf", "SourceSansPro-It.ttf")),
    ("font_source_serif_pro", "files", (
        "SourceSerifPro-Regular.ttf", "SourceSerifPro-Bold.ttf", "SourceSerifPro-It.ttf",
    )),
)  # fmt: skip
FONTS = 1 + sum(len(files) for _, _, files in _SOURCES)  # the first is the one that Pillow brings
EM = 72  # pixels of the masks' size


@lru_cache
def _files() -> tuple[Path, ...]:
    found = []
    for package, folder, files in _SOURCES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise OptionError(f"the fonts of {package} are missing; pip install 'qwen3vl-moe[demo]'")
        root = Path(spec.submodule_search_locations[0]) / folder
        found += [root / file for file in files]
    if missing := [path for path in found if not path.is_file()]:
        raise OptionError(f"the font {missing[0]} is missing; pip install 'qwen3vl-moe[demo]'")
    return tuple(found)


@lru_cache(maxsize=512)
def font_of(number: int, size: int) -> ImageFont.FreeTypeFont:
    """Font 0 to FONTS - 1 at ``size`` pixels an em."""
    if number == 0:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font
    return ImageFont.truetype(str(_files()[number - 1]), size)


@dataclass(frozen=True)
class Glyphs:
    """A line of text in one font, EM pixels an em, as a mask without margins.

    Attributes:
        mask: uint8 [height, width].
        centres: of each character, x within the mask.
    """

    mask: np.ndarray
    centres: tuple[float, ...]


@lru_cache(maxsize=4096)
def glyphs_of(text: str, font: int) -> Glyphs:
    face = font_of(font, EM)
    left, top, right, bottom = face.getbbox(text)
    image = Image.new("L", (int(right - left) or 1, int(bottom - top) or 1))
    ImageDraw.Draw(image).text((-left, -top), text, font=face, fill=255)
    edges = [face.getlength(text[:n]) - left for n in range(len(text) + 1)]
    return Glyphs(np.asarray(image), tuple((a + b) / 2 for a, b in pairwise(edges)))


def affine(glyphs: Glyphs, x: float, y: float, height: float, stretch: float, slant: float, angle: float) -> np.ndarray:
    """The map, [2, 3], from the mask's pixels to a picture's: its middle to (x, y), ``height`` pixels high, ``stretch``
    times as wide as the font has it, leaning by ``slant``, turned by ``angle`` in radians."""
    rows, columns = glyphs.mask.shape
    scale = height / rows
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[scale * stretch, -slant * scale], [0.0, scale]])
    middle = np.array([columns / 2, rows / 2])
    return np.column_stack([linear, np.array([x, y]) - linear @ middle])


def extent(text: str, font: int, height: float, stretch: float) -> float:
    """Width in pixels of a text that is ``height`` high."""
    rows, columns = glyphs_of(text, font).mask.shape
    return columns * height / rows * stretch


def stamp(canvas: np.ndarray, mask: np.ndarray, matrix: np.ndarray, rgb: tuple[int, int, int], smooth: bool) -> None:
    """Blend ``rgb`` into the uint8 canvas through the mask, mapped by ``matrix``."""
    rows, columns = mask.shape
    corners = matrix[:, :2] @ np.array([[0, columns, 0, columns], [0, 0, rows, rows]]) + matrix[:, 2:]
    left, top = np.maximum(np.floor(corners.min(1)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(corners.max(1)).astype(int) + 2, (canvas.shape[1], canvas.shape[0]))
    if right <= left or bottom <= top:
        return
    shrink = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    if shrink < 0.6:  # average, since a warp would skip pixels
        factor = max(shrink * 1.25, 2.0 / min(rows, columns))
        small = cv2.resize(mask, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        matrix = matrix @ np.diag([columns / small.shape[1], rows / small.shape[0], 1.0])
        mask = small
    shifted = matrix - np.array([[0, 0, left], [0, 0, top]])
    alpha = cv2.warpAffine(mask, shifted, (int(right - left), int(bottom - top)), flags=cv2.INTER_LINEAR)
    if not smooth:
        alpha = np.where(alpha > 110, 255, 0).astype(np.uint8)
    part = canvas[top:bottom, left:right]
    weight = (alpha >> 1)[:, :, None].astype(np.int16)  # of 127: the product stays within 16 bits
    part += ((np.array(rgb, np.int16) - part) * weight // 127).astype(np.uint8)  # modulo 256: differences wrap back
