"""Frames of a video -> pictures, a group of frames each: all at once, or while the first of them are in use already."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import torch
import torch.nn.functional as F

from qwen3vl_moe.errors import PromptError, UserError
from qwen3vl_moe.inputs.images import Picture
from qwen3vl_moe.inputs.video import VideoSettings
from qwen3vl_moe.inputs.workers import POOL

# Visual tokens that are waited for together, about: as many as a step takes. With 2,048 both videos that were measured
# became slower (docs/video.md): threads that decode share the interpreter lock with the one that launches kernels.
PART_TOKENS = 8192

Put = Callable[[int, np.ndarray], None]  # a frame's number among those of the video, and its pixels
GoesOn = Callable[[], bool]


class Part(Future[None]):
    """Pictures in a row whose frames are waited for together; done when their pixels are there.

    It fails with the UserError that decoding them ended with. Decoding stops once nobody holds it, or it is not
    ``wanted`` any more.
    """

    wanted = True

    @property
    def ready(self) -> bool:
        return self.done() and self.exception() is None


class GroupedFrames:
    """Room for the resized frames of one video, filled by any number of threads.

    Args:
        grid: of :meth:`.VideoSettings.grid`.
        count: of frames, before the last one is repeated.
    """

    def __init__(self, grid: tuple[int, int, int], count: int, settings: VideoSettings):
        self._grid, self._count, self._settings = grid, count, settings
        side = settings.image.patch_size
        shape = settings.group, 3, grid[1] * side, grid[2] * side
        self._pixels = [np.empty(shape, np.uint8) for _ in range(grid[0])]

    def put(self, place: int, frame_HW3: np.ndarray) -> None:
        """Resize an RGB frame, uint8, into its place; the last one into what is left of its group."""
        group, number = divmod(place, self._settings.group)
        pixels_F3HW = self._pixels[group]
        target_3HW = pixels_F3HW[number]
        # torch takes no array that nobody may write to, which those of Pillow are.
        frame = torch.from_numpy(frame_HW3 if frame_HW3.flags.writeable else frame_HW3.copy()).permute(2, 0, 1)
        if frame.shape != target_3HW.shape:
            sides = target_3HW.shape[1:]
            frame = F.interpolate(frame[None], size=sides, mode="bicubic", align_corners=False, antialias=True)[0]
        target_3HW[:] = frame.numpy()
        if place == self._count - 1:
            pixels_F3HW[number + 1 :] = target_3HW

    def picture(self, group: int, source: bytes | None = None) -> Picture:
        """A group.

        Args:
            source: a digest of what its frames are decoded from; None: they are there, and tell it themselves.
        """
        pixels_F3HW, image = self._pixels[group], self._settings.image
        settings = image.patch_size, image.temporal_patch_size, image.merge_size, image.mean, image.std
        digest = hashlib.sha256(json.dumps([pixels_F3HW.shape, settings]).encode())
        digest.update(pixels_F3HW.data if source is None else source)
        return Picture(pixels_F3HW, (1, *self._grid[1:]), digest.digest(), image)

    def parts(self) -> list[range]:
        """Groups that are waited for together: the same for all videos of one size and number of frames."""
        groups, rows, columns = self._grid
        tokens = groups * self._settings.image.num_tokens((1, rows, columns))
        count = min(groups, max(1, round(tokens / PART_TOKENS)))
        ends = [number * groups // count for number in range(count + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(ends)]

    def fill(self, read: Callable[[Put, GoesOn, int], None], where: str) -> list[Part]:
        """Have all frames put here by a thread of the pool, those of the first parts first; returns at once.

        Args:
            read: given ``put(place, frame)`` to call for each, whether anybody wants more, and the number of parts.
            where: what messages call the video.

        Returns:
            the part of each group.
        """
        spans, size = self.parts(), self._settings.group
        made = [Part() for _ in spans]
        parts = [weakref.ref(part) for part in made]
        left = [set(range(span.start * size, min(span.stop * size, self._count))) for span in spans]
        of_group = [number for number, span in enumerate(spans) for _ in span]
        counting = threading.Lock()

        def put(place: int, frame: np.ndarray) -> None:
            self.put(place, frame)
            number = of_group[place // size]
            with counting:  # a frame may come twice, where a file has to be read from further before
                came_last = left[number] == {place}
                left[number].discard(place)
            if came_last and (part := parts[number]()) is not None:
                part.set_result(None)

        def goes_on() -> bool:
            alive = [part for each in parts if (part := each()) is not None]
            return any(part.wanted and not part.done() for part in alive)

        def work(_: None) -> None:
            error: Exception = PromptError(f"{where}: some of its frames cannot be decoded")
            try:
                read(put, goes_on, len(parts))
            except UserError as found:
                error = found
            except Exception as found:  # of a library that met what nobody foresaw
                error = PromptError(f"{where} cannot be decoded: {type(found).__name__}: {found}")
                error.__cause__ = found
            for part in [part() for part in parts]:
                if part is not None and not part.done():
                    part.set_exception(error)

        POOL.submit(work, None)
        return [made[number] for number in of_group]
