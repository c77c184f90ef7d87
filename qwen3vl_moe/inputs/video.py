"""Videos -> what the vision tower takes: which frames, of what size, and when they are shown.

The rules are those of transformers' ``Qwen3VLVideoProcessor``: ``fps`` frames a second, evenly spread over the whole;
one size for all of them, chosen so that their areas together stay within bounds; resized by torch's bicubic filter on 8
bits. Frames go in groups of ``temporal_patch_size`` (two). Each group is a picture of its own to the model, which the
prompt tells the time of; the last frame is repeated where it would be alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3vl_moe.errors import ConfigError, PromptError
from qwen3vl_moe.inputs.images import (
    MAX_ASPECT_RATIO,
    MAX_PIXELS_BOUND,
    ImageSettings,
    ImageSize,
    check_fixed_settings,
    is_count,
)
from qwen3vl_moe.json_files import read_json_object

ASSUMED_FPS = 24.0  # of frames that say nothing, as in transformers
MOST_FRAMES = 2**16  # of one video in a prompt
_LEAST_FPS, _MOST_FPS = 1e-4, 1e3

_COUNTS = ("num_frames", "min_frames", "max_frames")
_PIXELS = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
VIDEO_KEYS = ("fps", "sample_fps", *_COUNTS, *_PIXELS, "video_metadata")
_METADATA = ("fps", "frames_indices", "total_num_frames", "duration", "width", "height", "video_backend")


@dataclass(frozen=True)
class VideoOptions:
    """What one video asks for; None leaves it to the checkpoint's settings.

    Attributes:
        fps: frames that are taken of each second. Of a list of frames without ``metadata``: how many a second it has,
            all of which are taken.
        num_frames: that are taken in all, instead.
        min_frames, max_frames: bounds of what ``fps`` comes to.
        min_pixels, max_pixels: bounds of the area of one frame.
        total_pixels: bound of the area of all frames together.
        resized_height, resized_width: the sides of all frames, instead; rounded to whole tokens.
        metadata: of a list of frames, in transformers' words: ``fps`` and perhaps ``frames_indices`` (of the frames, in
            the video that they were taken from).
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    metadata: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], where: str) -> VideoOptions:
        """From some of ``VIDEO_KEYS``.

        Raises:
            PromptError: a value is not of its kind, or two of them contradict each other.
        """
        given = {key: value for key, value in given.items() if value is not None}
        metadata = _checked_metadata(given.pop("video_metadata", None), where)
        if "sample_fps" in given:  # as in qwen-vl-utils: of a list of frames
            if "fps" in given or metadata is not None:
                raise PromptError(f"{where} gives sample_fps beside {'fps' if 'fps' in given else 'video_metadata'}")
            metadata = {"fps": _rate(given.pop("sample_fps"), f"{where} has sample_fps")}
        if "fps" in given:
            given["fps"] = _rate(given["fps"], f"{where} has fps")
        for key in _COUNTS:
            if key in given and not (is_count(given[key]) and given[key] <= MOST_FRAMES):
                raise PromptError(f"{where} has {key} {given[key]!r}; a whole number from 1 to {MOST_FRAMES} is needed")
        for key in _PIXELS:
            if key in given and not is_count(given[key]):
                raise PromptError(f"{where} has {key} {given[key]!r}; a positive whole number of pixels is needed")
        if "num_frames" in given and (other := given.keys() & {"fps", "min_frames", "max_frames"}):
            raise PromptError(f"{where} gives num_frames and {min(other)}; one of them is enough")
        if len(given.keys() & {"resized_height", "resized_width"}) == 1:
            raise PromptError(f"{where}: resized_height and resized_width go together")
        return cls(**given, metadata=metadata)


