"""Short video files, made on the spot by PyAV."""

from __future__ import annotations

import fractions
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest


def make_clip(
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    frames: int = 40,
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    key_every: int = 12,
    times_ms: Sequence[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """A file in which something moves. ``size`` is width and height; ``rotation`` is written into it, in degrees."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        given = {"g": str(key_every), **(options or {})} if container != "gif" else {}
        stream = output.add_stream(codec, rate=rate, options=given)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if times_ms is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(moving(frames, size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
            frame.pts = number if times_ms is None else times_ms[number]
            frame.time_base = fractions.Fraction(1, rate if times_ms is None else 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def moving(frames: int, size: tuple[int, int]) -> list[np.ndarray]:
    """A bright square that moves over slowly changing colours, half of it transparent; uint8 [height, width, 4]."""
    width, height = size
    made = []
    for number in range(frames):
        pixels = np.full((height, width, 4), 255, np.uint8)
        pixels[..., 0] = np.linspace(0, 120, width) + number
        pixels[..., 1] = np.linspace(20, 200, height)[:, None]
        pixels[..., 2] = 100
        left = number * 3 % (width - 12)
        pixels[8:20, left : left + 12] = (250, 250 - 5 * number % 250, 10, 90)
        made.append(pixels)
    return made


def plain_frames(data: bytes, pixel_format: str = "rgb24") -> list[np.ndarray]:
    """Every frame as PyAV gives it, one after the other."""
    av: Any = pytest.importorskip("av")
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format=pixel_format) for frame in container.decode(video=0)]
