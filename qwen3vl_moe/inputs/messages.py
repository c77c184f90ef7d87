"""Chat messages in the content form of OpenAI and transformers -> what a chat template renders, the images and videos.

The template only says where an image goes; the image itself is taken out here. Everything that a template would skip in
silence (a misspelt key, a picture under a key of another library, a sound, an image without a source) is refused
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
from qwen3vl_moe.inputs.video import VIDEO_KEYS, VideoOptions

ROLES = ("system", "user", "assistant", "tool")

# Types of items, with the keys under which each may hold its text or its image: OpenAI's two, those of its Responses
# form, and the "image" and "video" of transformers and qwen-vl-utils.
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
}
_VIDEO_TYPES = {
    "video": ("video", "video_url", "url", "path", "base64"),
    "video_url": ("video_url",),
    "input_video": ("video_url",),
}
_BESIDE_IMAGE = ("detail", *SIZE_KEYS)
# Media that the model cannot see, so that the refusal can say more than "unknown".
_UNSUPPORTED = {
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio; the model takes text, images and videos"),
    **dict.fromkeys(("file", "input_file"), "a file; give its text or its pages as images"),
}
# Keys that hold media in other libraries' messages: refused even if a template happens to ask for such a name.
_MEDIA_KEYS = {
    *_IMAGE_TYPES["image"],
    *_VIDEO_TYPES,
    *_UNSUPPORTED,
    "images",
    "image_urls",
    "videos",
    "audios",
    "files",
    "file_id",
}
_MOST_NESTED = 50  # of tool calls and schemas
_ALIASES = {"reasoning": "reasoning_content", "thinking": "reasoning_content"}


@dataclass(frozen=True)
class ImageRequest:
    """An image as it was asked for: its source (see :func:`.image_source.open_image`), and its own size or None."""

    source: Any
    size: ImageSize | None = None


@dataclass(frozen=True)
class VideoRequest:
    """A video as it was asked for: a source as an image's, a list of such, or an array; and what it asks for."""

    source: Any
    options: VideoOptions


MediaRequest = ImageRequest | VideoRequest


