"""What is given in place of an image: paths, URLs, objects. No name is looked up and no host outside is reached."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.hostile.request_lines import PIXEL

BASE64 = PIXEL.partition(",")[2]
TEXTS = [
    "",
    " ",
    ".",
    "..",
    "/",
    "~",
    "-",
    "a" * 300,
    "a" * 100_000,
    "a/" * 5000,
    "\x00",
    "a\x00b.png",
    "\ud800.png",
    "a\nb.png",
    "\x1b[31m.png",
    "\u202egnp.a",
    "/dev/zero",
    "/dev/full",
    "/dev/urandom",
    "/dev/tty",
    "/dev/stdin",
    "/dev/fd/0",
    "/proc/self/mem",
    "/proc/self/environ",
    "/proc/kcore",
    "/proc/self/fd/0",
    "/etc/passwd",
    "/root/.ssh/id_rsa",
    "../../../../etc/passwd",
    "C:\\a.png",
    "\\\\host\\a.png",
    "file:",
    "file:/",
    "file://",
    "file:///",
    "file://[x",
    "file://[::1]/a.png",
    "file://host/a.png",
    "file:///dev/zero",
    "file://localhost/dev/zero",
    "file:///%00",
    "file:///a%0ab",
    "file:///%ff",
    "file:a.png",
    "FILE:///etc/passwd",
    "file://\ud800",
    "http:",
    "http:/",
    "http://",
    "http://[",
    "http://[x",
    "http://[::1",
    "http://[::1]:9/",
    "http://:80/",
    "http://127.0.0.1:9/a.png",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:x/",
    "http://127.0.0.1:9/\ud800",
    "http://127.0.0.1:9/a\nb",
    "http://127.0.0.1:9/a\r\nHost: b",
    "http://127.0.0.1:9 /",
    "http://\x00/",
    "http://\ud800/",
    "http://user:word@127.0.0.1:9/",
    "http://127.0.0.1:9/" + "a" * 100_000,
    "http://" + "a" * 300 + "/",
    "http://" + "a." * 200 + "/",
    "http://./",
    "http://../",
    "http://-/",
    "http://%/",
    "http://0:9/",
    "http://2130706433:9/",
    "http://127.1:9/",
    "http://[::ffff:127.0.0.1]:9/",
    "https://127.0.0.1:9/",
    "HTTPS://127.0.0.1:9/",
    "http:\\\\127.0.0.1:9\\",
    "http://127.0.0.1:9#@b/",
    "//127.0.0.1:9/a",
    "ftp://127.0.0.1/a.png",
    "gopher://127.0.0.1/",
    "javascript:alert(1)",
    "s3://a/b.png",
    "hf://a/b",
    "about:blank",
    "x://y",
    "://",
    "data:",
    "data:,",
    "data:,a",
    "data:;base64",
    "data:;base64,",
    "data:;base64,@@@",
    "data:image/png;base64,AAAA",
    "data:image/png,%89PNG",
    "data:image/png;base64,\ud800",
    "data:image/png;base64," + "A" * 3_000_001,
    "data:" + "a" * 100_000,
    "data:image/png;base64," + "=" * 99,
    "data:image/png;base64;base64," + BASE64,
    "data:image/png;charset=utf-8;base64," + BASE64,
    "DATA:IMAGE/PNG;BASE64," + BASE64,
    "data:image/png;base64, " + BASE64 + "\n",
    PIXEL,
    BASE64,
    BASE64[:-3],
    BASE64.replace("A", "-"),
    "A" * 200_000,
    "=" * 99,
    "%" * 99,
    "<|image_pad|>",
    "{{ 7 * 7 }}",
    "%s%s%n",
    "🖼️.png",
    "é.png",
    "\ufeff.png",
    "\u2028.png",
    "a.png?b=c",
    "a.png#b",
]


class Raising:
    """An object that answers every question with an error."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("no name")


def objects(folder: Path) -> Iterator[tuple[str, Any]]:
    """Things that are no text."""
    fifo, loop, empty, sparse = folder / "fifo", folder / "loop", folder / "empty.png", folder / "sparse.png"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    empty.touch()
    with open(sparse, "wb") as file:
        file.truncate(1 << 40)
    for path in (fifo, loop, empty, sparse, folder, folder / "absent.png"):
        yield f"{path.name or 'folder'}, a path", path
        yield f"{path.name or 'folder'}, a text", str(path)
        yield f"{path.name or 'folder'}, a URL", path.as_uri()
    for value in (
        None,
        True,
        0,
        -1,
        1.5,
        float("nan"),
        10**400,
        (),
        [],
        {},
        {"url": PIXEL},
        [PIXEL],
        set(),
        object(),
        Raising(),
        int,
    ):
        yield f"a {type(value).__name__}", value
    for value in (b"", b"a", bytearray(b"abc"), memoryview(b"abc"), b"\x00" * 2_000_000, PIXEL.encode()):
        yield f"{type(value).__name__} of {len(value)}", value
    yield "a strided memoryview", memoryview(b"abcdef")[::2]
    yield "an array", np.zeros((9, 9, 3), np.uint8)
    yield "a tensor", torch.zeros(3, 9, 9)
    rng = random.Random(3)
    for mode in (
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
        "I;16",
        "I;16B",
    ):
        yield f"an image of mode {mode}", Image.new(mode, (rng.randrange(1, 40), rng.randrange(1, 40)))
    for size in ((0, 0), (0, 9), (9, 0), (1, 1), (1, 3000), (3000, 1), (1, 199), (201, 1)):
        yield f"an image of {size[0]}x{size[1]}", Image.new("RGB", size)
    floats = np.full((9, 9), np.nan, np.float32)
    yield "an image of NaN", Image.fromarray(floats)
    yield "an image of infinity", Image.fromarray(np.full_like(floats, np.inf))
    closed = Image.new("RGB", (9, 9))
    closed.close()
    yield "a closed image", closed


def cases(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and sources; files are made in ``folder``."""
    for number, text in enumerate(TEXTS):
        yield f"text {number}: {text[:40]!a}", text
    yield from objects(folder)
