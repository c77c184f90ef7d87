"""Chat messages in the content form of OpenAI and transformers -> what a chat template renders, and the images.

The template only says where an image goes; the image itself is taken out here. Everything that a template would skip in
silence (a misspelt key, a picture under a key of another library, a video, an image without a source) is refused
instead, naming the message, the item and the key. A key whose value is None is a key that is not given: that is how
tables with columns for every key are written.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr  # short, and never fails
from typing import Any

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.images import SIZE_KEYS, ImageSize

ROLES = ("system", "user", "assistant", "tool")

# Types of items, with the keys under which each may hold its text or its image: OpenAI's two, those of its Responses
# form, and the "image" of transformers and qwen-vl-utils.
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
}
_BESIDE_IMAGE = ("detail", *SIZE_KEYS)
# Media that the model cannot see, so that the refusal can say more than "unknown".
_VIDEO = "a video; video is not supported yet, give frames as images"
_UNSUPPORTED = {
    **dict.fromkeys(("video", "video_url", "input_video"), _VIDEO),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio; the model takes text and images"),
    **dict.fromkeys(("file", "input_file"), "a file; give its text or its pages as images"),
}
# Keys that hold media in other libraries' messages: refused even if a template happens to ask for such a name.
_MEDIA_KEYS = {*_IMAGE_TYPES["image"], *_UNSUPPORTED, "images", "image_urls", "videos", "audios", "files", "file_id"}
_MOST_NESTED = 50  # of tool calls and schemas
_ALIASES = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}


@dataclass(frozen=True)
class ImageRequest:
    """An image as it was asked for: its source (see :func:`.image_source.open_image`), and its own size or None."""

    source: Any
    size: ImageSize | None = None


def split_images(
    messages: Sequence[Mapping[str, Any]], vision_tokens: Sequence[str], read_by_template: Container[str] = ()
) -> tuple[list[dict], list[ImageRequest]]:
    """Check ``messages`` and take the images out.

    Args:
        messages: ``{"role": ..., "content": str | list of items}``. Items are ``{"type": "text", "text": str}``,
            ``{"type": "image", "image": source}`` (or "url", "path", "base64" for "image", as in transformers) and
            OpenAI's ``{"type": "image_url", "image_url": {"url": str}}``; the Responses form's ``input_text`` and
            ``input_image`` are understood too, and ``{"text": ...}`` or ``{"image": ...}`` without a type. Beside an
            image, or in the object with its URL, there may be its size (:class:`.images.ImageSize`) and OpenAI's
            ``detail``, "auto" or "high": an image is always seen in full up to its max_pixels.
        vision_tokens: tokens that text must not spell. Text that holds an image placeholder would pair images with the
            wrong places, so it is refused rather than counted.
        read_by_template: names that the chat template reads. Other keys of a message are passed on if they are among
            them (tool_calls, name, reasoning_content, ...), and refused if they are not.

    Returns:
        the messages with every image as ``{"type": "image"}``, and the images in order of appearance.

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
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise PromptError(f"{where} has the role {repr(role)}; known are {', '.join(ROLES)}")
        others = _other_keys(message, where, vision_tokens, read_by_template)
        if content is None and others.get("tool_calls"):
            content = ""
        if isinstance(content, str):
            _check_text(content, where, vision_tokens)
        elif isinstance(content, list | tuple):
            content = [
                _split_item(item, f"{where}.content[{index}]", vision_tokens, images)
                for index, item in enumerate(content)
            ]
        else:
            raise PromptError(f"{where} has content of type {type(content).__name__}; a string or a list is needed")
        plain.append({"role": role, "content": content, **others})
    return plain, images


