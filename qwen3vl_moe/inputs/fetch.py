"""Any source of an image or a video that is not one already -> the bytes of its file, as far as they may be had."""

from __future__ import annotations

import binascii
import errno
import os
import re
import stat
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    from pybase64 import b64decode  # in a fiftieth of the time, during which other threads wait
except ImportError:
    from base64 import b64decode

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.access import MediaAccess
from qwen3vl_moe.inputs.download import download, too_large
from qwen3vl_moe.inputs.file_kinds import container_of, is_picture
from qwen3vl_moe.inputs.workers import POOL

MAX_FILE_BYTES = 256 * 2**20  # of an encoded image, whatever it comes from, and of a video that is no local file


def fetch(source: Any, where: str, access: MediaAccess) -> bytes:
    """The bytes of the file that ``source`` stands for.

    Args:
        source: a path, a file://, http:// or https:// URL, a data: URL, base64, or the bytes themselves.
        where: what messages call the image.

    Raises:
        PromptError: it cannot be had, is larger than :data:`MAX_FILE_BYTES`, or ``access`` does not allow it.
    """
    with _one_line(where):
        data = _fetch(source, where, access)
        if not isinstance(data, bytes):
            with data as file:
                _size_of_file(os.fstat(file.fileno()), where, MAX_FILE_BYTES)
                data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise too_large(where, MAX_FILE_BYTES)
    return data


def open_file(source: Any, where: str, access: MediaAccess) -> bytes | BinaryIO:
    """The same, but a local file is opened, whatever its size, and not read."""
    with _one_line(where):
        data = _fetch(source, where, access)
    if isinstance(data, bytes) and len(data) > MAX_FILE_BYTES:
        raise too_large(where, MAX_FILE_BYTES)
    return data


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Whatever goes wrong within the block becomes a line that says so."""
    try:
        yield
    except PromptError:
        raise
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PromptError(f"{where} is too long for a path, and not the base64 of a picture or video") from None
        # Not the whole OSError: it repeats the path, which may be megabytes of a mistaken text.
        raise PromptError(f"{where} cannot be read: {error.strerror or type(error).__name__}") from None
    except UnicodeError:
        raise PromptError(f"{where} is not valid text: it holds half of a surrogate pair") from None
    except ValueError as error:  # urllib and pathlib on odd text: their words, which are short and name no content
        raise PromptError(f"{where} cannot be read: {error}") from None
    except Exception as error:  # a path of the caller's own class may raise anything
        raise PromptError(f"{where} cannot be read: {type(error).__name__}") from error


def is_base64_media(text: str) -> bool:
    """Whether ``text`` is the base64 of a picture or a video rather than a path. Its first bytes decide: nobody has a
    path that begins as they do ("/9j/4AAQSkZJRgAB" for JPEG)."""
    head = re.match(r"\s*((?:[A-Za-z0-9+/_-]{4}){4,64})", text)
    if head is None:
        return False
    data = _decode_base64(head[1].encode(), "the text")
    return is_picture(data) or container_of(data) is not None


def _fetch(source: Any, where: str, access: MediaAccess) -> bytes | BinaryIO:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return _open_file(Path(os.fsdecode(source)), where, access)
    if not isinstance(source, str):
        raise PromptError(
            f"{where} is of a type that is not understood: give a path, a URL, the bytes of a file or a PIL image "
            "(PIL.Image.fromarray makes one of an array)"
        )
    if not source:
        raise PromptError(f"{where} is an empty string: a path or a URL is needed")
    match = re.match(r"\s*(data|file):|\s*([A-Za-z][A-Za-z0-9+.-]*)://", source, re.I)
    scheme = (match[1] or match[2]).lower() if match else None
    if scheme is None:
        if is_base64_media(source):
            return _decode_base64(source.encode(), where)
        return _open_file(Path(source), where, access)
    if scheme == "data":
        return _decode_data_url(source, where)
    url = source.strip()
    if scheme == "file":
        return _open_file(_path_of(url, where), where, access)
    if scheme in ("http", "https"):
        with POOL.waiting():
            return download(url, where, access, MAX_FILE_BYTES)
    raise PromptError(f"{where} has the scheme {scheme!r}; file, http, https and data are supported")


def _path_of(url: str, where: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise PromptError(f"{where} names the host {parts.netloc!r}; a file URL is file:///absolute/path")
    return Path(urllib.request.url2pathname(parts.path))


def _open_file(path: Path, where: str, access: MediaAccess) -> bytes | BinaryIO:
    if "\0" in str(path):  # Python says so, too, in other words in each release
        raise PromptError(f"{where} cannot be read: embedded null byte")
    path = access.check_path(path, where)
    # Looked at before it is opened: opening a pipe waits for a writer, and opening a device may do something.
    try:
        size = _size_of_file(path.stat(), where)
    except (FileNotFoundError, NotADirectoryError):
        raise PromptError(f"{where}: there is no such file") from None
    if size == 0:  # not opened: under /proc such files have content, and reading some of them never ends
        return b""
    # It may have become another one meanwhile: O_NONBLOCK so that a pipe does not wait, no link where all links have
    # been followed, and a second look.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if access.media_root is None else os.O_NOFOLLOW)
    file = open(os.open(path, flags), "rb")  # noqa: SIM115  closed by whoever asked for it
    try:
        _size_of_file(os.fstat(file.fileno()), where)
    except BaseException:
        file.close()
        raise
    return file


def _size_of_file(status: os.stat_result, where: str, most: int | None = None) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise PromptError(f"{where} is not a regular file")
    if most is not None and status.st_size > most:
        raise too_large(where, most)
    return status.st_size


def _decode_data_url(url: str, where: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise PromptError(f"{where} has no comma: a data URL is data:image/png;base64,<data>")
    if not re.search(r";\s*base64\s*$", header, re.I):
        return urllib.parse.unquote_to_bytes(payload)
    with suppress(ValueError):  # as nearly everybody writes it: one pass instead of five
        return b64decode(payload, validate=True)
    return _decode_base64(urllib.parse.unquote_to_bytes(payload), where)


def _decode_base64(data: bytes, where: str) -> bytes:
    # With or without line breaks, padding, and the letters that URLs and file names need.
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/"))
    try:
        data = data.rstrip(b"=")
        return b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error:
        raise PromptError(f"{where} is not valid base64") from None
