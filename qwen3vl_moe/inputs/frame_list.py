"""A list of frames, or an array of them, as a video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.inputs.image_source import OpenedImage, decoded, open_image
from qwen3vl_moe.inputs.video import MOST_FRAMES
from qwen3vl_moe.inputs.workers import side_by_side


@dataclass(frozen=True, eq=False)
class FrameList:
    """Some frames, all of one size.

    Attributes:
        frames: opened images, or arrays uint8 [height, width, 3].
        height, width: of a frame in pixels, as it is shown.
    """

    where: str
    frames: Sequence[OpenedImage | np.ndarray]
    height: int
    width: int
    alpha: str

    def read(self, take: Callable[[int, np.ndarray], None]) -> None:
        """Call ``take(number, frame)`` with every frame, upright, RGB, uint8 [height, width, 3], in threads.

        Raises:
            PromptError: one of them is damaged.
        """

        def work(number: int) -> None:
            frame = self.frames[number]
            if isinstance(frame, np.ndarray):
                take(number, np.ascontiguousarray(frame))
                return
            with decoded(frame, self.alpha) as image:
                if image.size != (self.width, self.height):
                    found = f"{image.width}x{image.height}"
                    raise PromptError(f"{frame.where} is not of the size that its header gives: it decodes to {found}")
                take(number, np.asarray(image))

        side_by_side(work, range(len(self.frames)))


def is_frame_list(source: Any) -> bool:
    return isinstance(source, list | tuple) or _is_array(source)


def as_frames(source: Any, where: str) -> list[Any]:
    """The frames of a list or an array, none of which is looked at yet.

    Raises:
        PromptError: there are none, or too many, or the array is none of RGB frames in 8 bits.
    """
    frames = list(_as_array(source, 4, where) if _is_array(source) else source)
    if not 1 <= len(frames) <= MOST_FRAMES:
        raise PromptError(f"{where} has {len(frames)} frames; 1 to {MOST_FRAMES} are needed")
    return frames


def open_frames(chosen: Sequence[Any], where: str, access: MediaAccess, alpha: str) -> FrameList:
    """Read the headers of some frames, each any source of an image, or an array uint8 [height, width, 3].

    Raises:
        PromptError: one cannot be used, or they differ in size.
    """

    def opened(number: int) -> OpenedImage | np.ndarray:
        if _is_array(chosen[number]):
            return _as_array(chosen[number], 3, f"{where}: frame {number}")
        return open_image(chosen[number], number, access, kind=f"{where}: frame")

    frames = side_by_side(opened, range(len(chosen)))
    sizes = [frame.shape[:2] if isinstance(frame, np.ndarray) else frame.upright_size for frame in frames]
    for number, size in enumerate(sizes):
        if size != sizes[0]:
            raise PromptError(
                f"{where}: frame {number} is {size[1]}x{size[0]} pixels, frame 0 is {sizes[0][1]}x{sizes[0][0]}; the "
                "frames of a video have one size"
            )
    height, width = sizes[0]
    return FrameList(where, frames, height, width, alpha)


def _is_array(source: Any) -> bool:
    return hasattr(source, "shape") and hasattr(source, "__array__") and not isinstance(source, Image.Image)


def _as_array(source: Any, dims: int, where: str) -> np.ndarray:
    """uint8 [frames, height, width, 3], or one frame of it; torch's order, channels before rows, is turned into it."""
    try:
        array = np.asarray(source)
    except Exception as error:  # a tensor on a device, say
        raise PromptError(f"{where} cannot be read as an array: {type(error).__name__}") from None
    if array.ndim == dims and array.shape[-3] == 3 and array.shape[-1] != 3:
        array = np.moveaxis(array, -3, -1)
    if array.dtype != np.uint8 or array.ndim != dims or array.shape[-1] != 3 or not array.size:
        expected = "[frames, height, width, 3]" if dims == 4 else "[height, width, 3]"
        raise PromptError(f"{where} is an array of {array.dtype} {list(array.shape)}; uint8 {expected} is needed")
    return array
