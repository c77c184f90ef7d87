"""Paths, URLs, data URLs, base64 and bytes to the bytes of a file; what is no image file is not even opened."""

from __future__ import annotations

import base64
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs import fetch
from qwen3vl_moe.inputs.fetch import is_base64_media
from qwen3vl_moe.inputs.image_source import describe, open_image
from tests.pictures import encoded, noise, rgb


class OddPath:
    """A path of the caller's own class."""

    def __init__(self, answer):
        self.answer = answer

    def __fspath__(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_every_spelling_gives_the_same_pixels(tmp_path):
    image = noise(31, 18)
    data = encoded(image)
    path = tmp_path / "an image.png"
    path.write_bytes(data)
    base = base64.b64encode(data).decode()
    wrapped = "\n".join(base[i : i + 76] for i in range(0, len(base), 76))
    percent = "".join(f"%{byte:02X}" for byte in data)
    sources = [
        path,
        str(path),
        OddPath(os.fsencode(path)),
        path.as_uri(),
        f"file://localhost{path.as_uri()[7:]}",
        f"FILE://{path.as_uri()[7:]}",
        f" {path.as_uri()}\n",
        data,
        bytearray(data),
        memoryview(data),
        image,
        f"data:image/png;base64,{base}",
        f"DATA:image/png;charset=x;base64,{wrapped}",
        f"Data:image/png;BASE64,{base}",
        f"data:image;base64,{base}",
        f"data:image/png; base64 ,{base}",
        f"data:;base64,{base.replace('+', '%2B')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode().rstrip('=')}",
        f"\n data:image/png;base64,{base}\n",
        f"data:image/png,{percent}",
        base,
        wrapped,
        f" {base}\n",
        base.rstrip("="),
    ]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(rgb(source)), np.asarray(image), err_msg=describe(source))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_bare_base64_of_every_format(form):
    text = base64.b64encode(encoded(noise(16, 9), form)).decode()
    assert rgb(text).size == (16, 9)
    assert is_base64_media(text)


@pytest.mark.parametrize(
    "text", ["", "a.png", "iVBORw0KGgo", "/9j/a.jpg", "/data/pictures/of/cats/and/dogs.png", "x" * 5000]
)
def test_a_path_is_not_base64(text):
    assert not is_base64_media(text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "image 7 ('no/such/file.png'): there is no such file"),
        ("/etc/passwd/a.png", "there is no such file"),
        ("", "image 7 ('') is an empty string"),
        ("x" * 5000, "image 7 ('" + "x" * 40 + "..." + "x" * 10 + "') is too long for a path, and not the base64"),
        ("a\0b.png", "image 7 ('a\\x00b.png')"),
        ("a\ud800.png", "image 7 ('a\\ud800.png') is not valid text: it holds half of a surrogate pair"),
        ("\x1b[31m\u202e.png", "image 7 ('\\x1b[31m\\u202e.png'): there is no such file"),
        ("ftp://host/a.png", "has the scheme 'ftp'; file, http, https and data are supported"),
        ("s3://bucket/a.png", "has the scheme 's3'"),
        ("file://host/a.png", "names the host 'host'"),
        ("file://[x", "cannot be read: Invalid IPv6 URL"),
        ("file:///a%00b.png", "cannot be read: embedded null byte"),
        ("file:///no/such\ud800.png", "is not valid text"),
        ("file:///no/such.png", "there is no such file"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,@@@@", "is not valid base64"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "is not valid base64"),
        ("data:image/png;base64,\ud800", "is not valid text"),
        ("data:image/png,\ud800", "is not valid text"),
        ("data:image/png;base64,", "is empty: 0 bytes"),
        ("iVBORw0KGgoAAAANSUhEUgAA@", "is not valid base64"),
        (b"", "image 7 (0 bytes) is empty: 0 bytes"),
        (12, "image 7 (int) is of a type that is not understood"),
        (None, "image 7 (NoneType)"),
        (OddPath(RuntimeError("no")), "image 7 (OddPath) cannot be read: RuntimeError"),
        (OddPath(12), "image 7 (OddPath) cannot be read"),
        (np.zeros((4, 4, 3), np.uint8), "PIL.Image.fromarray makes one of an array"),
        (Image.new("RGB", (0, 5)), "is 0x5 pixels: it has no area"),
    ],
)
def test_refused(source, message):
    with pytest.raises(PromptError) as caught:
        open_image(source, 7)
    text = str(caught.value)
    assert message in text
    assert text.startswith("image 7 (")
    assert text.isprintable()
    assert len(text) < 300


def test_data_url_is_shortened():
    url = "data:image/png;base64," + base64.b64encode(b"x" * 10_000).decode()
    with pytest.raises(PromptError) as caught:
        open_image(url, 0)
    assert "data:image/png;base64,eHh4" in str(caught.value)
    assert len(str(caught.value)) < 250


class TestNoRegularFile:
    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "link to a pipe", "device"])
    def test_is_not_opened(self, tmp_path, monkeypatch, kind):
        path = tmp_path / "a.png"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
            socket.socket(socket.AF_UNIX).bind("a.png")
        elif kind == "directory":
            path.mkdir()
        elif kind == "link to a pipe":
            os.mkfifo(tmp_path / "pipe")
            path.symlink_to(tmp_path / "pipe")
        else:
            path = Path("/dev/zero")
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
        for source in (path, str(path), path.as_uri()):
            with pytest.raises(PromptError, match=r"image 0 .* is not a regular file"):
                open_image(source, 0)

    def test_files_without_a_size_are_not_opened(self, monkeypatch):
        """Of /proc: they have content, some of them without end."""
        monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
        for path in ("/proc/self/environ", "/proc/self/status"):
            with pytest.raises(PromptError, match="is empty: 0 bytes"):
                open_image(path, 0)

    @pytest.mark.timeout(20)
    def test_one_that_becomes_a_pipe_meanwhile(self, tmp_path, monkeypatch):
        path, file, seen = tmp_path / "a.png", tmp_path / "b.png", os.stat
        os.mkfifo(path)
        file.write_bytes(b"x")
        monkeypatch.setattr(Path, "stat", lambda _: seen(file))
        with pytest.raises(PromptError, match="is not a regular file"):
            open_image(path, 0)


@pytest.mark.timeout(20)
def test_size_limit(monkeypatch, tmp_path):
    data = encoded(noise(32, 32))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    base = base64.b64encode(data).decode()
    monkeypatch.setattr(fetch, "MAX_FILE_BYTES", len(data) - 1)
    for source in (data, path, f"data:;base64,{base}", base):
        with pytest.raises(PromptError, match="is larger than 0 MiB"):
            open_image(source, 0)
    # One that grows after its size was asked for is read as far as the limit.
    monkeypatch.setattr(fetch, "_size_of_file", lambda *_: 1)
    with pytest.raises(PromptError, match="is larger than 0 MiB"):
        open_image("/dev/zero", 0)


def test_many_threads_read_at_once(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise(20, 20)))
    sizes: list[tuple[int, int]] = []
    threads = [threading.Thread(target=lambda: sizes.append(rgb(tmp_path / "a.png").size)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(20, 20)] * 8