@dataclass(frozen=True)
class VideoSettings:
    """How a checkpoint's videos become patches.

    Attributes:
        image: the settings that they share with images: sides of patches, mean and deviation.
        min_pixels, max_pixels: bounds of the area of all frames together.
        fps, num_frames, min_frames, max_frames: see :class:`VideoOptions`.
        frame_tokens: most visual tokens of a frame (``max_video_tokens`` with ``cap_pixels_per_frame``); None: as many
            as ``max_pixels`` leaves.
    """

    image: ImageSettings
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 768 * 32 * 32
    fps: float = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    frame_tokens: int | None = None

    @classmethod
    def from_pretrained(cls, directory: str | Path, image: ImageSettings) -> VideoSettings:
        """Read ``video_processor`` in processor_config.json, else video_preprocessor_config.json, else, as transformers
        does, the file of the image settings.

        Raises:
            ConfigError: a value is not supported, or differs from the image settings where it may not.
        """
        directory = Path(directory)
        nested, plain = directory / "processor_config.json", directory / "video_preprocessor_config.json"
        raw, source = {}, str(plain)
        if nested.exists() and isinstance(found := read_json_object(nested, ConfigError).get("video_processor"), dict):
            raw, source = found, f"{nested}: video_processor"
        else:
            for path in (plain, directory / "preprocessor_config.json"):
                if path.exists():
                    raw, source = read_json_object(path, ConfigError), str(path)
                    break
        check_fixed_settings(raw, source)
        for name, ours in (
            ("patch_size", image.patch_size),
            ("temporal_patch_size", image.temporal_patch_size),
            ("merge_size", image.merge_size),
            ("image_mean", list(image.mean)),
            ("image_std", list(image.std)),
        ):
            if raw.get(name) is not None and raw[name] != ours:
                raise ConfigError(
                    f"{source}: {name} is {raw[name]!r}, the image settings have {ours!r}; only equal ones work"
                )
        size = raw.get("size") or {}
        if not isinstance(size, dict) or not set(size) <= {"shortest_edge", "longest_edge"}:
            raise ConfigError(
                f"{source}: size is {size!r}; it may hold shortest_edge and longest_edge, areas in pixels"
            )
        given: dict[str, Any] = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        given |= {name: raw.get(name) for name in _COUNTS}
        if raw.get("cap_pixels_per_frame"):
            given["frame_tokens"] = raw.get("max_video_tokens", 768)
        for name, value in given.items():
            if value is not None and not is_count(value):
                raise ConfigError(f"{source}: {name} is {value!r}; a positive integer is needed")
        given = {name: value for name, value in given.items() if value is not None}
        if raw.get("fps") is not None:
            try:
                given["fps"] = _rate(raw["fps"], f"{source}: fps is")
            except PromptError as error:
                raise ConfigError(str(error)) from None
        settings = cls(image, **given)
        if settings.min_pixels > settings.max_pixels or settings.min_frames > settings.max_frames:
            raise ConfigError(f"{source}: the least is more than the most, of pixels in size or of frames")
        return settings

    @property
    def group(self) -> int:
        """Frames that become one picture."""
        return self.image.temporal_patch_size

    def sample(self, total: int, fps: float | None, options: VideoOptions) -> np.ndarray:
        """Numbers of the frames that are taken, ascending.

        Args:
            total: frames that there are.
            fps: of these; None: not known, and taken for 24.
        """
        count = options.num_frames
        if count is None and options.fps is None:
            count = self.num_frames
        if count is None:
            wanted = options.fps or self.fps
            low, high = options.min_frames or self.min_frames, options.max_frames or self.max_frames
            count = min(max(int(total / (fps or ASSUMED_FPS) * wanted), low), high)
        return np.linspace(0, total - 1, min(count, total)).round().astype(int)

    def grid(self, frames: int, height: int, width: int, options: VideoOptions, where: str) -> tuple[int, int, int]:
        """Grid (groups, rows, columns), in patches, of ``frames`` frames of ``height`` x ``width`` pixels.

        Raises:
            PromptError: the sides differ by a factor above 200, or the bounds leave no room.
        """
        image = self.image
        groups = -(-frames // self.group)
        if options.resized_height is not None:
            size = ImageSize(resized_height=options.resized_height, resized_width=options.resized_width)
            return (groups, *image.grid(height, width, where, size)[1:])
        frames = max(frames, self.group)  # transformers takes no fewer; here the one frame is repeated
        low, high = self._bounds(frames, options)
        if low > high:
            raise PromptError(
                f"{where}: its {frames} frames are to have at least {low} pixels together and at most {high}; lower "
                "min_pixels, or raise max_pixels and total_pixels"
            )
        height, width = _fit(frames, height, width, self.group, image.factor, low, high, where)
        return groups, height // image.patch_size, width // image.patch_size

    def _bounds(self, frames: int, options: VideoOptions) -> tuple[int, int]:
        """Least and most pixels of all frames together."""
        low = self.min_pixels if options.min_pixels is None else options.min_pixels * frames
        high = options.total_pixels or self.max_pixels
        if self.frame_tokens is not None:
            share = min(self.frame_tokens * self.image.factor**2, high // frames)
            high = max(share, int(self.min_pixels * 1.05)) * frames
        if options.max_pixels is not None:
            high = min(high, options.max_pixels * frames)
            low = low if options.min_pixels is not None else min(low, high)
        elif options.total_pixels is not None and options.min_pixels is None:
            low = min(low, high)
        return low, high

    def times(self, indices: Sequence[int], fps: float | None) -> list[float]:
        """When each group is shown, in seconds: the mean of its first and its last frame's times."""
        padded = [*indices, *[indices[-1]] * (-len(indices) % self.group)]
        seconds = [index / (fps or ASSUMED_FPS) for index in padded]
        return [(seconds[i] + seconds[i + self.group - 1]) / 2 for i in range(0, len(seconds), self.group)]


def _fit(
    frames: int, height: int, width: int, group: int, factor: int, low: int, high: int, where: str
) -> tuple[int, int]:
    """Sides that every frame is resized to: the rule of Qwen3-VL, in the order of its roundings."""
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise PromptError(
            f"{where} is {width}x{height} pixels: its sides differ by more than a factor of {MAX_ASPECT_RATIO}; crop it"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    area = round(frames / group) * group * rows * columns
    if area > high:
        shrink = math.sqrt(frames * height * width / high)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < low:
        grow = math.sqrt(low / (frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def warn_of_assumed_fps(where: str) -> None:
    warnings.warn(
        f"{where} is a list of frames that does not tell its fps: {ASSUMED_FPS:g} frames a second are assumed, which "
        "the model is told as the frames' times",
        stacklevel=2,
    )


def _rate(value: Any, what: str) -> float:
    if isinstance(value, str):  # as in the examples of qwen-vl-utils
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST_FPS <= value <= _MOST_FPS:
        raise PromptError(
            f"{what} {value!r:.80}; a number of frames a second is needed, from {_LEAST_FPS:g} to {_MOST_FPS:g}"
        )
    return float(value)


def _checked_metadata(value: Any, where: str) -> Mapping[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise PromptError(f"{where} has video_metadata of type {type(value).__name__}; a dict with fps is needed")
    given = {key: each for key, each in value.items() if each is not None and key != "do_sample_frames"}
    for key in given:
        if key not in _METADATA:
            raise PromptError(f"{where}: video_metadata has the key {key!r}; {', '.join(_METADATA)} are understood")
    if "fps" in given:
        given["fps"] = _rate(given["fps"], f"{where}: video_metadata has fps")
    if "frames_indices" in given:
        indices = given["frames_indices"]
        indices = indices.tolist() if hasattr(indices, "tolist") else indices
        if not isinstance(indices, list | tuple) or not all(
            type(i) is int and 0 <= i < MAX_PIXELS_BOUND for i in indices
        ):
            raise PromptError(f"{where}: video_metadata's frames_indices is a list of whole numbers")
        given["frames_indices"] = list(indices)
    return given