def split_media(
    messages: Sequence[Mapping[str, Any]], vision_tokens: Sequence[str], read_by_template: Container[str] = ()
) -> tuple[list[dict], list[MediaRequest]]:
    """Check ``messages`` and take the images and videos out.

    Args:
        messages: ``{"role": ..., "content": str | list of items}``. Items are ``{"type": "text", "text": str}``,
            ``{"type": "image", "image": source}`` (or "url", "path", "base64" for "image", as in transformers) and
            OpenAI's ``{"type": "image_url", "image_url": {"url": str}}``; the Responses form's ``input_text`` and
            ``input_image`` are understood too, and ``{"text": ...}`` or ``{"image": ...}`` without a type. Beside an
            image, or in the object with its URL, there may be its size (:class:`.images.ImageSize`) and OpenAI's
            ``detail``, "auto" or "high": an image is always seen in full up to its max_pixels. A video is given alike,
            as ``video`` or ``video_url``, or as a list of frames, with what it asks for (:class:`.video.VideoOptions`).
        vision_tokens: tokens that text must not spell. Text that holds an image placeholder would pair images with the
            wrong places, so it is refused rather than counted.
        read_by_template: names that the chat template reads. Other keys of a message are passed on if they are among
            them (tool_calls, name, reasoning_content, ...), and refused if they are not.

    Returns:
        the messages with every image as ``{"type": "image"}`` and video as ``{"type": "video"}``; and these in order of
        appearance.

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
    plain: list[dict] = []
    media: list[MediaRequest] = []
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
                _split_item(item, f"{where}.content[{index}]", vision_tokens, media)
                for index, item in enumerate(content)
            ]
        else:
            raise PromptError(f"{where} has content of type {type(content).__name__}; a string or a list is needed")
        plain.append({"role": role, "content": content, **others})
    return plain, media


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
                f"{where} has the key {repr(key)}: images and videos are items of the content, "
                "[{'type': 'image', 'image': ...}, {'type': 'text', 'text': ...}]; other media are not supported"
            )
        if name not in read_by_template:
            raise PromptError(f"{where} has the key {repr(key)}, which the chat template does not read; leave it out")
        others[name] = plain_json(value, f"{where}.{key}", vision_tokens)
    return others


def _split_item(item: Any, where: str, vision_tokens: Sequence[str], media: list[MediaRequest]) -> dict:
    if not isinstance(item, Mapping):
        raise PromptError(f"{where} is {repr(item)}; a dict with a type (text, image, video) is needed")
    item = {key: value for key, value in item.items() if value is not None}
    kind = item.pop("type", None)
    if kind is None:  # as in qwen-vl-utils, the one key of an item says what it is
        named = [key for key in ("text", "image", "image_url", "video", "video_url") if key in item]
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
        media.append(_image_request(item, where, _IMAGE_TYPES[kind]))
        return {"type": "image"}
    if kind in _VIDEO_TYPES:
        source, options = _source(item, where, _VIDEO_TYPES[kind], "video", VIDEO_KEYS)
        media.append(VideoRequest(source, VideoOptions.of(options, where)))
        return {"type": "video"}
    if kind in _UNSUPPORTED:
        raise PromptError(f"{where} is {_UNSUPPORTED[kind]}")
    raise PromptError(f"{where} has the type {repr(kind)}; text, image, image_url, video and video_url are known")


def _image_request(item: Mapping[str, Any], where: str, source_keys: Sequence[str]) -> ImageRequest:
    source, options = _source(item, where, source_keys, "image", _BESIDE_IMAGE)
    detail = options.pop("detail", "auto")
    if not isinstance(detail, str) or detail not in ("auto", "high"):
        raise PromptError(
            f"{where} has the detail {repr(detail)}; auto and high are known, max_pixels makes an image small"
        )
    return ImageRequest(source, ImageSize.of(options, where))


def _source(
    item: Mapping[str, Any], where: str, source_keys: Sequence[str], kind: str, beside: Sequence[str]
) -> tuple[Any, dict[str, Any]]:
    """The source of an image or a video, and the options beside it."""
    _check_keys(item, (*source_keys, *beside), where)
    given, url = [key for key in source_keys if key in item], f"{kind}_url"
    if len(given) != 1:
        raise PromptError(
            f"{where} gives {' and '.join(given) or f'no {kind}'}; one of {', '.join(source_keys)} is needed"
        )
    key, source = given[0], item[given[0]]
    options = {name: item[name] for name in beside if name in item}
    if key == url and isinstance(source, Mapping):
        inner = {name: value for name, value in source.items() if value is not None}
        _check_keys(inner, ("url", *beside), f"{where}.{url}")
        source = inner.pop("url", None)
        if twice := sorted(inner.keys() & options.keys()):
            raise PromptError(f"{where} gives {twice[0]!r} twice: beside {url} and in it")
        options |= inner
    if key == url and not isinstance(source, str):
        raise PromptError(f"{where} has no URL: {{'type': '{url}', '{url}': {{'url': ...}}}} is needed")
    if key not in (kind, url) and not isinstance(source, str | Path):
        raise PromptError(f"{where} has {repr(key)} of type {type(source).__name__}; a string is needed")
    if key == "path":
        source = Path(source)
    elif key == "base64" and str(source)[:5].lower() != "data:":
        source = f"data:;base64,{source}"
    return source, options


def _check_keys(item: Mapping[str, Any], known: Sequence[str], where: str, hint: str = "") -> None:
    for key in item:
        if key not in known:
            are = "are" if len(known) > 1 else "is"
            raise PromptError(
                f"{where} has the key {repr(key)}; {', '.join(known)} {are} understood" + (f", {hint}" if hint else "")
            )


def _check_text(text: str, where: str, vision_tokens: Sequence[str]) -> None:
    for token in vision_tokens:
        if token in text:
            raise PromptError(
                f"{where}: the text holds the token {token}, which stands for an image or a "
                "video; give these as items of their own, {'type': 'image', 'image': ...}"
            )
