"""Pictures of strangers: what a message may point to, and how much of it.

A client writes where its pictures are. Here each becomes the bytes of a file, or the request is refused: so nothing
that a client has written ever reaches a place that opens paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr  # short, and never fails
from typing import Any

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.inputs.download import download
from qwen3vl_moe.inputs.fetch import fetch
from qwen3vl_moe.inputs.image_source import open_image
from qwen3vl_moe.inputs.workers import POOL, side_by_side

# Keys of an item by its type. A list of what is known, not of what is not: whatever else the library learns to read,
# from wherever, stays out of reach.
_KEYS = {"text": {"type", "text"}, "image_url": {"type", "image_url"}}
_SIZES = ("min_pixels", "max_pixels")
_BESIDE_URL = {"url", "detail", *_SIZES}
_REMOTE = re.compile(r"\s*https?://", re.I)


@dataclass(frozen=True)
class MediaLimits:
    """What the pictures of one request may be.

    Attributes:
        images: most of them, in all messages together.
        image_bytes: most bytes of the file of each.
        image_pixels: most pixels of each, as it comes.
        max_pixels: most pixels that a request may have its pictures resized to; None: as many as it likes.
        remote: whether http and https URLs are followed at all.
        access: which of them.
    """

    images: int = 64
    image_bytes: int = 20 << 20
    image_pixels: int = 64_000_000
    max_pixels: int | None = None
    remote: bool = False
    access: MediaAccess = field(default_factory=lambda: MediaAccess(private_hosts=False))


def with_bytes(messages: Sequence[Any], limits: MediaLimits) -> list[Any]:
    """The messages with each ``image_url`` replaced by the bytes that it stands for.

    Raises:
        PromptError: an item is neither text nor image_url, or a picture is not within the limits or cannot be had.
    """
    found: list[tuple[str, Any]] = []  # where it stands, and what it says
    shown: list[Any] = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            items = [_item(item, f"messages[{number}].content[{i}]", found) for i, item in enumerate(content)]
            message = {**message, "content": items}
        shown.append(message)
    if len(found) > limits.images:
        raise PromptError(f"there are {len(found)} images; this server takes {limits.images} in a request")
    files = iter(side_by_side(lambda n: _image(n, *found[n], limits), range(len(found))))
    for message in shown:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            message["content"][:] = [next(files) if item is None else item for item in message["content"]]
    return shown


def _item(item: Any, where: str, found: list[tuple[str, Any]]) -> Any:
    """The item itself, or None for an image, which is then the next one of ``found``."""
    if not isinstance(item, Mapping):
        raise PromptError(f"{where} is {repr(item)}; an object with a type (text, image_url) is needed")
    item = {key: value for key, value in item.items() if value is not None}
    kind = item.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise PromptError(f"{where} has the type {repr(kind)}; text and image_url are understood here")
    for key in item.keys() - _KEYS[kind]:
        raise PromptError(f"{where} has the key {repr(key)}; {' and '.join(sorted(_KEYS[kind]))} are understood here")
    if kind == "text":
        return item
    asked = item.get("image_url")
    found.append((where, {"url": asked} if isinstance(asked, str) else asked))
    return None


def _image(number: int, where: str, asked: Any, limits: MediaLimits) -> dict[str, Any]:
    """An item of the library's own, with the bytes of the file."""
    given = {k: v for k, v in asked.items() if v is not None} if isinstance(asked, Mapping) else {}
    if not isinstance(given.get("url"), str):
        raise PromptError(f"{where} has no URL: {{'type': 'image_url', 'image_url': {{'url': ...}}}} is needed")
    for key in given.keys() - _BESIDE_URL:
        raise PromptError(f"{where}.image_url has the key {repr(key)}; {', '.join(sorted(_BESIDE_URL))} are understood")
    for key in _SIZES:
        size = given.get(key)
        if limits.max_pixels is not None and isinstance(size, int) and size > limits.max_pixels:
            raise PromptError(f"{where} has {key} {size}; this server's most is {limits.max_pixels}")
    data, name = _bytes_of(given["url"], number, limits), f"image {number}"
    if len(data) > limits.image_bytes:
        raise PromptError(f"{name} has {len(data)} bytes; this server takes {limits.image_bytes} at most")
    image = open_image(data, number).image
    pixels = image.width * image.height
    image.close()
    if pixels > limits.image_pixels:
        raise PromptError(
            f"{name} has {image.width}x{image.height} pixels; this server takes {limits.image_pixels} at most"
        )
    return {"type": "image", "image": data, **{key: given[key] for key in given if key != "url"}}


def _bytes_of(url: str, number: int, limits: MediaLimits) -> bytes:
    if url[:64].lstrip()[:5].lower() == "data:":
        return fetch(url, f"image {number} (a data: URL)", MediaAccess(allow_hosts=()))
    if not _REMOTE.match(url):
        raise PromptError(f"image {number} is {repr(url)}: a data: URL is needed; no file of the server is ever read")
    if not limits.remote:
        raise PromptError(
            f"image {number} is {repr(url)}: this server fetches nothing from other hosts (--allow-remote-images); "
            "send the picture as a data: URL"
        )
    with POOL.waiting():
        return download(url.strip(), f"image {number} ({repr(url)})", limits.access, limits.image_bytes)
