"""Drawing of the new held-out pictures, by matplotlib: no code, font or photograph of the training's.

Everything is in pixels of the picture, y downwards.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_moe.errors import OptionError

# Of each name, as CSS and matplotlib call their colours.
PAINTS = {
    "red": ("red", "firebrick", "crimson", "tab:red"),
    "orange": ("darkorange", "orange", "tab:orange"),
    "yellow": ("yellow", "gold"),
    "green": ("green", "forestgreen", "limegreen", "tab:green"),
    "blue": ("blue", "royalblue", "dodgerblue", "mediumblue"),
    "purple": ("purple", "darkviolet", "rebeccapurple", "tab:purple"),
    "black": ("black", "#101010"),
}
PAPERS = ("white", "white", "white", "whitesmoke", "lavender", "azure", "mistyrose", "honeydew", "gainsboro")
FORMS = ("circle", "square", "triangle", "cross", "diamond")
FACES = (
    ("matplotlib", "mpl-data/fonts/ttf/STIXGeneral.ttf"),
    ("matplotlib", "mpl-data/fonts/ttf/STIXGeneralBol.ttf"),
    ("font_caladea", "files/Caladea-Regular.ttf"),
    ("font_caladea", "files/Caladea-Bold.ttf"),
    ("font_manrope", "files/Manrope-Regular.ttf"),
    ("font_manrope", "files/Manrope-Bold.ttf"),
)
PHOTOGRAPHS = (("skimage", "data/chelsea.png"), ("skimage", "data/camera.png"))  # CC0, by their photographers
FIRST_HAND = 1300  # handwritten digits from this one on are held out


def file_of(package: str, path: str) -> Path:
    """A file that an installed package brings."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise OptionError(f"the held-out pictures need {package}; pip install 'qwen3vl-moe[demo]'")
    found = Path(spec.submodule_search_locations[0]) / path
    if not found.is_file():
        raise OptionError(f"the held-out pictures need {found}, which is missing; pip install 'qwen3vl-moe[demo]'")
    return found


class Board:
    """A sheet of paper to draw on, ``width`` x ``height`` pixels."""

    def __init__(self, width: int, height: int, paper: str):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self._figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=paper)
        self._canvas = FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(height, 0)

    def picture(self) -> Image.Image:
        self._canvas.draw()
        return Image.fromarray(np.asarray(self._canvas.buffer_rgba())[:, :, :3].copy())

    def form(self, form: str, x: float, y: float, half: float, paint: str, border: bool = False) -> None:
        """A shape of FORMS, ``2 * half`` wide and high, with a dark border or none."""
        from matplotlib import patches

        style: dict[str, Any] = {"facecolor": paint, "edgecolor": "black" if border else "none", "linewidth": 1.2}
        if form == "circle":
            self._axes.add_patch(patches.Circle((x, y), half, **style))
        elif form == "square":
            self._axes.add_patch(patches.Rectangle((x - half, y - half), 2 * half, 2 * half, **style))
        else:
            arm = 0.36 * half
            corners = {
                "triangle": [(0, -half), (half, half), (-half, half)],
                "diamond": [(0, -half), (half, 0), (0, half), (-half, 0)],
                "cross": [
                    *((-arm, -half), (arm, -half), (arm, -arm), (half, -arm), (half, arm), (arm, arm)),
                    *((arm, half), (-arm, half), (-arm, arm), (-half, arm), (-half, -arm), (-arm, -arm)),
                ],
            }[form]
            self._axes.add_patch(patches.Polygon([(x + a, y + b) for a, b in corners], **style))

    def line(self, points: list[tuple[float, float]], paint: str, width: float) -> None:
        from matplotlib.lines import Line2D

        self._axes.add_line(Line2D([x for x, _ in points], [y for _, y in points], color=paint, linewidth=width))

    def ring(self, x: float, y: float, radius: float, paint: str) -> None:
        from matplotlib import patches

        self._axes.add_patch(patches.Circle((x, y), radius, fill=False, edgecolor=paint, linewidth=1.8))

    def bar(self, left: float, right: float, top: float, base: float, paint: str) -> None:
        from matplotlib import patches

        self._axes.add_patch(patches.Rectangle((left, top), right - left, base - top, facecolor=paint))

    def text(self, text: str, x: float, y: float, wide: float, high: float, face: int, paint: str) -> None:
        """Around (x, y), as large as fits into ``wide`` x ``high``."""
        from matplotlib.patches import PathPatch
        from matplotlib.transforms import Affine2D

        outline = _outline(text, face)
        box = outline.get_extents()
        scale = min(wide / box.width, high / box.height)
        place = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2).scale(scale, -scale)
        self._axes.add_patch(PathPatch(place.translate(x, y).transform_path(outline), facecolor=paint, linewidth=0))

    def shaded(self, tops: tuple[float, float], tint: str) -> None:
        """The paper, tinted from one share at the top to another at the bottom."""
        from matplotlib.colors import to_rgb

        share = np.linspace(*tops, 64)[:, None, None]
        colours = (1 - share) * np.array(to_rgb(self._figure.get_facecolor())) + share * np.array(to_rgb(tint))
        self._axes.imshow(colours, extent=(0, self.width, self.height, 0), aspect="auto", interpolation="bilinear")
        self._axes.set_xlim(0, self.width)
        self._axes.set_ylim(self.height, 0)

    def grey(self, levels: np.ndarray, x: float, y: float, side: float, dark: bool) -> None:
        """A square of grey levels, 0 to 1, enlarged smoothly."""
        extent = (x - side / 2, x + side / 2, y + side / 2, y - side / 2)
        colours = "gray" if dark else "gray_r"
        self._axes.imshow(levels, colours, extent=extent, vmin=0, vmax=1, aspect="auto", interpolation="bicubic")
        self._axes.set_xlim(0, self.width)
        self._axes.set_ylim(self.height, 0)


@lru_cache(maxsize=1024)
def _outline(text: str, face: int) -> Any:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=100, prop=FontProperties(fname=str(file_of(*FACES[face]))))


@lru_cache
def hands() -> tuple[np.ndarray, list[int]]:
    """The held-out ones of scikit-learn's handwritten digits: [n, 10, 10] levels of 0 to 1, and what
    each is."""
    file_of("sklearn", "datasets/data/digits.csv.gz")
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = np.pad(data.images[FIRST_HAND:] / 16, ((0, 0), (1, 1), (1, 1)))
    return levels, [int(digit) for digit in data.target[FIRST_HAND:]]


@lru_cache
def photograph(number: int) -> Image.Image:
    return Image.open(file_of(*PHOTOGRAPHS[number])).convert("RGB")
