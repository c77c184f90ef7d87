"""Any source of an image -> an RGB picture, upright, 8 bits a channel.

In two steps, because a prompt has to be refused before its pixels cost memory: :func:`open_image` fetches the bytes and
reads the header, which tells the size; :func:`decode_rgb` decodes. Colours are those of transformers' ``load_image``
(Pillow's ``convert("RGB")``) for every mode that it converts faithfully, so alpha is dropped, not blended: the model
sees the colours stored under transparent pixels. Whoever wants a background pastes the image on one first.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.access import MediaAccess

MAX_FILE_BYTES = 256 * 2**20  # of an encoded image, whatever it comes from
DOWNLOAD_TIMEOUT_S = 30.0  # for a whole download, and for each wait within it

ALPHA = ("white", "drop")

_EXIF_ORIENTATION = 0x0112
# A caller may hand the same lazily opened PIL image to several threads, and Pillow's load() is not safe for that.
_CALLERS_IMAGE_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """An image whose header was read. ``where`` is what error messages call it."""

    image: Image.Image
    where: str
    callers: bool  # the caller's own PIL image, not one that was opened here

    @property
    def size_text(self) -> str:
        return f"{self.image.width}x{self.image.height}"


def check_alpha(alpha: str) -> str:
    if alpha not in ALPHA:
        raise OptionError(f"alpha is {alpha!r}; known are {', '.join(ALPHA)}")
    return alpha


def open_image(source: Any, index: int, access: MediaAccess | None = None) -> OpenedImage:
    """Fetch ``source`` and read its header; no pixel is decoded.

    Args:
        source: a path, a file://, http:// or https:// URL, a data: URL, the bytes of an image file, or a PIL image.
        index: which image of the prompt it is, for messages.

    Raises:
        PromptError: the source cannot be fetched, is no image, is empty, or is a decompression bomb: more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    where = f"image {index} ({describe(source)})"
    if isinstance(source, Image.Image):
        image = source
    else:
        data = _read(source, where)
        if not data:
            raise PromptError(f"{where} is empty: 0 bytes")
        try:
            image = Image.open(BytesIO(data))
        except UnidentifiedImageError:
            raise PromptError(f"{where} is not an image that Pillow can read: it begins with {data[:12]!r}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise PromptError(f"{where} {_bomb_text()}") from None
        except Exception as error:  # Pillow's readers raise many types on damaged headers
            raise PromptError(f"{where} has a damaged header: {error}") from error
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise PromptError(f"{where} is {image.width}x{image.height} pixels and {_bomb_text()}")
    if image.width == 0 or image.height == 0:
        raise PromptError(f"{where} is {image.width}x{image.height} pixels: it has no area")
    return OpenedImage(image, where, callers=image is source)


def decode_rgb(opened: OpenedImage, alpha: str = "white") -> Image.Image:
    """Decode, turn upright (EXIF orientation) and convert to RGB; of an animation, the current (first) frame.

    Raises:
        PromptError: the data is damaged or ends early, or the mode has no defined conversion to 8-bit RGB.
    """
    try:
        if opened.callers:
            with _CALLERS_IMAGE_LOCK:
                opened.image.load()
                orientation = opened.image.getexif().get(_EXIF_ORIENTATION, 1)
        else:
            opened.image.load()
            orientation = opened.image.getexif().get(_EXIF_ORIENTATION, 1)
        # Only where needed: exif_transpose copies upright images too.
        image = opened.image if orientation == 1 else ImageOps.exif_transpose(opened.image)
        return _to_rgb(image, opened)
    except PromptError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise PromptError(f"{opened.where} cannot be decoded, the file is damaged or truncated: {error}") from error


def describe(source: Any) -> str:
    """A short name of an image source for messages: data URLs and raw bytes are not printed whole."""
    if isinstance(source, Image.Image):
        return f"PIL {source.mode} {source.width}x{source.height}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-10:]}")
    return type(source).__name__


def _to_rgb(image: Image.Image, opened: OpenedImage) -> Image.Image:
    if image.mode == "RGB":
        return image
    # Pillow's convert("RGB") clips what is above 255, which turns nearly every 16-bit picture white: scale instead.
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.image.format in ("PPM", "PNG")):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # Pillow reads these modes in units of 8 bits, but nothing in the image says so: refuse what would be clipped.
        low, high = (float(value) for value in np.asarray(image.getextrema()).ravel())  # of the one band
        if low < 0 or high > 255 or (image.mode == "F" and 0 < high <= 1):
            raise PromptError(
                f"{opened.where} has mode {image.mode} with values from {low:g} to {high:g}; what is white there is "
                "not defined: scale it to 0..255 and convert it to mode L or RGB first"
            )
    return image.convert("RGB")


def _bomb_text() -> str:
    return (
        f"would decode to more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against decompression bombs; "
        "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    )


def _read(source: Any, where: str) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return _limited(bytes(source), where)
    if isinstance(source, os.PathLike):
        return _read_file(Path(source), where)
    if not isinstance(source, str):
        raise PromptError(
            f"{where} is of a type that is not understood: give a path, a URL, the bytes of an image file or a PIL "
            "image (PIL.Image.fromarray makes one of an array)"
        )
    if not source:
        raise PromptError(f"{where} is an empty string: a path or a URL is needed")
    scheme = source[:8].lower()
    if scheme.startswith("data:"):
        return _limited(_decode_data_url(source, where), where)
    if scheme.startswith(("http://", "https://")):
        return _download(source, where)
    if scheme.startswith("file:"):
        parts = urllib.parse.urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise PromptError(f"{where} names the host {parts.netloc!r}; a file URL is file:///absolute/path")
        return _read_file(Path(urllib.request.url2pathname(parts.path)), where)
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", source):
        raise PromptError(f"{where} has the scheme {match[1]!r}; file, http, https and data are supported")
    return _read_file(Path(source), where)


def _read_file(path: Path, where: str) -> bytes:
    try:
        if not path.exists():
            raise PromptError(f"{where}: there is no such file")
        if not path.is_file():
            raise PromptError(f"{where} is not a regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _too_large(where)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, PromptError):
            raise
        # Not the whole OSError: it repeats the path, which may be a base64 string of megabytes.
        raise PromptError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _decode_data_url(url: str, where: str) -> bytes:
    header, comma, payload = url[len("data:") :].partition(",")
    if not comma:
        raise PromptError(f"{where} has no comma: a data URL is data:image/png;base64,<data>")
    data = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise PromptError(f"{where} is not valid base64: {error}") from None


def _download(url: str, where: str) -> bytes:
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    try:
        # People paste URLs with spaces and accents, which HTTP does not carry as they are.
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(quoted, headers={"User-Agent": "qwen3vl-moe"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
            data = bytearray()
            # read1 returns what has arrived, so that a server that drips bytes meets the deadline too.
            while chunk := response.read1(1 << 20):
                data += chunk
                if len(data) > MAX_FILE_BYTES:
                    raise _too_large(where)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {DOWNLOAD_TIMEOUT_S:g} seconds")
            if response.length:
                raise PromptError(f"{where}: the server closed the connection {response.length} bytes early")
            return bytes(data)
    except urllib.error.HTTPError as error:
        raise PromptError(f"{where} cannot be downloaded: HTTP status {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise PromptError(f"{where} cannot be downloaded: {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"{where} cannot be downloaded: {error or type(error).__name__}") from None


def _limited(data: bytes, where: str) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise _too_large(where)
    return data


def _too_large(where: str) -> PromptError:
    return PromptError(f"{where} is larger than {MAX_FILE_BYTES // 2**20} MiB, the limit of one encoded image")