def plain_json(value: Any, where: str, vision_tokens: Sequence[str], depth: int = 0) -> Any:
    """A copy of ``value`` made of JSON's types alone, so that a template can neither change nor run anything of it.

    Raises:
        PromptError: it holds something else, is nested too deep, or holds a text that spells a vision token.
    """
    if isinstance(value, str):
        _check_text(value, where, vision_tokens)
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth == _MOST_NESTED:
        raise PromptError(f"{where} is nested more than {_MOST_NESTED} deep")
    if isinstance(value, Mapping):
        return {str(k): plain_json(v, f"{where}.{k}", vision_tokens, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(v, f"{where}[{i}]", vision_tokens, depth + 1) for i, v in enumerate(value)]
    raise PromptError(f"{where} is of type {type(value).__name__}; text, numbers, lists and dicts are passed on")


def _other_keys(
    message: Mapping[str, Any], where: str, vision_tokens: Sequence[str], read_by_template: Container[str]
) -> dict[str, Any]:
    """What a message holds beside role and content, for the template."""
    others = {}
    for key, value in message.items():
        if key in ("role", "content") or value is None:
            continue
        if isinstance(value, str | list | tuple | Mapping) and not value:
            continue  # OpenAI's answers carry empty lists of tool_calls and annotations
        name = key if key in read_by_template else _ALIASES.get(key, key)
        if key in _MEDIA_KEYS:
            raise PromptError(
                f"{where} has the key {repr(key)}: images are items of the content, "
                "[{'type': 'image', 'image': ...}, {'type': 'text', 'text': ...}]; other media are not supported"
            )
        if name not in read_by_template:
            raise PromptError(f"{where} has the key {repr(key)}, which the chat template does not read; leave it out")
        others[name] = plain_json(value, f"{where}.{key}", vision_tokens)
    return others


def _split_item(item: Any, where: str, vision_tokens: Sequence[str], images: list[ImageRequest]) -> dict:
    if not isinstance(item, Mapping):
        raise PromptError(f"{where} is {repr(item)}; a dict with a type (text, image, image_url) is needed")
    item = {key: value for key, value in item.items() if value is not None}
    kind = item.pop("type", None)
    if kind is None:  # as in qwen-vl-utils, the one key of an item says what it is
        named = [key for key in ("text", "image", "image_url") if key in item]
        kind = named[0] if len(named) == 1 else None
    if not isinstance(kind, str):
        raise PromptError(f"{where} has no type; {{'type': 'text', ...}} or {{'type': 'image', ...}} is needed")
    if kind in _TEXT_TYPES:
        _check_keys(item, ("text",), f"{where} is a text and", "an image is an item of its own")
        text = item.get("text")
        if not isinstance(text, str):
            raise PromptError(f"{where} has text of type {type(text).__name__}; a string is needed")
        _check_text(text, where, vision_tokens)
        return {"type": "text", "text": text}
    if kind in _IMAGE_TYPES:
        images.append(_image_request(item, where, _IMAGE_TYPES[kind]))
        return {"type": "image"}
    if kind in _UNSUPPORTED:
        raise PromptError(f"{where} is {_UNSUPPORTED[kind]}")
    raise PromptError(f"{where} has the type {repr(kind)}; text, image and image_url are understood")


def _image_request(item: Mapping[str, Any], where: str, source_keys: Sequence[str]) -> ImageRequest:
    _check_keys(item, (*source_keys, *_BESIDE_IMAGE), where)
    given = [key for key in source_keys if key in item]
    if len(given) != 1:
        raise PromptError(
            f"{where} gives {' and '.join(given) or 'no image'}; one of {', '.join(source_keys)} is needed"
        )
    key, source = given[0], item[given[0]]
    options = {name: item[name] for name in _BESIDE_IMAGE if name in item}
    if key == "image_url" and isinstance(source, Mapping):
        inner = {name: value for name, value in source.items() if value is not None}
        _check_keys(inner, ("url", *_BESIDE_IMAGE), f"{where}.image_url")
        source = inner.pop("url", None)
        if twice := sorted(inner.keys() & options.keys()):
            raise PromptError(f"{where} gives {twice[0]!r} twice: beside image_url and in it")
        options |= inner
    if key == "image_url" and not isinstance(source, str):
        raise PromptError(f"{where} has no URL: {{'type': 'image_url', 'image_url': {{'url': ...}}}} is needed")
    if key not in ("image", "image_url") and not isinstance(source, str | Path):
        raise PromptError(f"{where} has {repr(key)} of type {type(source).__name__}; a string is needed")
    detail = options.pop("detail", "auto")
    if not isinstance(detail, str) or detail not in ("auto", "high"):
        raise PromptError(
            f"{where} has the detail {repr(detail)}; auto and high are known, max_pixels makes an image small"
        )
    if key == "path":
        source = Path(source)
    elif key == "base64" and str(source)[:5].lower() != "data:":
        source = f"data:;base64,{source}"
    return ImageRequest(source, ImageSize.of(options, where))


def _check_keys(item: Mapping[str, Any], known: Sequence[str], where: str, hint: str = "") -> None:
    for key in item:
        if key not in known:
            raise PromptError(
                f"{where} has the key {repr(key)}; {', '.join(known)} are understood" + (f", {hint}" if hint else "")
            )


def _check_text(text: str, where: str, vision_tokens: Sequence[str]) -> None:
    for token in vision_tokens:
        if token in text:
            raise PromptError(
                f"{where}: the text holds the token {token}, which stands for an image; "
                "give images as items of their own, {'type': 'image', 'image': ...}"
            )
