"""RGB pictures -> what the vision tower takes: resized to whole image tokens, normalised, and cut into patches.

The rules are those of transformers 5.17's ``Qwen2VLImageProcessorPil`` (bicubic resize by Pillow, values scaled by
1/255, then ``(x - mean) / std`` in fp32). The patches are equal bit for bit. There is one resize: by Pillow on the host
or, for a GPU, by kernels that give the same pixels (:mod:`qwen3vl_moe.ops.resize`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen3vl_moe import ops
from qwen3vl_moe.errors import ConfigError, OptionError, PromptError
from qwen3vl_moe.inputs.workers import side_by_side
from qwen3vl_moe.json_files import read_json_object
from qwen3vl_moe.ops.transfer import all_to_device

MAX_ASPECT_RATIO = 200
MAX_PIXELS_BOUND = 2**40  # of anything that counts pixels: far above every memory, and safe to calculate with

SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_LEAST_TOKENS, _MOST_TOKENS = 4, 16384  # the bounds of qwen-vl-utils, where an image gives a size but not these

_PARALLEL_PIXELS = 2**17  # about 2 ms of work; below that, handing it over costs more than it saves
_LARGE_PIXELS = 2**25  # as many bytes a channel
_BAND_ROWS = 128  # of a picture, which are read out at a time: Pillow makes two copies of what it gives
# A picture that waits for a GPU to resize it may take so many times the memory that it takes when resized.
_MOST_DECODED = 4

_PROCESSOR_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
# Settings that would change the pixels, with the only value that is implemented.
_FIXED_SETTINGS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": int(Image.Resampling.BICUBIC),
    "rescale_factor": 1 / 255,
}

_PER_CHANNEL_RANGE = {"image_mean": (-10.0, 10.0), "image_std": (1e-3, 100.0)}


@dataclass(frozen=True)
class ImageSize:
    """The size that one image asks for, in pixels, in the keys and by the rules of qwen-vl-utils' ``fetch_image``.

    Attributes:
        min_pixels, max_pixels: bounds of its area after the resize. Where one is not given, the least is that of 4
            image tokens and the most the processor's.
        resized_height, resized_width: both or neither: its sides, which are then rounded to whole image tokens (at
            least 4, at most 16384 of them). They win over the bounds.

    This is the final size. Qwen's README for qwen-vl-utils tells the image processor not to resize again
    (``do_resize=False``); the checkpoint's own bounds, under which a small picture would grow again, do not apply.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> ImageSize | None:
        """From some of ``SIZE_KEYS``; None where none has a value.

        Raises:
            PromptError: a value is no positive integer, or one of the sides is missing.
        """
        given = {key: value for key, value in given.items() if value is not None}
        for key, value in given.items():
            if not is_count(value):
                raise PromptError(f"{where} has {key} {value!r}; a positive whole number of pixels is needed")
        sides = [key for key in ("resized_height", "resized_width") if key in given]
        if len(sides) == 1:
            raise PromptError(f"{where} gives {sides[0]} alone; resized_height and resized_width go together")
        return cls(**given) if given else None


