"""RGB pictures -> what the vision tower takes: resized to whole image tokens on the host, then normalised and cut into
patches on the model's device.

The rules are those of transformers 5.17's ``Qwen2VLImageProcessorPil`` (bicubic resize by Pillow, values scaled by
1/255, then ``(x - mean) / std`` in fp32). The patches are equal bit for bit. There is one resize: nowhere else in the
package is an image scaled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen3vl_moe.errors import ConfigError, OptionError, PromptError

MAX_ASPECT_RATIO = 200

# Pillow and numpy release the interpreter lock where they work. These threads run single channels of an image, which
# wait for nothing, so any number of callers may share them; they start when first needed.
_WORKERS = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="resize")
_PARALLEL_PIXELS = 2**17  # about 2 ms of work; below that, handing it over costs more than it saves
# Fewer are copied faster than torch wakes its threads, for which a busy host takes milliseconds.
_SERIAL_BYTES = 4 << 20

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
        for name, supported in _FIXED_SETTINGS.items():
            if raw.get(name) is not None and raw[name] != supported:
                raise ConfigError(f"{source}: {name} is {raw[name]!r}; only {supported!r} is supported")
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
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
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

    def grid(self, height: int, width: int, where: str = "the image") -> tuple[int, int, int]:
        """Grid (frames, rows, columns), in patches, of an image of ``height`` x ``width`` pixels.

        Raises:
            PromptError: the sides differ by a factor above 200.
        """
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise PromptError(
                f"{where} is {width}x{height} pixels: its sides differ by a factor of "
                f"{max(height, width) / min(height, width):.0f}, above the limit of {MAX_ASPECT_RATIO}; crop it"
            )
        height, width = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return 1, height // self.patch_size, width // self.patch_size

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Image tokens of a grid: merge_size x merge_size patches become one."""
        return math.prod(grid) // self.merge_size**2

    def resize(self, image: Image.Image) -> Picture:
        """An RGB image at the size that the model sees."""
        grid = _, rows, columns = self.grid(image.height, image.width)
        width, height = columns * self.patch_size, rows * self.patch_size
        pixels_3HW = np.empty((3, height, width), np.uint8)

        def fill(channel: int, plane: Image.Image) -> bytes:
            pixels_3HW[channel] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
            return hashlib.sha256(pixels_3HW[channel].reshape(-1)).digest()

        # Pillow resizes the channels of an image independently, so each can have a core of its own.
        parallel = width * height >= _PARALLEL_PIXELS
        planes = b"".join((_WORKERS.map if parallel else map)(fill, range(3), image.split()))
        digest = hashlib.sha256(planes + repr(grid).encode()).digest()
        return Picture(torch.from_numpy(pixels_3HW), grid, digest, self)


@dataclass(frozen=True, eq=False)
class Picture:
    """A resized image.

    Attributes:
        pixels_3HW: channels, rows, columns; uint8 on the CPU.
        grid: frames, rows, columns, counted in patches.
        digest: SHA-256 of the pixels and the grid: under the same settings, equal digests mean equal patches.
        settings: how it becomes patches.
    """

    pixels_3HW: Tensor
    grid: tuple[int, int, int]
    digest: bytes
    settings: ImageSettings


def copy_pixels(pictures: Sequence[Picture], device: torch.device | str) -> Tensor:
    """The pixels of all pictures, one after the other, on a device: uint8, in one copy that the host only starts."""
    flat = [picture.pixels_3HW.flatten() for picture in pictures]
    pinned = torch.device(device).type == "cuda"
    staged = torch.empty(sum(map(len, flat)), dtype=torch.uint8, pin_memory=pinned)
    if len(staged) < _SERIAL_BYTES:
        np.concatenate([pixels.numpy() for pixels in flat], out=staged.numpy())
    else:
        torch.cat(flat, out=staged)
    return staged.to(device, non_blocking=True)


def cut_patches(pixels: Tensor, pictures: Sequence[Picture], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised patches [P, patch_dim] of all pictures, on the device of their pixels: on a GPU in one launch each.

    Patches come in the order of the vision tower: merge_size x merge_size neighbours in a row, so that the merger only
    has to join consecutive rows. Within a patch: channel, frame, row, column. A still image fills all
    ``temporal_patch_size`` frames.

    Args:
        pixels: of :func:`copy_pixels`.
        pictures: at least one, all of the same settings.
        dtype: of the result; the arithmetic is fp32.
    """
    settings = pictures[0].settings
    patch, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    grids = [picture.grid for picture in pictures]
    counts = [math.prod(grid) for grid in grids]
    parts = pixels.split([picture.pixels_3HW.numel() for picture in pictures])
    if pixels.is_cuda:
        from qwen3vl_moe.model.vision_ops import cut_patches as cut_picture  # needs triton, which a CPU may lack

        patches_PC = pixels.new_empty(sum(counts), 3 * frames * patch**2, dtype=dtype)
        for grid, part, patches in zip(grids, parts, patches_PC.split(counts), strict=True):
            cut_picture(part, patches, grid, (patch, merge, frames), settings.mean, settings.std)
        return patches_PC
    values_P3S = pixels.new_empty(sum(counts), 3, patch**2, dtype=torch.float32)
    for (_, rows, columns), part, values in zip(grids, parts, values_P3S.split(counts), strict=True):
        blocks = part.view(3, rows // merge, merge, patch, columns // merge, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        values.view(blocks.shape).copy_(blocks)
    mean_31, std_31 = (torch.tensor(values)[:, None] for values in (settings.mean, settings.std))
    # Division by 255 rounds as transformers' fp64 product with 1/255 does, for all 256 values, and the other two steps
    # are its own. A fused scale and shift would be a pass less, and one unit in the last place off.
    values_P3S.div_(255).sub_(mean_31).div_(std_31)
    return values_P3S.to(dtype)[:, :, None].expand(-1, -1, frames, -1).reshape(sum(counts), -1)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size that an image is resized to: both sides multiples of ``factor``, area within the bounds, shape about kept.

    The rule of Qwen2-VL, as transformers 5.17 has it. A side never falls below ``factor``, so a very long image may
    stay above ``max_pixels``; rounding up may carry a very small one past it.
    """
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        ConfigError: the file cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON object is needed, got {type(content).__name__}")
    return content


def _read_settings(directory: Path) -> tuple[dict[str, Any], str]:
    nested, plain = directory / "processor_config.json", directory / "preprocessor_config.json"
    if nested.exists():
        settings = read_json(nested).get("image_processor")
        if isinstance(settings, dict):
            return settings, f"{nested}: image_processor"
    if plain.exists():
        return read_json(plain), str(plain)
    raise ConfigError(
        f"{directory} has no image settings: preprocessor_config.json, or image_processor in processor_config.json"
    )


def _integer(raw: dict[str, Any], source: str, *names: str) -> int:
    """The first of ``names`` that is present: one value, several spellings."""
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{source}: {name} is {value!r}; a positive integer is needed")
        return value
    raise ConfigError(f"{source}: {' or '.join(names)} is missing")


def _per_channel(raw: dict[str, Any], source: str, name: str) -> tuple[float, float, float]:
    value = raw.get(name)
    if not (isinstance(value, list) and len(value) == 3 and all(isinstance(v, int | float) for v in value)):
        raise ConfigError(f"{source}: {name} is {value!r}; a list of three numbers is needed")
    if name == "image_std" and not all(v > 0 for v in value):
        raise ConfigError(f"{source}: {name} is {value!r}; its numbers must be positive")
    return tuple(float(v) for v in value)
