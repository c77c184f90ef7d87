"""The forms of a prompt without a chat template: text, token ids, or a dict of these with media, as in vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.images import ImageSettings
from qwen3vl_moe.inputs.messages import ImageRequest, MediaRequest, VideoRequest
from qwen3vl_moe.inputs.video import VIDEO_KEYS, VideoOptions

_KNOWN = ("prompt", "prompt_token_ids", "text_token_ids", "multi_modal_data", "mm_processor_kwargs")
_REASONS = {
    "multi_modal_uuids": "images are told apart by their pixels, so leave it out",
    "prompt_embeds": "give text or token ids",
    "cache_salt": "the prefix cache is not divided",
}


@dataclass(frozen=True)
class PromptParts:
    """What a prompt is made of.

    Attributes:
        body: text or token ids, with a placeholder for each image and each video.
        media: for the placeholders; those of one kind in the order of their placeholders.
        text_ids: tokens that follow and that are text whatever they spell.
        bounds: min_pixels and max_pixels of this prompt's images, where they are not the processor's.
    """

    body: str | Sequence[int]
    media: list[MediaRequest] = field(default_factory=list)
    text_ids: Sequence[int] = ()
    bounds: dict[str, Any] = field(default_factory=dict)

    def last(self, count: int) -> PromptParts:
        """With at most the last ``count`` tokens; a text stays whole, as its tokens are not known yet."""
        text_ids = self.text_ids[-count:] if isinstance(self.text_ids, list | tuple) else self.text_ids
        body = self.body[-count:] if isinstance(self.body, list | tuple) else self.body
        return replace(self, text_ids=text_ids, body=body)

    def settings(self, settings: ImageSettings) -> ImageSettings:
        """``settings`` within the bounds of this prompt.

        Raises:
            PromptError: the bounds are no numbers of pixels, or leave no room.
        """
        if not self.bounds:
            return settings
        try:
            return settings.with_bounds(self.bounds.get("min_pixels"), self.bounds.get("max_pixels"))
        except OptionError as error:
            raise PromptError(f"mm_processor_kwargs: {error}") from None


def split_prompt(prompt: str | Sequence[int] | Mapping[str, Any]) -> PromptParts:
    """Take a prompt apart; a key whose value is None is a key that is not given.

    Raises:
        PromptError: a key is not known, or the prompt is not of this form.
    """
    if not isinstance(prompt, Mapping):
        return PromptParts(prompt)
    prompt = _given(prompt)
    for key in prompt:
        if key not in _KNOWN:
            raise PromptError(
                f"the prompt has the key {key!r}: {_REASONS.get(key, '')}"
                if key in _REASONS
                else f"the prompt has the key {key!r}; {', '.join(_KNOWN)} are understood"
            )
    bodies = [key for key in ("prompt", "prompt_token_ids") if key in prompt]
    if len(bodies) > 1 or not (bodies or "text_token_ids" in prompt):
        raise PromptError(
            f"the prompt gives {' and '.join(bodies) or 'nothing'}; one of prompt, prompt_token_ids is needed"
        )
    bounds, options = _processor_options(prompt.get("mm_processor_kwargs", {}))
    media = _media(prompt.get("multi_modal_data", {}), options)
    body = prompt[bodies[0]] if bodies else ()
    if bodies == ["prompt"] and not isinstance(body, str):
        raise PromptError(f"the prompt's text is of type {type(body).__name__}; token ids go into prompt_token_ids")
    if bodies == ["prompt_token_ids"] and isinstance(body, str):
        raise PromptError("prompt_token_ids is a text; text goes into prompt")
    return PromptParts(body, media, prompt.get("text_token_ids", ()), bounds)


def check_ids(ids: Any, vocab_size: int) -> list[int]:
    """Token ids as a list of their own.

    Raises:
        PromptError: not a list of whole numbers within the vocabulary.
    """
    if isinstance(ids, str | bytes | bytearray | Mapping) or not isinstance(ids, Sequence):
        raise PromptError(
            f"a prompt of type {type(ids).__name__} is not understood; give text, a list of token ids, or a dict with "
            "prompt or prompt_token_ids"
        )
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise PromptError(f"token ids are whole numbers; number {index} is a {type(token).__name__}")
        if not 0 <= token < vocab_size:
            raise PromptError(f"token id {token} at index {index} is outside the vocabulary of {vocab_size}")
    return list(ids)


def _given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def _media(data: Any, options: Mapping[str, Any]) -> list[MediaRequest]:
    if not isinstance(data, Mapping):
        raise PromptError(f"multi_modal_data is a {type(data).__name__}; a dict such as {{'image': source}} is needed")
    data = _given(data)
    for kind in data:
        if kind not in ("image", "video"):
            raise PromptError(f"multi_modal_data holds {kind!r}; only 'image' and 'video' are supported")
    images = data.get("image", [])
    videos = [_video(each, number, options) for number, each in enumerate(_videos(data.get("video", [])))]
    if options and not videos:
        raise PromptError(f"mm_processor_kwargs holds {min(options)!r}, but the prompt has no video")
    return [*(ImageRequest(source) for source in (images if isinstance(images, list | tuple) else [images])), *videos]


def _videos(data: Any) -> Sequence[Any]:
    """One video, or several, as vLLM tells them apart: a list of pictures, or of frames as arrays, is one."""
    if not isinstance(data, list | tuple):
        return [data] if getattr(data, "ndim", 4) == 4 else data
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Mapping):
        return [data]
    frames = data and all(isinstance(each, Image.Image) or getattr(each, "ndim", 0) == 3 for each in data)
    return [data] if frames else data


def _video(source: Any, number: int, options: Mapping[str, Any]) -> VideoRequest:
    """A video as vLLM takes it: frames may have their metadata beside them."""
    options = dict(options)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Mapping):
        source, options["video_metadata"] = source
    return VideoRequest(source, VideoOptions.of(options, f"multi_modal_data's video {number}"))


def _processor_options(options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """min_pixels and max_pixels of images, and what videos ask for.

    Of the older and the newer spelling of the bounds the older wins, as in transformers.
    """
    if not isinstance(options, Mapping):
        raise PromptError(f"mm_processor_kwargs is a {type(options).__name__}; a dict is needed")
    options = _given(options)
    of_videos = {key: options.pop(key) for key in ("fps", "num_frames") if key in options}
    inner = options.pop("videos_kwargs", {})
    if not isinstance(inner, Mapping):
        raise PromptError(f"mm_processor_kwargs: videos_kwargs is a {type(inner).__name__}; a dict is needed")
    if unknown := [key for key in inner if key not in VIDEO_KEYS]:
        known = ", ".join(VIDEO_KEYS)
        raise PromptError(f"mm_processor_kwargs: videos_kwargs holds {unknown[0]!r}; {known} are understood")
    of_videos |= _given(inner)
    size = options.pop("size", {})
    if not isinstance(size, Mapping) or not size.keys() <= {"shortest_edge", "longest_edge"}:
        raise PromptError("mm_processor_kwargs: size holds shortest_edge and longest_edge, areas in pixels")
    for key in options:
        if key not in ("min_pixels", "max_pixels"):
            raise PromptError(
                f"mm_processor_kwargs holds {key!r}; min_pixels, max_pixels and size (of images), fps, num_frames and "
                "videos_kwargs are understood"
            )
    areas = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge"), **options}
    return _given(areas), of_videos
