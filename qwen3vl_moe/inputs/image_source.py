"""Any source of an image -> an RGB picture, upright, 8 bits a channel.

In two steps, because a prompt has to be refused before its pixels cost memory: :func:`open_image` fetches the bytes and
reads the header, which tells the size; :func:`decode_rgb` decodes. Colours are those of transformers' ``load_image``
(Pillow's ``convert("RGB")``) for every mode that it converts faithfully. What is transparent is put on white, as Qwen's
own utilities and vLLM do; with ``alpha="drop"`` the model sees the colours stored under transparent pixels, as in
transformers, which are black as a rule.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.inputs.fetch import fetch
from qwen3vl_moe.inputs.file_kinds import kind_of, readable_formats
from qwen3vl_moe.inputs.workers import Budget

ALPHA = ("white", "drop")  # what may become of transparency

# Of one picture: 0.7 GB as Pillow keeps it, 4 bytes a pixel. transformers takes as many.
MAX_PIXELS = 178_956_970
# A picture while it is decoded: its pixels as stored, as RGB, and read out or split into channels.
_BYTES_PER_PIXEL = 12
# Of all pictures and videos that are being decoded, in bytes.
DECODING = Budget(2**31)

_EXIF_ORIENTATION = 0x0112
_QUARTER_TURNS = range(5, 9)
# A caller may hand the same lazily opened PIL image to several threads, and Pillow's load() is not safe for that.
_CALLERS_IMAGE_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """An image whose header was read.

    Attributes:
        where: what error messages call it.
        digest: SHA-256 of its file; None: it is the caller's own PIL image, not one that was opened here.
    """

    image: Image.Image
    where: str
    digest: bytes | None

    @property
    def callers(self) -> bool:
        return self.digest is None

    @property
    def size_text(self) -> str:
        return f"{self.image.width}x{self.image.height}"

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width once it is turned as it asks to be."""
        width, height = self.image.size
        turned = self.image.getexif().get(_EXIF_ORIENTATION, 1) in _QUARTER_TURNS
        return (width, height) if turned else (height, width)


def check_alpha(alpha: str) -> str:
    """``alpha`` itself, if it is known.

    Raises:
        OptionError: it is not.
    """
    if alpha not in ALPHA:
        raise OptionError(f"alpha is {alpha!r}; known are {', '.join(ALPHA)}")
    return alpha


def open_image(source: Any, index: int, access: MediaAccess | None = None, kind: str = "image") -> OpenedImage:
    """Fetch ``source`` and read its header; no pixel is decoded.

    Args:
        source: a path, a file://, http:// or https:// URL, a data: URL, base64, the bytes of an image file, or a PIL
            image.
        index, kind: which image of the prompt it is, and what to call it, for messages.
        access: limits on paths and URLs; None: no limits.

    Raises:
        PromptError: the source cannot be fetched, is no image, is empty, or has more than :data:`MAX_PIXELS` pixels.
    """
    where = f"{kind} {index} ({describe(source)})"
    if isinstance(source, Image.Image):
        image, digest = source, None
    else:
        data = fetch(source, where, access or MediaAccess())
        image, digest = _read_header(data, where), hashlib.sha256(data).digest()
        if image.width * image.height > MAX_PIXELS:
            raise _too_many_pixels(f"{where} is {image.width}x{image.height} pixels", MAX_PIXELS)
    if image.width == 0 or image.height == 0:
        raise PromptError(f"{where} is {image.width}x{image.height} pixels: it has no area")
    return OpenedImage(image, where, digest)


@contextmanager
def decoded(opened: OpenedImage, alpha: str = "white") -> Iterator[Image.Image]:
    """:func:`decode_rgb`, for as long as the block runs. Then the pixels are let go.

    The pixels that all threads hold at a time are bounded together, so this waits for others to end their blocks.
    """
    with DECODING.hold(opened.image.width * opened.image.height * _BYTES_PER_PIXEL):
        try:
            yield decode_rgb(opened, alpha)
        finally:
            if not opened.callers:
                opened.image.close()


