"""Requests to time: images and videos as encoded bytes, random text, lengths drawn as in sglang's bench_serving."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from qwen3vl_moe.errors import OptionError

CONTENTS = ("drawn", "random", "blank")
FORMATS = ("jpeg", "png")
_PRESETS = {"4k": (2160, 3840), "1080p": (1080, 1920), "720p": (720, 1280), "360p": (360, 640)}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class TimedRequest:
    """A conversation of one turn, and how many tokens it asks for."""

    messages: list[dict[str, Any]]
    output_len: int


def parse_resolution(text: str) -> tuple[int, int]:
    """(height, width) of ``"560x560"`` (height first, as in bench_serving) or ``4k``, ``1080p``, ``720p``, ``360p``.

    Raises:
        OptionError: anything else.
    """
    if text.strip().lower() in _PRESETS:
        return _PRESETS[text.strip().lower()]
    parts = text.strip().lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(
            f"image resolution {text!r} is not HEIGHTxWIDTH such as 560x560, nor one of {', '.join(_PRESETS)}"
        )
    return int(parts[0]), int(parts[1])


def random_lengths(full: int, ratio: float, count: int, rng: np.random.Generator) -> list[int]:
    """Lengths drawn uniformly from ``max(1, int(full * ratio))`` to ``full``, as bench_serving draws them."""
    return rng.integers(max(int(full * ratio), 1), full + 1, count).tolist()


def plain_token_ids(tokenizer: Any, count: int, rng: np.random.Generator) -> list[int]:
    """Random tokens of printable ASCII, none of the special ones among them.

    Their text gives about as many tokens again: where two of them meet, the tokenizer may join them.
    """
    plain = _plain_ids(tokenizer)
    return [plain[i] for i in rng.integers(0, len(plain), count)]


@functools.lru_cache(maxsize=1)
def _plain_ids(tokenizer: Any) -> list[int]:
    candidates = range(min(len(tokenizer), 5000))
    texts = tokenizer.batch_decode([[i] for i in candidates])
    return [i for i, text in zip(candidates, texts, strict=True) if _is_plain(text)]


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and not text.startswith("<|")


class Images:
    """Where the images of requests come from.

    Args:
        directory: image files, used as they are, in the order of their names and again from the first; None: made up.
        content: what made-up images show: ``"drawn"`` shapes, ``"random"`` pixels, ``"blank"`` white.
        file_format: ``"jpeg"`` or ``"png"``.
        count: images a request needs.
        video_frames: requests have videos instead, of which so many frames are taken, two of each second; 0: images.

    Raises:
        OptionError: an unknown name, or a directory with fewer images than a request needs.
    """

    def __init__(self, directory: Path | None, content: str, file_format: str, count: int, video_frames: int = 0):
        for name, value, known in (("content", content, CONTENTS), ("format", file_format, FORMATS)):
            if value not in known:
                raise OptionError(f"image {name} {value!r} is unknown; choose from {', '.join(known)}")
        self.content, self.file_format, self.count, self.video_frames = content, file_format, count, video_frames
        self.files: list[bytes] = []
        self.names: list[str] = []
        if directory is not None:
            self._read(directory)
        self._next = 0

    def _read(self, directory: Path) -> None:
        if not directory.is_dir():
            raise OptionError(f"--images {directory} is not a directory")
        paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in _SUFFIXES)
        if len(paths) < max(1, self.count):
            raise OptionError(
                f"--images {directory} holds {len(paths)} images, and a request needs {max(1, self.count)}; "
                "add images or lower --image-count"
            )
        self.files = [path.read_bytes() for path in paths]
        self.names = [path.name for path in paths]

    def take(self, resolution: tuple[int, int], rng: np.random.Generator) -> bytes:
        """The next image as the bytes of a file: one of the directory's, or made up at (height, width).

        Of videos there is one of each size, as making one takes long; a request's own work does not depend on that.
        """
        if self.video_frames:
            return make_video(resolution, self.video_frames)
        if self.files:
            self._next += 1
            return self.files[(self._next - 1) % len(self.files)]
        return make_image(self.content, resolution, self.file_format, rng)


def make_image(content: str, resolution: tuple[int, int], file_format: str, rng: np.random.Generator) -> bytes:
    """An encoded image of (height, width) pixels; JPEGs have quality 85, as bench_serving's."""
    height, width = resolution
    if content == "random":
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    else:
        image = Image.new("RGB", (width, height), "white")
        if content == "drawn":
            _draw(image, rng)
    out = io.BytesIO()
    image.save(out, file_format.upper(), quality=_JPEG_QUALITY)
    return out.getvalue()


@functools.lru_cache(maxsize=4)
def make_video(resolution: tuple[int, int], frames: int) -> bytes:
    """H.264 in MP4, 30 frames a second, a key frame every 2 s: shapes that move, so long that two frames of each second
    make ``frames``.

    Raises:
        OptionError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise OptionError("--video-frames needs PyAV: pip install 'qwen3vl-moe[video]'") from None
    height, width = (side // 2 * 2 for side in resolution)
    still = Image.new("RGB", (2 * width, height), "white")
    _draw(still, np.random.default_rng(0))
    pixels, out = np.asarray(still), io.BytesIO()
    with av.open(out, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30, options={"g": "60", "preset": "ultrafast", "crf": "28"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(15 * frames):
            left = number * 3 % width
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:, left : left + width]), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return out.getvalue()


def _draw(image: Image.Image, rng: np.random.Generator) -> None:
    pen, side = ImageDraw.Draw(image), min(image.size)
    for number in range(12):
        size = int(rng.integers(side // 10 + 1, side // 3 + 2))
        left, top = (int(rng.integers(-size // 2, full)) for full in image.size)
        shape = pen.ellipse if number % 2 else pen.rectangle
        shape((left, top, left + size, top + size), fill=tuple(rng.integers(0, 256, 3).tolist()))


def make_request(
    tokenizer: Any,
    images: list[bytes],
    text_len: int,
    output_len: int,
    rng: np.random.Generator,
    video_frames: int = 0,
) -> TimedRequest:
    """Images, or videos of which so many frames are taken, then about ``text_len`` tokens of random text."""
    text = tokenizer.decode(plain_token_ids(tokenizer, text_len, rng))
    kind = {"type": "video", "num_frames": video_frames} if video_frames else {"type": "image"}
    content = [{**kind, kind["type"]: image} for image in images] + [{"type": "text", "text": text}]
    return TimedRequest([{"role": "user", "content": content}], output_len)
