"""Images and videos of a prompt: opened, so that their tokens can be counted, then decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.inputs.fetch import open_file
from qwen3vl_moe.inputs.frame_list import FrameList, as_frames, is_frame_list, open_frames
from qwen3vl_moe.inputs.frames import GroupedFrames, Part
from qwen3vl_moe.inputs.image_source import OpenedImage, decoded, describe, open_image
from qwen3vl_moe.inputs.images import ImageSettings, ImageSize, Picture
from qwen3vl_moe.inputs.messages import MediaRequest, VideoRequest
from qwen3vl_moe.inputs.tokenizer import encode
from qwen3vl_moe.inputs.video import VideoOptions, VideoSettings, warn_of_assumed_fps
from qwen3vl_moe.inputs.video_file import VideoFile, open_video_file
from qwen3vl_moe.inputs.workers import side_by_side


@dataclass(frozen=True, eq=False)
class Opened:
    """An image or a video whose headers were read.

    Attributes:
        where: what messages call it.
        size_text: its size in words.
        ids: what stands for it in the prompt, in the place of its one placeholder token.
        num_tokens: how many of these stand for pixels.
        pictures: decodes it: pictures, where in ``ids`` their tokens begin, and what has to be done before their
            pixels are there. With True, a video file is decoded while others go on; else None says that they are.
        frames, group, pixels: of a video: how many there are, how many make a picture, and those of one visual token.
            0: it is an image.
    """

    where: str
    size_text: str
    ids: list[int]
    num_tokens: int
    pictures: Callable[[bool], list[tuple[int, Picture, Part | None]]]
    frames: int = 0
    group: int = 0
    pixels: int = 0

    def room(self, tokens: int) -> str:
        """What of a video that is too long has room in so many tokens, in words."""
        pieces = -(-self.frames // self.group)
        piece, visual = len(self.ids) // pieces, self.num_tokens // pieces
        most = max(0, tokens // piece * self.group)
        size = max(0, tokens // pieces - (piece - visual)) * self.pixels
        ways = [f"{most} frames of that size (num_frames)"] if most else []
        ways += [f"all {self.frames} of at most {size} pixels each (max_pixels)"] if size else []
        return f"there is room for {' or '.join(ways)}" if ways else "there is no room for a single frame of it"


@dataclass(frozen=True)
class MediaReader:
    """Opens the images and videos of one prompt."""

    config: Qwen3VLMoeConfig
    tokenizer: PreTrainedTokenizerFast
    image_settings: ImageSettings
    video_settings: VideoSettings
    access: MediaAccess
    alpha: str
    resize_on_device: bool

    def least_tokens(self, request: MediaRequest, index: int) -> int:
        """Tokens that it has at least, whatever it turns out to be."""
        if isinstance(request, VideoRequest):
            return 1
        return self.image_settings.least_tokens(request.size, f"image {index}")

    def open(self, requests: Sequence[MediaRequest]) -> list[Opened]:
        """Fetch and read the headers of all of them, side by side.

        Raises:
            PromptError: one cannot be used.
        """
        numbers = {"image": 0, "video": 0}
        numbered = []
        for request in requests:
            kind = "video" if isinstance(request, VideoRequest) else "image"
            numbered.append((request, numbers[kind]))
            numbers[kind] += 1
        return side_by_side(lambda each: self._open(*each), numbered)

    def _open(self, request: MediaRequest, index: int) -> Opened:
        if isinstance(request, VideoRequest):
            return self._open_video(request, index)
        opened, settings = open_image(request.source, index, self.access), self.image_settings
        # From the header's size. EXIF may still turn the image by 90 degrees, which swaps the sides of its grid.
        grid = settings.grid(opened.image.height, opened.image.width, opened.where, request.size)
        count = settings.num_tokens(grid)
        return Opened(
            opened.where,
            f"{opened.size_text} pixels",
            [self.config.image_token_id] * count,
            count,
            lambda _: [(0, self._picture(opened, request.size, count), None)],
        )

    def _picture(self, opened: OpenedImage, size: ImageSize | None, count: int) -> Picture:
        settings = self.image_settings
        with decoded(opened, self.alpha) as image:
            source = None if opened.digest is None else opened.digest + self.alpha.encode()
            picture = settings.resize(image, size, source, self.resize_on_device)
            found = f"{image.width}x{image.height}"
        if settings.num_tokens(picture.grid) != count:  # would put every later token in the wrong place
            raise PromptError(f"{opened.where} is not of the size that its header gives: it decodes to {found}")
        return picture

    def _open_video(self, request: VideoRequest, index: int) -> Opened:
        where, settings, options = f"video {index} ({describe(request.source)})", self.video_settings, request.options
        source: FrameList | VideoFile
        if is_frame_list(request.source):
            chosen, indices, fps = self._choose(as_frames(request.source, where), options, where)
            source = open_frames(chosen, where, self.access, self.alpha)
        else:
            if options.metadata is not None:
                raise PromptError(f"{where} has video_metadata or sample_fps, which are for lists of frames")
            source = open_video_file(open_file(request.source, where, self.access), where, self.alpha)
            indices, fps = settings.sample(source.total, source.fps, options).tolist(), source.fps
        grid = settings.grid(len(indices), source.height, source.width, options, where)
        count = settings.image.num_tokens((1, *grid[1:]))
        ids, begins = self._pieces(settings.times(indices, fps), count)

        def pictures(ahead: bool) -> list[tuple[int, Picture, Part | None]]:
            made, groups = GroupedFrames(grid, len(indices), settings), range(grid[0])
            parts: Sequence[Part | None] = [None] * len(groups)
            if isinstance(source, FrameList):
                source.read(made.put)
                return list(zip(begins, side_by_side(made.picture, groups), parts, strict=True))
            if ahead:
                parts = made.fill(partial(source.read, indices), where)
            else:
                source.read(indices, made.put)
            of_group = [indices[n * settings.group : (n + 1) * settings.group] for n in groups]
            found = [made.picture(n, source.digest(of_group[n])) for n in groups]
            return list(zip(begins, found, parts, strict=True))

        return Opened(
            where,
            f"{len(indices)} frames of {source.width}x{source.height} pixels",
            ids,
            count * grid[0],
            pictures,
            len(indices),
            settings.group,
            settings.image.factor**2,
        )

    def _choose(
        self, frames: Sequence[Any], options: VideoOptions, where: str
    ) -> tuple[list[Any], list[int], float | None]:
        """Of a list of frames: those that are taken, their numbers in the video that they are of, and its fps."""
        total, metadata = len(frames), options.metadata
        fps, numbers = options.fps, None
        sampled = options.num_frames is not None
        if metadata is not None:
            fps, numbers = metadata.get("fps"), metadata.get("frames_indices")
            sampled = sampled or options.fps is not None
        if numbers is not None and (len(numbers) != total or sampled):
            raise PromptError(
                f"{where} has {total} frames and {len(numbers)} frames_indices"
                if len(numbers) != total
                else f"{where} is chosen already, as its frames_indices say: leave out fps and num_frames"
            )
        if fps is None:
            warn_of_assumed_fps(where)
        if not sampled:
            return list(frames), numbers or list(range(total)), fps
        chosen = self.video_settings.sample(total, fps, options).tolist()
        return [frames[number] for number in chosen], chosen, fps

    def _pieces(self, seconds: Sequence[float], count: int) -> tuple[list[int], list[int]]:
        """The tokens of a video: for each group of frames its time in words, then its visual tokens; and their places.

        transformers leaves the pair of vision tokens around all of it in place, in which the placeholder stood.
        """
        config, ids, begins = self.config, [], []
        for each in seconds:
            ids += [*encode(self.tokenizer, f"<{each:.1f} seconds>"), config.vision_start_token_id]
            begins.append(len(ids))
            ids += [*[config.video_token_id] * count, config.vision_end_token_id]
        return ids, begins
