"""The forms of a prompt without a chat template: text, token ids, or a dict of these with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3vl_moe.errors import PromptError


def split_prompt(prompt: Mapping[str, Any]) -> tuple[str | Sequence[int], list[Any], Sequence[int]]:
    known = ("prompt", "prompt_token_ids", "text_token_ids", "multi_modal_data")
    unknown = sorted(map(str, prompt.keys() - set(known)))
    if unknown:
        raise PromptError(f"the prompt has the key {unknown[0]!r}; {', '.join(known)} are understood")
    given = [key for key in ("prompt", "prompt_token_ids") if prompt.get(key) is not None]
    text_ids = prompt.get("text_token_ids")
    if text_ids is not None and not given:
        prompt, given = {**prompt, "prompt_token_ids": []}, ["prompt_token_ids"]
    if len(given) != 1:
        raise PromptError(
            f"the prompt gives {' and '.join(given) or 'nothing'}; one of prompt, prompt_token_ids is needed"
        )
    data = prompt.get("multi_modal_data")
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise PromptError(f"multi_modal_data is a {type(data).__name__}; a dict such as {{'image': source}} is needed")
    for kind in data:
        if kind == "video":
            raise PromptError("multi_modal_data holds a video; video is not supported yet, give frames as images")
        if kind != "image":
            raise PromptError(f"multi_modal_data holds {kind!r}; only 'image' is supported")
    images = data.get("image")
    if images is None:
        images = []
    images = list(images) if isinstance(images, list | tuple) else [images]
    return prompt[given[0]], images, [] if text_ids is None else text_ids


def checked_ids(ids: Any, vocab_size: int) -> list[int]:
    if isinstance(ids, bytes | Mapping) or not isinstance(ids, Sequence):
        raise PromptError(
            f"a prompt of type {type(ids).__name__} is not understood; give text, a list of token ids, or a dict with "
            "prompt or prompt_token_ids"
        )
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise PromptError(f"token ids must be integers; number {index} is a {type(token).__name__}")
        if not 0 <= token < vocab_size:
            raise PromptError(f"token id {token} at index {index} is outside the vocabulary of {vocab_size}")
    return list(ids)
