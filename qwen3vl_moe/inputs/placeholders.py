"""Where images and videos go in a prompt: the tokens that stand for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.media import Opened
from qwen3vl_moe.inputs.messages import ImageRequest, MediaRequest, VideoRequest
from qwen3vl_moe.inputs.tokenizer import (
    IMAGE_PAD,
    IMAGE_PLACEHOLDER,
    VIDEO_PAD,
    VIDEO_PLACEHOLDER,
    VISION_END,
    VISION_START,
)

_LONGEST_TIME = 64  # tokens that tell when a frame is shown


@dataclass(frozen=True)
class Placeholder:
    """Tokens [start, stop) of a prompt that stand for an image or a video."""

    start: int
    stop: int
    is_video: bool


def find_placeholders(ids: list[int], config: Qwen3VLMoeConfig) -> list[Placeholder]:
    """Every image token, or run of them, and every video token, all of which have to stand between vision_start and
    vision_end. A video may also be there as it is expanded: times, each with the frames' own such tokens.

    Raises:
        PromptError: a vision token stands anywhere else.
    """
    array = np.asarray(ids)
    image, video, end = config.image_token_id, config.video_token_id, config.vision_end_token_id
    found: list[Placeholder] = []
    done = 0  # vision tokens before it are accounted for
    pads = np.flatnonzero((array == image) | (array == video))
    openings = np.flatnonzero(array == config.vision_start_token_id)
    for start in openings.tolist():
        if start < done:
            continue
        _no_pad_before(pads, done, start, ids, image)
        inner = ids[start + 1] if start + 1 < len(ids) else None
        if inner in (image, video):
            stop = _run_end(ids, start + 1)
            if stop >= len(ids) or ids[stop] != end:
                _stands_alone(start + 1, inner == image)
            if inner == video and stop - start > 2:
                raise PromptError(f"the {VIDEO_PAD} at token {start + 1} stands {stop - start - 1} times; write one")
            found.append(Placeholder(start + 1, stop, inner == video))
        else:
            stop = _expanded_end(ids, start + 1, config)
            if stop is None:
                raise PromptError(
                    f"the {VISION_START} at token {start} is not followed by {IMAGE_PAD} or {VIDEO_PAD}: a placeholder "
                    "without image"
                )
            found.append(Placeholder(start + 1, stop, True))
        done = stop
    _no_pad_before(pads, done, len(ids), ids, image)
    return found


def _no_pad_before(pads: np.ndarray, start: int, stop: int, ids: list[int], image: int) -> None:
    between = pads[np.searchsorted(pads, start) : np.searchsorted(pads, stop)]
    if len(between):
        _stands_alone(int(between[0]), ids[int(between[0])] == image)


def _stands_alone(place: int, is_image: bool) -> NoReturn:
    pad, placeholder = (IMAGE_PAD, IMAGE_PLACEHOLDER) if is_image else (VIDEO_PAD, VIDEO_PLACEHOLDER)
    raise PromptError(
        f"the {pad} at token {place} does not stand alone between {VISION_START} and {VISION_END}; the placeholder of "
        f"{'an image' if is_image else 'a video'} is {placeholder}"
    )


def _run_end(ids: list[int], start: int) -> int:
    """Where the tokens end that are as the one at ``start``."""
    stop = start
    while stop < len(ids) and ids[stop] == ids[start]:
        stop += 1
    return stop


def _expanded_end(ids: list[int], start: int, config: Qwen3VLMoeConfig) -> int | None:
    """Where the inside of an expanded video ends that begins at ``start``; None: none does."""
    vision, place = {config.vision_start_token_id, config.vision_end_token_id}, start
    while place < len(ids) and ids[place] != config.vision_end_token_id:
        opening = next((i for i in range(place, min(place + _LONGEST_TIME, len(ids))) if ids[i] in vision), None)
        if opening is None or ids[opening] != config.vision_start_token_id:
            return None
        if opening + 1 >= len(ids) or ids[opening + 1] != config.video_token_id:
            return None
        place = _run_end(ids, opening + 1)
        if place >= len(ids) or ids[place] != config.vision_end_token_id:
            return None
        place += 1
    return place if start < place < len(ids) else None


def in_order(places: list[Placeholder], requests: list[MediaRequest]) -> list[MediaRequest]:
    """For each placeholder what it stands for: the next of its kind."""
    videos = [each for each in requests if isinstance(each, VideoRequest)]
    images = [each for each in requests if isinstance(each, ImageRequest)]
    for kind, placeholder, found, given in (
        ("image", IMAGE_PLACEHOLDER, sum(not place.is_video for place in places), len(images)),
        ("video", VIDEO_PLACEHOLDER, sum(place.is_video for place in places), len(videos)),
    ):
        if found != given:
            raise PromptError(
                f"the prompt has {found} {kind} placeholders ({placeholder}) for {given} {kind}s; each {kind} needs "
                "exactly one"
            )
    next_image, next_video = iter(images), iter(videos)
    return [next(next_video) if place.is_video else next(next_image) for place in places]


def check_place(ids: list[int], place: Placeholder, media: Opened) -> None:
    """Refuse a placeholder that is expanded in another way than what it stands for."""
    found = ids[place.start : place.stop]
    if len(found) == 1 or found == media.ids:
        return
    if place.is_video:
        raise PromptError(
            f"{media.where} is spelled out in the prompt in other tokens than its own: write one {VIDEO_PAD}, or all "
            f"{len(media.ids)} tokens of its times and frames"
        )
    raise PromptError(
        f"{media.where} has {len(found)} {IMAGE_PAD} tokens in the prompt; write one, or as many as the image has "
        f"tokens ({media.num_tokens})"
    )