@dataclass(frozen=True)
class ImageSettings:
    """How images become patches. ``min_pixels`` and ``max_pixels`` bound the area of the resized image, in pixels.

    One image token covers ``factor * factor`` pixels, so an image takes between about ``min_pixels / factor**2`` and
    ``max_pixels / factor**2`` tokens (32 x 32 pixels a token in the published checkpoint).
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one image token."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImageSettings:
        """Read a checkpoint's settings: ``image_processor`` in processor_config.json (as transformers 5 saves them) or,
        where that is not there, preprocessor_config.json (as published); the same precedence as in transformers.

        Args:
            directory: the checkpoint.
            min_pixels, max_pixels: override the checkpoint's bounds of the resized area.

        Raises:
            ConfigError: no settings, or a value that is not supported.
            OptionError: the bounds leave no room.
        """
        raw, source = _read_settings(Path(directory))
        if raw.get("image_processor_type") not in _PROCESSOR_TYPES:
            raise ConfigError(
                f"{source}: image_processor_type {raw.get('image_processor_type')!r} is not supported; "
                f"known are {', '.join(_PROCESSOR_TYPES)}"
            )
        check_fixed_settings(raw, source)
        size = raw.get("size") or {}
        if not isinstance(size, dict) or not set(size) <= {"shortest_edge", "longest_edge"}:
            raise ConfigError(
                f"{source}: size is {size!r}; it may hold shortest_edge and longest_edge, areas in pixels"
            )
        # Checkpoints of the Qwen2-VL age spell the bounds min_pixels and max_pixels; transformers lets these win.
        bounds = {**size, **{key: raw[key] for key in ("min_pixels", "max_pixels") if raw.get(key) is not None}}
        settings = cls(
            patch_size=_integer(raw, source, "patch_size"),
            temporal_patch_size=_integer(raw, source, "temporal_patch_size"),
            merge_size=_integer(raw, source, "merge_size"),
            min_pixels=_integer(bounds, source, "min_pixels", "shortest_edge"),
            max_pixels=_integer(bounds, source, "max_pixels", "longest_edge"),
            mean=_per_channel(raw, source, "image_mean"),
            std=_per_channel(raw, source, "image_std"),
        )
        return settings.with_bounds(min_pixels, max_pixels)

    def with_bounds(self, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
        """The same settings with other bounds of the resized area; None keeps a bound.

        Raises:
            OptionError: a bound is no positive integer, or they leave no room for one image token.
        """
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None and not is_count(value):
                raise OptionError(f"{name} is {value!r}; a positive number of pixels (width x height) is needed")
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if high < self.factor**2:
            raise OptionError(
                f"max_pixels={high} is less than the {self.factor**2} pixels of one image token "
                f"({self.factor} x {self.factor})"
            )
        if low > high:
            raise OptionError(
                f"min_pixels={low} is more than max_pixels={high}; pass both to override the checkpoint's"
            )
        return replace(self, min_pixels=low, max_pixels=high)

    def grid(
        self, height: int, width: int, where: str = "the image", size: ImageSize | None = None
    ) -> tuple[int, int, int]:
        """Grid (frames, rows, columns), in patches, of an image of ``height`` x ``width`` pixels.

        Args:
            where: what messages call the image.
            size: that it asks for; None: the settings' bounds.

        Raises:
            PromptError: the sides differ by a factor above 200, or the size leaves no room.
        """
        low, high, least_side = self.min_pixels, self.max_pixels, 0
        if size is not None:
            bounds = self._bounds_for(size, where)
            low, high, least_side = bounds.min_pixels, bounds.max_pixels, 1
            height, width = size.resized_height or height, size.resized_width or width
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise PromptError(
                f"{where} is {width}x{height} pixels: its sides differ by a factor of "
                f"{max(height, width) / min(height, width):.0f}, above the limit of {MAX_ASPECT_RATIO}; crop it"
            )
        height, width = smart_resize(height, width, self.factor, low, high, least_side)
        return 1, height // self.patch_size, width // self.patch_size

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Image tokens of a grid: merge_size x merge_size patches become one."""
        return math.prod(grid) // self.merge_size**2

    def least_tokens(self, size: ImageSize | None = None, where: str = "the image") -> int:
        """Image tokens that no image falls below, whatever its shape; for the arguments see :meth:`grid`."""
        if size is not None and size.resized_height is not None:
            return self.num_tokens(self.grid(1, 1, where, size))
        bounds = self if size is None else self._bounds_for(size, where)
        # Rounding the two sides down, where an image is shrunk, may cost three quarters of its area.
        return max(1, min(-(-bounds.min_pixels // self.factor**2), bounds.max_pixels // self.factor**2 // 4))

    def _bounds_for(self, size: ImageSize, where: str) -> ImageSettings:
        unit = self.factor**2
        if size.resized_height is not None:
            return replace(self, min_pixels=_LEAST_TOKENS * unit, max_pixels=_MOST_TOKENS * unit)
        try:
            return self.with_bounds(size.min_pixels or _LEAST_TOKENS * unit, size.max_pixels)
        except OptionError as error:
            raise PromptError(f"{where}: {error}") from None

    def resize(
        self, image: Image.Image, size: ImageSize | None = None, source: bytes | None = None, on_device: bool = False
    ) -> Picture:
        """An RGB image for the model, at the size that it asks for or within the settings' bounds.

        Args:
            source: a digest of what the image was decoded from, and how; None: its pixels tell which it is.
            on_device: leave the resize to the device, unless the decoded pixels would take too much memory until then.
        """
        grid = _, rows, columns = self.grid(image.height, image.width, size=size)
        width, height = columns * self.patch_size, rows * self.patch_size
        resized = not on_device or image.width * image.height > _MOST_DECODED * width * height
        pixels = _resize(image, height, width) if resized else _read_out(image)
        if source is None:
            source = hashlib.sha256(pixels.data).digest() + repr(pixels.shape).encode()
        settings = self.patch_size, self.temporal_patch_size, self.merge_size, self.mean, self.std
        digest = hashlib.sha256(repr((source, grid, settings)).encode()).digest()
        return Picture(pixels, grid, digest, self, resized)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image on the host, as it is copied to the device.

    Attributes:
        pixels: uint8, contiguous: planes [3, H, W] of the size that the grid says, [frames, 3, H, W] of a group of a
            video's; or, where they are not ``resized`` yet, [H, W, 3] as decoded.
        grid: frames, rows, columns, counted in patches.
        digest: SHA-256 of what the pixels come from and what becomes of them: equal digests mean equal patches.
        settings: how it becomes patches.
    """

    pixels: np.ndarray
    grid: tuple[int, int, int]
    digest: bytes
    settings: ImageSettings
    resized: bool = True


def copy_pixels(pictures: Sequence[Picture], device: torch.device | str) -> list[Tensor]:
    """The pixels of every picture on a device, uint8: in one copy, which the host only starts."""
    return all_to_device([torch.from_numpy(picture.pixels) for picture in pictures], device)


def cut_patches(pixels: Sequence[Tensor], pictures: Sequence[Picture], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised patches [P, patch_dim] of all pictures, resized where they are not yet.

    Args:
        pixels: of :func:`copy_pixels`.
        pictures: at least one; their settings differ at most in the bounds of the size.
        dtype: of the result; the arithmetic is fp32.
    """
    settings = pictures[0].settings
    sides = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    planes = [
        here if picture.resized else ops.resize_picture(here, *(n * settings.patch_size for n in picture.grid[1:]))
        for here, picture in zip(pixels, pictures, strict=True)
    ]
    return ops.cut_patches(planes, sides, settings.mean, settings.std, dtype)


def _read_out(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image, uint8 [H, W, 3]."""
    pixels_HW3 = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, image.height)
        pixels_HW3[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels_HW3


def _resize(image: Image.Image, height: int, width: int) -> np.ndarray:
    """By Pillow, uint8 [3, height, width]."""
    pixels_3HW = np.empty((3, height, width), np.uint8)

    def fill(channel: int) -> None:
        plane = image.getchannel(channel)
        pixels_3HW[channel] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))

    # Pillow resizes the channels of an image independently, so each can have a core of its own. Of a very large one
    # there is a single copy of a channel at a time.
    if width * height >= _PARALLEL_PIXELS and image.width * image.height <= _LARGE_PIXELS:
        side_by_side(fill, range(3))
    else:
        for channel in range(3):
            fill(channel)
    return pixels_3HW


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, least_side: int = 0
) -> tuple[int, int]:
    """Size that an image is resized to: both sides multiples of ``factor``, area within the bounds, shape about kept.

    The rule of Qwen2-VL, as transformers 5.17 has it; in qwen-vl-utils a side counts as ``least_side`` = 1 unit before
    the area is looked at, so that a very thin image does not grow. A side never falls below ``factor``, so a very long
    image may stay above ``max_pixels``; rounding up may carry a very small one past it.
    """
    rows, columns = max(least_side, round(height / factor)), max(least_side, round(width / factor))
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def check_fixed_settings(raw: Mapping[str, Any], source: str) -> None:
    """Refuse settings of a processor that would change the pixels in a way that is not implemented.

    Raises:
        ConfigError: as said.
    """
    for name, supported in _FIXED_SETTINGS.items():
        if raw.get(name) is not None and raw[name] != supported:
            raise ConfigError(f"{source}: {name} is {raw[name]!r}; only {supported!r} is supported")


def is_count(value: Any) -> bool:
    """Whether this is a positive whole number that one may calculate with."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_PIXELS_BOUND


def _read_settings(directory: Path) -> tuple[dict[str, Any], str]:
    nested, plain = directory / "processor_config.json", directory / "preprocessor_config.json"
    if nested.exists():
        settings = read_json_object(nested, ConfigError).get("image_processor")
        if isinstance(settings, dict):
            return settings, f"{nested}: image_processor"
    if plain.exists():
        return read_json_object(plain, ConfigError), str(plain)
    raise ConfigError(
        f"{directory} has no image settings: preprocessor_config.json, or image_processor in processor_config.json"
    )


def _integer(raw: dict[str, Any], source: str, *names: str) -> int:
    """The first of ``names`` that is present: one value, several spellings."""
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        if not is_count(value):
            raise ConfigError(f"{source}: {name} is {value!r}; a positive integer is needed")
        return value
    raise ConfigError(f"{source}: {' or '.join(names)} is missing")


def _per_channel(raw: dict[str, Any], source: str, name: str) -> tuple[float, float, float]:
    value = raw.get(name)
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        raise ConfigError(f"{source}: {name} is {value!r}; a list of three numbers is needed")
    # Pixels lie between 0 and 1. NaN is neither below nor above anything, so this is asked the positive way.
    low, high = _PER_CHANNEL_RANGE[name]
    if not all(low <= v <= high for v in numbers):
        raise ConfigError(f"{source}: {name} is {value!r}; its numbers must lie between {low:g} and {high:g}")
    red, green, blue = (float(v) for v in numbers)
    return red, green, blue
