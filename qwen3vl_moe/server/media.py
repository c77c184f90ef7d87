"""Pictures and videos of strangers: what a message may point to, and how much of it.

A client writes where its media are. Here each becomes the bytes of a file, or the request is refused: so nothing that a
client has written ever reaches a place that opens paths.
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
from qwen3vl_moe.inputs.video_file import open_video_file
from qwen3vl_moe.inputs.workers import POOL, side_by_side

# Keys of an item by its type. A list of what is known, not of what is not: whatever else the library learns to read,
# from wherever, stays out of reach.
_FRAMES = ("num_frames", "min_frames", "max_frames")
_OF_VIDEO = ("fps", *_FRAMES, "min_pixels", "max_pixels", "total_pixels")
_KEYS = {
    "text": {"type", "text"},
    "image_url": {"type", "image_url"},
    "video_url": {"type", "video_url", *_OF_VIDEO},  # they may stand in the object with the URL as well
}
_SIZES = ("min_pixels", "max_pixels")
_BESIDE_URL = {"image_url": {"url", "detail", *_SIZES}, "video_url": {"url", *_OF_VIDEO}}
_REMOTE = re.compile(r"\s*https?://", re.I)


@dataclass(frozen=True)
class MediaLimits:
    """What the pictures and videos of one request may be.

    Attributes:
        images: most of them, in all messages together.
        image_bytes: most bytes of the file of each.
        image_pixels: most pixels of each, as it comes.
        max_pixels: most pixels that a request may have its pictures resized to; None: as many as it likes.
        videos: most of them, in all messages together.
        video_bytes: most bytes of the file of each.
        video_pixels: most pixels of all frames in the file of each, which is what decoding it may take.
        video_frames: most frames that are taken of each.
        usual_frames: most that the checkpoint takes where a request does not say otherwise.
        total_pixels: most pixels that a request may have all these frames of one resized to; None: as many as it likes.
        remote: whether http and https URLs are followed at all.
        access: which of them.
    """

    images: int = 64
    image_bytes: int = 20 << 20
    image_pixels: int = 64_000_000
    max_pixels: int | None = None
    videos: int = 8
    video_bytes: int = 48 << 20
    video_pixels: int = 50_000_000_000
    video_frames: int = 768
    usual_frames: int = 768
    total_pixels: int | None = None
    remote: bool = False
    access: MediaAccess = field(default_factory=lambda: MediaAccess(private_hosts=False))


@dataclass(frozen=True)
class _Asked:
    """An image or a video.

    Attributes:
        where: the item stands.
        kind: "image" or "video".
        number: among those of its kind.
        given: its URL, and what it asks for.
    """

    where: str
    kind: str
    number: int
    given: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.number}"


def with_bytes(messages: Sequence[Any], limits: MediaLimits) -> list[Any]:
    """The messages with each ``image_url`` and ``video_url`` replaced by the bytes that it stands for.

    Raises:
        PromptError: an item is neither text nor one of these, or something is not within the limits or cannot be had.
        OptionError: a video is there, and PyAV is not.
    """
    found: list[_Asked] = []
    shown: list[Any] = []
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            items = [_item(item, f"messages[{number}].content[{i}]", found) for i, item in enumerate(content)]
            message = {**message, "content": items}
        shown.append(message)
    for kind, most in (("image", limits.images), ("video", limits.videos)):
        if (count := sum(asked.kind == kind for asked in found)) > most:
            raise PromptError(f"there are {count} {kind}s; this server takes {most} in a request")
    work = {"image": _image, "video": _video}
    files = iter(side_by_side(lambda asked: work[asked.kind](asked, limits), found))
    for message in shown:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            message["content"][:] = [next(files) if item is None else item for item in message["content"]]
    return shown


def _item(item: Any, where: str, found: list[_Asked]) -> Any:
    """The item itself, or None for an image or a video, which is then the next one of ``found``."""
    if not isinstance(item, Mapping):
        raise PromptError(f"{where} is {repr(item)}; an object with a type ({', '.join(_KEYS)}) is needed")
    item = {key: value for key, value in item.items() if value is not None}
    kind = item.pop("type", None)
    if not isinstance(kind, str) or kind not in _KEYS:
        raise PromptError(f"{where} has the type {repr(kind)}; {', '.join(_KEYS)} are understood here")
    for key in item.keys() - _KEYS[kind]:
        raise PromptError(f"{where} has the key {repr(key)}; {', '.join(sorted(_KEYS[kind]))} are understood here")
    if kind == "text":
        return {"type": kind, **item}
    asked = item.pop(kind, None)
    given = {"url": asked} if isinstance(asked, str) else asked if isinstance(asked, Mapping) else {}
    given = {key: value for key, value in given.items() if value is not None}
    if not isinstance(given.get("url"), str):
        raise PromptError(f"{where} has no URL: {{'type': '{kind}', '{kind}': {{'url': ...}}}} is needed")
    for key in given.keys() - _BESIDE_URL[kind]:
        known = ", ".join(sorted(_BESIDE_URL[kind]))
        raise PromptError(f"{where}.{kind} has the key {repr(key)}; {known} are understood")
    if twice := sorted(given.keys() & item.keys()):
        raise PromptError(f"{where} gives {twice[0]!r} twice: beside {kind} and in it")
    kind = kind.removesuffix("_url")
    found.append(_Asked(where, kind, sum(other.kind == kind for other in found), {**item, **given}))
    return None


def _image(asked: _Asked, limits: MediaLimits) -> dict[str, Any]:
    """An item of the library's own, with the bytes of the file."""
    given, name = asked.given, asked.name
    for key in _SIZES:
        _check_most(asked, key, limits.max_pixels)
    data = _bytes_of(given["url"], name, limits, limits.image_bytes)
    image = open_image(data, asked.number).image
    pixels = image.width * image.height
    image.close()
    if pixels > limits.image_pixels:
        raise PromptError(
            f"{name} has {image.width}x{image.height} pixels; this server takes {limits.image_pixels} at most"
        )
    return {"type": "image", "image": data, **{key: given[key] for key in given if key != "url"}}