def decode_rgb(opened: OpenedImage, alpha: str = "white") -> Image.Image:
    """Decode, turn upright (EXIF orientation) and convert to RGB; of an animation, the current (first) frame.

    Args:
        alpha: "white": what is transparent is put on white; "drop": the colours are taken as they are stored.

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
        rgb = _to_rgb(image, opened)
        mask = _opacity(image) if alpha == "white" else None
        if mask is None:
            return rgb
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=mask)
        return white
    except PromptError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged data
        raise PromptError(f"{opened.where} cannot be decoded: {_damage(error)}") from error


def describe(source: Any) -> str:
    """A short name of a source for messages: data URLs and raw bytes are not printed whole."""
    if isinstance(source, Image.Image):
        return f"PIL {source.mode} {source.width}x{source.height}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        try:
            text = os.fsdecode(source)
        except Exception:  # a path of the caller's own class
            return type(source).__name__
        return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-10:]}")
    if isinstance(source, list | tuple):
        return f"{len(source)} frames"
    return type(source).__name__


def _read_header(data: bytes, where: str) -> Image.Image:
    if not data:
        raise PromptError(f"{where} is empty: 0 bytes")
    try:
        return Image.open(BytesIO(data), formats=readable_formats())
    except UnidentifiedImageError:
        kind, known = kind_of(data), ", ".join(readable_formats())
        raise PromptError(
            f"{where} is not an image that can be read" + (f": it begins like {kind}" if kind else f"; {known} are")
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # beyond what Pillow itself would open
        raise _too_many_pixels(f"{where} is larger", 2 * (Image.MAX_IMAGE_PIXELS or 0)) from None
    except Exception as error:  # Pillow's readers raise many types on damaged headers
        raise PromptError(f"{where} has a damaged header: {_damage(error)}") from error


def _too_many_pixels(subject: str, limit: int) -> PromptError:
    return PromptError(f"{subject}; the limit is {limit} pixels, {limit * 4 / 1e9:.1f} GB of memory: shrink it first")


def _damage(error: Exception) -> str:
    # Not Pillow's own words: some of them quote the file.
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return "the file ends early"
    return f"the file is damaged ({type(error).__name__})"


def _to_rgb(image: Image.Image, opened: OpenedImage) -> Image.Image:
    """The colours alone, as they are stored."""
    if image.mode == "RGB":
        return image
    # Pillow's convert("RGB") clips what is above 255, which turns nearly every 16-bit picture white: scale instead.
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.image.format in ("PPM", "PNG")):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # Pillow reads these modes in units of 8 bits, but nothing in the image says so: refuse what would be clipped.
        pixels = np.asarray(image)  # not getextrema, which may pass over a NaN
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 255 or (image.mode == "F" and 0 < high <= 1):
            raise PromptError(
                f"{opened.where} has mode {image.mode} with values from {low:g} to {high:g}; what is white there is "
                "not defined: scale it to 0..255 and convert it to mode L or RGB first"
            )
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def _opacity(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, mode L; None for an image that has no transparency."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return image.getchannel(image.getbands()[-1])
    if not image.has_transparency_data:
        return None
    if image.mode == "P":
        return image.convert("RGBA").getchannel("A")
    if image.mode not in ("1", "L", "RGB", "I") and not image.mode.startswith("I;16"):
        return None  # Pillow has no transparency for the others
    # One colour stands for transparent: a number, or three.
    key = np.asarray(image.info["transparency"], np.int64)
    if image.mode == "RGB" and key.max() > 255:
        key >>= 8  # of a file with 16 bits a channel, of which Pillow keeps the upper half
    same = np.asarray(image) == (key > 0 if image.mode == "1" else key)
    return Image.fromarray(np.where(same.all(-1) if image.mode == "RGB" else same, 0, 255).astype(np.uint8))
