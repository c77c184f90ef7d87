"""Chat messages in the content form of OpenAI and transformers -> what a chat template renders, and the images.

The template only says where an image goes; the image itself is taken out here. Everything that a template would skip in
silence (a misspelt type, a video, an image without a source) is refused instead, naming the message and the item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3vl_moe.errors import PromptError

ROLES = ("system", "user", "assistant", "tool")
_IMAGE_KEYS = ("image", "url", "path", "base64")


def split_images(messages: Sequence[Mapping[str, Any]], vision_tokens: Sequence[str]) -> tuple[list[dict], list[Any]]:
    """Check ``messages`` and take the images out.

    Args:
        messages: ``{"role": ..., "content": str | list of items}``. Items are ``{"type": "text", "text": str}``,
            ``{"type": "image", "image": source}`` (or "url", "path", "base64" for "image", as in transformers) and
            OpenAI's ``{"type": "image_url", "image_url": {"url": str}}``. Other keys of a message are the template's.
        vision_tokens: tokens that text must not spell. Text that holds an image placeholder would pair images with the
            wrong places, so it is refused rather than counted.

    Returns:
        the messages with every image as ``{"type": "image"}``, and the image sources in order of appearance.

    Raises:
        PromptError: the messages are not of this form.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(
            f"a conversation is a {type(messages).__name__}; a list of messages is needed, "
            "such as [{'role': 'user', 'content': 'Hello'}]"
        )
    if not messages:
        raise PromptError("the conversation is empty: at least one message is needed")
    plain, images = [], []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise PromptError(f"{where} is a {type(message).__name__}; a dict with role and content is needed")
        if message.get("role") not in ROLES:
            raise PromptError(f"{where} has the role {message.get('role')!r}; known are {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            _check_text(content, where, vision_tokens)
        elif isinstance(content, list | tuple):
            content = [
                _split_item(item, f"{where}.content[{index}]", vision_tokens, images)
                for index, item in enumerate(content)
            ]
        else:
            raise PromptError(f"{where} has content of type {type(content).__name__}; a string or a list is needed")
        plain.append({**message, "content": content})
    return plain, images


def _split_item(item: Any, where: str, vision_tokens: Sequence[str], images: list[Any]) -> dict:
    if not isinstance(item, Mapping) or not isinstance(item.get("type"), str):
        raise PromptError(f"{where} is {_short(item)}; a dict with a type (text, image, image_url) is needed")
    kind = item["type"]
    if kind == "text":
        text = item.get("text")
        if not isinstance(text, str):
            raise PromptError(f"{where} has text of type {type(text).__name__}; a string is needed")
        _check_text(text, where, vision_tokens)
        return {"type": "text", "text": text}
    if kind == "image":
        images.append(_image_source(item, where))
        return {"type": "image"}
    if kind == "image_url":
        url = item.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str):
            raise PromptError(f"{where} has no URL: {{'type': 'image_url', 'image_url': {{'url': ...}}}} is needed")
        images.append(url)
        return {"type": "image"}
    if kind in ("video", "video_url"):
        raise PromptError(f"{where} is a video; video is not supported yet, give frames as images")
    raise PromptError(f"{where} has the type {kind!r}; text, image and image_url are understood")


def _image_source(item: Mapping[str, Any], where: str) -> Any:
    # Other libraries take a size limit per item here; dropping it in silence would run the image at another size.
    unknown = sorted(map(str, item.keys() - {"type", *_IMAGE_KEYS}))
    if unknown:
        raise PromptError(
            f"{where} has the key {unknown[0]!r}, which is not supported for an image "
            "(its size is bounded by the options min_pixels and max_pixels)"
        )
    given = [key for key in _IMAGE_KEYS if item.get(key) is not None]
    if len(given) != 1:
        raise PromptError(
            f"{where} gives {' and '.join(given) or 'no image'}; one of {', '.join(_IMAGE_KEYS)} is needed"
        )
    key, source = given[0], item[given[0]]
    if key != "image" and not isinstance(source, str | Path):
        raise PromptError(f"{where} has {key!r} of type {type(source).__name__}; a string is needed")
    if key == "path":
        return Path(source)
    if key == "base64":
        return f"data:;base64,{source}"
    return source


def _check_text(text: str, where: str, vision_tokens: Sequence[str]) -> None:
    for token in vision_tokens:
        if token in text:
            raise PromptError(
                f"{where}: the text holds the token {token}, which stands for an image; "
                "give images as items of their own, {'type': 'image', 'image': ...}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