def _video(asked: _Asked, limits: MediaLimits) -> dict[str, Any]:
    """The same of a video. Its frames are counted, and one is decoded."""
    given, name = {**asked.given}, asked.name
    for key in _FRAMES:
        _check_most(asked, key, limits.video_frames)
    _check_most(asked, "total_pixels", limits.total_pixels)
    data = _bytes_of(given.pop("url"), name, limits, limits.video_bytes)
    video = open_video_file(data, name)
    if video.height * video.width > limits.image_pixels:
        raise PromptError(
            f"{name} is of {video.width}x{video.height} pixels; this server takes {limits.image_pixels} of an image"
        )
    if video.total * video.height * video.width > limits.video_pixels:
        raise PromptError(
            f"{name} has {video.total} frames of {video.width}x{video.height} pixels; this server takes "
            f"{limits.video_pixels} pixels in all: cut it, or make it smaller"
        )
    if "num_frames" not in given:
        given.setdefault("max_frames", min(limits.usual_frames, limits.video_frames))
    return {"type": "video", "video": data, **given}


def _check_most(asked: _Asked, key: str, most: int | None) -> None:
    value = asked.given.get(key)
    if most is not None and isinstance(value, int) and value > most:
        raise PromptError(f"{asked.where} has {key} {value}; this server's most is {most}")


def _bytes_of(url: str, name: str, limits: MediaLimits, most: int) -> bytes:
    if url[:64].lstrip()[:5].lower() == "data:":
        data = fetch(url, f"{name} (a data: URL)", MediaAccess(allow_hosts=()))
    elif not _REMOTE.match(url):
        raise PromptError(f"{name} is {repr(url)}: a data: URL is needed; no file of the server is ever read")
    elif not limits.remote:
        raise PromptError(
            f"{name} is {repr(url)}: this server fetches nothing from other hosts (--allow-remote-images); "
            "send its file as a data: URL"
        )
    else:
        with POOL.waiting():
            data = download(url.strip(), f"{name} ({repr(url)})", limits.access, most)
    if len(data) > most:
        raise PromptError(f"{name} has {len(data)} bytes; this server takes {most} at most")
    return data
