"""What stands behind: plain, graded, patterned, textured, and parts of photographs that packages ship."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from random import Random

import cv2
import numpy as np
from PIL import Image

from demo_training.palette import RGB, dark, distance, light, shade
from demo_training.scenes import COLOURS
from demo_training.views import Ground
from qwen3vl_moe.errors import OptionError

# Photographs, CC BY 2.0 (scikit-learn's), CC0 or public domain; those of the held-out pictures are others.
_PHOTOGRAPHS = (
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("skimage", "data", ("astronaut.png", "coffee.png", "rocket.jpg", "retina.jpg")),
    ("skimage", "data", ("brick.png", "grass.png", "gravel.png")),
)
OF_THINGS = 6  # the first so many; the others show surfaces
KINDS = ("plain",) * 9 + ("gradient",) * 3 + ("pattern",) * 3 + ("texture",) * 3 + ("photograph",) * 2
CALM = 14  # levels that patterns and textures differ by at most from the ground's colour
TILE, TILES = 320, 12


def choose_ground(rng: Random, kinds: tuple[str, ...] = KINDS) -> Ground:
    """White is the commonest, as on paper; then light, dark and coloured ones."""
    chance = rng.random()
    if chance < 0.25:
        rgb = (255, 255, 255)
    elif chance < 0.6:
        rgb = light(rng)
    elif chance < 0.8:
        rgb = dark(rng)
    else:
        rgb = shade(rng, rng.choice(tuple(COLOURS)))
    return Ground(rng.choice(kinds), rgb, rng.getrandbits(32))


def clear_of(ground: Ground, rgb: RGB, least: float) -> bool:
    """Whether a thing of this colour shows on the ground."""
    return distance(ground.rgb, rgb) >= least * (1.0 if ground.kind == "plain" else 1.15)


def paint(ground: Ground, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3], of its own memory."""
    base = np.array(ground.rgb, np.int16)
    if ground.kind == "plain":
        return np.full((height, width, 3), ground.rgb, np.uint8)
    rng = Random(ground.seed)
    if ground.kind == "photograph":
        part = crop(rng, width, height).astype(np.int16)
        share = rng.choice((64, 96, 127))  # of 256: the rest is the ground's colour, so that things show
        return _within(base + ((part - int(part.mean())) * share >> 8))
    if ground.kind == "texture":
        shift = _tile(rng.randrange(TILES), rng.randrange(1 << 16), width, height)[:, :, None] // (128 // CALM)
        if rng.random() < 0.4:  # colours vary too
            shift = shift * np.array([rng.choice((-1, 0, 1)) for _ in range(3)], np.int16)
    elif ground.kind == "gradient":
        reach, turn = rng.uniform(8, 40), rng.uniform(0, 2 * np.pi)
        x = np.linspace(-1, 1, width, dtype=np.float32) * np.cos(turn)
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.sin(turn)
        to = [reach * rng.uniform(0.6, 1) * (1 if sum(ground.rgb) < 380 else -1) for _ in range(3)]
        shift = ((x + y)[:, :, None] * 0.5 * np.array(to, np.float32)).astype(np.int16)
    else:
        pitch, amount = rng.randint(5, 24), rng.choice((-CALM, CALM))
        rows, columns = np.arange(height)[:, None] // pitch % 2, np.arange(width)[None, :] // pitch % 2
        form = rng.randrange(5)
        if form == 4:
            diagonal = (np.arange(height)[:, None] + np.arange(width)) // pitch
            on = diagonal % 2
        else:
            on = (rows ^ columns, rows & columns, rows | np.zeros_like(columns), columns | np.zeros_like(rows))[form]
        shift = (on * amount).astype(np.int16)[:, :, None]
    return _within(base + shift)


def _within(levels: np.ndarray) -> np.ndarray:
    """int16, which is overwritten, as uint8."""
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


@lru_cache(TILES)
def _texture(number: int) -> np.ndarray:
    """Clouds, grain and brushed streaks, int16 within 128 levels of zero, [TILE, TILE]."""
    rng = np.random.default_rng(number)
    total = np.zeros((TILE, TILE), np.float32)
    cells = (2, 4, 8, 16, 32, 80, 160, 320)[number % 4 :: 1 + number % 3]
    for octave, count in enumerate(cells):
        wide = count if number % 2 else max(2, count // 4)
        grain = rng.standard_normal((count, wide), dtype=np.float32)
        total += cv2.resize(grain, (TILE, TILE), interpolation=cv2.INTER_CUBIC) * 0.75**octave
    return np.clip(total / (np.abs(total).max() + 1e-6) * 128, -128, 128).astype(np.int16)


def _tile(number: int, where: int, width: int, height: int) -> np.ndarray:
    texture = _texture(number)
    if width > TILE or height > TILE:
        texture = np.tile(texture, (-(-height // TILE), -(-width // TILE)))
    y, x = where % (texture.shape[0] - height + 1), where // 7 % (texture.shape[1] - width + 1)
    return texture[y : y + height, x : x + width]


@lru_cache
def _photographs() -> tuple[np.ndarray, ...]:
    found = []
    for package, folder, files in _PHOTOGRAPHS:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise OptionError(f"the photographs of {package} are missing; pip install 'qwen3vl-moe[demo]'")
        for file in files:
            path = Path(spec.submodule_search_locations[0]) / folder / file
            if not path.is_file():
                raise OptionError(f"the photograph {path} is missing; pip install 'qwen3vl-moe[demo]'")
            found.append(np.asarray(Image.open(path).convert("RGB")))
    return tuple(found)


def crop(rng: Random, width: int, height: int, things: bool = False) -> np.ndarray:
    """Some part of some photograph, mirrored or not, at some scale, uint8 [height, width, 3]. ``things``: mostly of
    those that show things, some in other colours."""
    pictures = _photographs()
    picture = pictures[rng.randrange(OF_THINGS if things and rng.random() < 0.85 else len(pictures))]
    most = min(picture.shape[1] / width, picture.shape[0] / height)
    scale = most * rng.uniform(0.45, 1.0) if things else rng.uniform(min(0.5, most), min(most, 2.5))
    w, h = min(int(width * scale), picture.shape[1]), min(int(height * scale), picture.shape[0])
    x, y = rng.randrange(picture.shape[1] - w + 1), rng.randrange(picture.shape[0] - h + 1)
    part = cv2.resize(
        picture[y : y + h, x : x + w],
        (width, height),
        interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR,
    )
    if rng.random() < 0.5:
        part = part[:, ::-1]
    if things and rng.random() < 0.5:  # there are few: other colours, and darker or brighter
        part = part[:, :, rng.sample(range(3), 3)]
        part = cv2.convertScaleAbs(np.ascontiguousarray(part), alpha=rng.uniform(0.5, 1.3), beta=rng.uniform(0, 30))
    return np.ascontiguousarray(part)
