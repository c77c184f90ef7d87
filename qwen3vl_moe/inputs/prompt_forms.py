"""The forms of a prompt without a chat template: text, token ids, or a dict of these with images, as in vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.images import ImageSettings
from qwen3vl_moe.inputs.messages import ImageRequest
from qwen3vl_moe.inputs.tokenizer import IMAGE_PAD, IMAGE_PLACEHOLDER, VIDEO_PAD, VISION_END, VISION_START

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
        body: text or token ids, with a placeholder for each image.
        images: for the placeholders, in their order.
        text_ids: tokens that follow and that are text whatever they spell.
        bounds: min_pixels and max_pixels of this prompt's images, where they are not the processor's.
    """

    body: str | Sequence[int]
    images: list[ImageRequest] = field(default_factory=list)
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
    images, bounds = _images(prompt.get("multi_modal_data", {})), _bounds(prompt.get("mm_processor_kwargs", {}))
    body = prompt[bodies[0]] if bodies else ()
    if bodies == ["prompt"] and not isinstance(body, str):
        raise PromptError(f"the prompt's text is of type {type(body).__name__}; token ids go into prompt_token_ids")
    if bodies == ["prompt_token_ids"] and isinstance(body, str):
        raise PromptError("prompt_token_ids is a text; text goes into prompt")
    return PromptParts(body, images, prompt.get("text_token_ids", ()), bounds)


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


def find_placeholders(ids: list[int], config: Qwen3VLMoeConfig) -> list[tuple[int, int]]:
    """[start, stop) of every run of image tokens; each must stand between vision_start and vision_end."""
    array = np.asarray(ids)
    if np.any(array == config.video_token_id):
        raise PromptError(
            f"the prompt holds {VIDEO_PAD} (token id {config.video_token_id}): video is not supported yet"
        )
    edges = np.flatnonzero(np.diff(array == config.image_token_id, prepend=False, append=False))
    runs = [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
    for start, stop in runs:
        before, after = ids[max(start - 1, 0)], ids[min(stop, len(ids) - 1)]
        if before != config.vision_start_token_id or after != config.vision_end_token_id:
            raise PromptError(
                f"the {IMAGE_PAD} at token {start} does not stand alone between {VISION_START} and {VISION_END}; "
                f"the placeholder of an image is {IMAGE_PLACEHOLDER}"
            )
    opening = np.flatnonzero(array == config.vision_start_token_id)
    if len(opening) != len(runs):
        starts = {start for start, _ in runs}
        lone = next(int(at) for at in opening if int(at) + 1 not in starts)
        raise PromptError(
            f"the {VISION_START} at token {lone} is not followed by {IMAGE_PAD}: a placeholder without image"
        )
    return runs


def _given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}


def _images(data: Any) -> list[ImageRequest]:
    if not isinstance(data, Mapping):
        raise PromptError(f"multi_modal_data is a {type(data).__name__}; a dict such as {{'image': source}} is needed")
    for kind in _given(data):
        if kind == "video":
            raise PromptError("multi_modal_data holds a video; video is not supported yet, give frames as images")
        if kind != "image":
            raise PromptError(f"multi_modal_data holds {kind!r}; only 'image' is supported")
    images = data.get("image")
    if images is None:
        return []
    return [ImageRequest(source) for source in (images if isinstance(images, list | tuple) else [images])]


def _bounds(options: Any) -> dict[str, Any]:
    """min_pixels and max_pixels, of whose older and newer spelling the older wins, as in transformers."""
    if not isinstance(options, Mapping):
        raise PromptError(f"mm_processor_kwargs is a {type(options).__name__}; a dict is needed")
    options = _given(options)
    size = options.pop("size", {})
    if not isinstance(size, Mapping) or not size.keys() <= {"shortest_edge", "longest_edge"}:
        raise PromptError("mm_processor_kwargs: size holds shortest_edge and longest_edge, areas in pixels")
    for key in options:
        if key not in ("min_pixels", "max_pixels"):
            raise PromptError(f"mm_processor_kwargs holds {key!r}; min_pixels, max_pixels and size are understood")
    areas = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge"), **options}
    return _given(areas)
