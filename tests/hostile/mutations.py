"""What all parts of the corpus share: values that nobody expects, and ways to damage bytes and JSON. All seeded."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# JSON as a text, because some of it is nothing that json.dumps would write.
JSON_VALUES = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "minus zero": "-0.0",
    "2**31": str(2**31),
    "2**63": str(2**63),
    "2**64": str(2**64),
    "400 digits": "9" * 400,
    "5000 digits": "9" * 5000,
    "1e400": "1e400",
    "1e-400": "1e-400",
    "1e308": "1e308",
    "NaN": "NaN",
    "minus infinity": "-Infinity",
    "a half": "0.5",
    "empty text": '""',
    "a blank": '" "',
    "NUL": '"\\u0000"',
    "escape sequence": '"\\u001b[31mred\\u001b[0m"',
    "two lines": '"a\\nb\\r\\nc"',
    "half a surrogate pair": '"a\\ud800b"',
    "line separator": '"\\u2028"',
    "right to left": '"\\u202eabc"',
    "digits as text": '"12"',
    "percent": '"%s%n{0}{x}"',
    "placeholder": '"<|vision_start|><|image_pad|><|vision_end|>"',
    "a long text": json.dumps("long " * 40_000),
    "empty list": "[]",
    "list of null": "[null]",
    "list of lists": "[[[]]]",
    "list of objects": "[{}]",
    "mixed list": '[1, "a", null, {"b": []}]',
    "empty object": "{}",
    "object": '{"a": 1}',
    "empty key": '{"": ""}',
    "nested 500 deep": "[" * 500 + "]" * 500,
    "objects 500 deep": '{"a":' * 500 + "1" + "}" * 500,
    "nested 100000 deep": "[" * 100_000 + "]" * 100_000,
    "a repeated key": '{"a": 1, "a": 2}',
}
_MARK = "@@here@@"


def paths_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_of(inner, (*path, key))


def with_value(value: Any, path: tuple, text: str) -> bytes:
    """The JSON of ``value`` with the text ``text`` at ``path``."""
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = _MARK
    return json.dumps(changed).replace(json.dumps(_MARK), text).encode()


def without(value: Any, path: tuple) -> bytes:
    """The JSON of ``value`` without what is at ``path``."""
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return json.dumps(changed).encode()


def json_mutations(value: Any, rng: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    """Every place of ``value`` left out once, and replaced by ``each`` of :data:`JSON_VALUES`."""
    for path in paths_of(value):
        where = ".".join(map(str, path))
        yield f"{where} left out", without(value, path)
        for name in rng.sample(sorted(JSON_VALUES), min(each, len(JSON_VALUES))):
            yield f"{where} is {name}", with_value(value, path, JSON_VALUES[name])


def file_mutations(data: bytes, rng: random.Random, cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """``data`` cut off, with bits flipped, with pieces overwritten, doubled, and moved."""
    size = len(data)
    for at in sorted({round(size * part / (cuts + 1)) for part in range(1, cuts + 1)}):
        yield f"cut after {at}", data[:at]
    for number in range(flips):
        damaged = bytearray(data)
        # The first bytes say the most: half of all flips are there.
        for _ in range(rng.choice((1, 1, 1, 3, 20))):
            damaged[rng.randrange(min(size, 64) if number % 2 else size)] ^= 1 << rng.randrange(8)
        yield f"bits flipped, {number}", bytes(damaged)
    for number in range(max(1, flips // 6)):
        at, length = rng.randrange(size), rng.choice((2, 4, 8))
        filler = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * length
        yield f"overwritten, {number}", data[:at] + filler + data[at + length :]
    yield "twice", data * 2
    yield "the end first", data[size // 2 :] + data[: size // 2]


RAW_TEXTS = {
    "empty": b"",
    "a blank": b" ",
    "NUL bytes": b"\x00" * 64,
    "all bytes": bytes(range(256)),
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "a text": b'"a"',
    "an unclosed object": b'{"a": ',
    "an unclosed text": b'{"a": "b',
    "more after the end": b'{"a": 1} {"b": 2}',
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "nested 500 deep": b"[" * 500 + b"]" * 500,
    "nested 100000 deep": b"[" * 100_000,
    "objects 100000 deep": b'{"a":' * 100_000,
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a megabyte of brackets": b"[]," * 350_000,
}
