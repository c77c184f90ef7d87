"""Reading JSON that anybody may have written: a checkpoint's files, requests, data.

Python's reader takes more than JSON, and more than is good: NaN, the last of two equal keys, numbers that no float
holds, files that are pipes. All of it is refused here, once for everybody who reads.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from qwen3vl_moe.errors import UserError

MAX_FILE_BYTES = 8 << 20  # of a checkpoint's small files; the index of a model of 90,000 tensors just fits
MAX_DEPTH = 100  # brackets within brackets; whatever walks the values may recurse
MAX_DIGITS = 40  # of an integer; more would overflow wherever it meets a float


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: as text, or as UTF-8 with or without a byte order mark.

    Raises:
        ValueError: it is no JSON (``json.JSONDecodeError``) or no UTF-8 (``UnicodeDecodeError``); an object has a key
            twice, a number is not finite or has more than ``MAX_DIGITS`` digits, brackets are nested deeper than
            ``MAX_DEPTH``.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"brackets are nested deeper than {MAX_DEPTH}") from None
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"brackets are nested deeper than {MAX_DEPTH}")
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return value


def read_regular(path: Path, error: type[UserError], most: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file. Nothing else is even waited for: a pipe or a device may never end.

    Raises:
        error: there is no such file, it cannot be read, is no regular file, or has more than ``most`` bytes.
    """
    try:
        check_regular(path, error, most)
        with open(path, "rb") as file:
            return file.read(most)
    except (OSError, ValueError) as problem:  # a ValueError: a path with a NUL or half a surrogate pair
        if isinstance(problem, UserError):
            raise
        reason = "embedded null byte" if "\0" in str(path) else getattr(problem, "strerror", None) or problem
        raise error(f"{path} cannot be read: {reason}") from None  # of a NUL, each Python says it in its own words


def check_regular(path: Path, error: type[UserError], most: int = MAX_FILE_BYTES) -> None:
    """Raises ``error`` for what is no regular file or larger than ``most`` bytes; OSError where nothing is there."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is not a regular file")
    if found.st_size > most:
        raise error(f"{path} has {found.st_size} bytes; at most {most} are read")


def read_json_object(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The JSON object in a file of at most ``MAX_FILE_BYTES``, with the strictness of :func:`parse_json`.

    Raises:
        error: the file cannot be read, or holds no such object; one line says which.
    """
    try:
        content = parse_json(read_regular(path, error))
    except ValueError as problem:
        if isinstance(problem, UserError):
            raise
        raise error(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: a JSON object is needed, got {type(content).__name__}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} stands twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is larger than any float")
    return number


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON; what is not known is null")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_no_number)
