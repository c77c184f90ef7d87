"""JSON by anybody: what Python's own reader would let through, and files that are none."""

import json
import os
import socket
import time

import pytest

from qwen3vl_moe.errors import CheckpointError, PromptError
from qwen3vl_moe.json_files import MAX_DEPTH, MAX_DIGITS, MAX_FILE_BYTES, parse_json, read_json_object, read_regular


@pytest.mark.parametrize(
    "value",
    [{"a": [1, -2, 3.5, 1e300, True, None, "é\ud800\n"], "b": {"a": {}}}, [], "text", 0, 2**64, 10 ** (MAX_DIGITS - 1)],
)
def test_json_is_read_as_it_is_written(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode()) == value


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        ('{"outer": [{"a": 1, "a": 1}]}', "the key 'a' stands twice"),
        ("NaN", "NaN is no JSON; what is not known is null"),
        ('{"a": [Infinity]}', "Infinity is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ("1e400", "the number 1e400 is larger than any float"),
        (f"[-{'9' * 400}.5]", "the number -9999999999999999999 is larger"),
        ("9" * (MAX_DIGITS + 1), f"an integer has {MAX_DIGITS + 1} digits"),
        (f'{{"a": -{"9" * 5000}}}', "an integer has 5001 digits"),
        (nested(MAX_DEPTH + 1), "nested deeper than 100"),
        (nested(500), "nested deeper than 100"),
        ('{"a":' * 150 + "1" + "}" * 150, "nested deeper than 100"),
        ("[" * 200_000, "nested deeper than 100"),
        (b'"\xff"', "can't decode byte 0xff"),
        ('{"a"', "Expecting ':'"),
        ("", "Expecting value"),
        ("1 2", "Extra data"),
        ('"a\tb"', "Invalid control character"),
    ],
)
def test_what_is_more_than_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_brackets_may_be_nested_as_deep_as_said():
    parse_json(nested(MAX_DEPTH))


@pytest.fixture(params=["fifo", "socket", "directory", "device", "link to a device"])
def irregular(request, tmp_path):
    path = tmp_path / "config.json"
    match request.param:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "directory":
            path.mkdir()
        case "device":
            return type(path)("/dev/zero")
        case "link to a device":
            path.symlink_to("/dev/zero")
    return path


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_at_once(irregular):
    with pytest.raises(CheckpointError, match=r"is not a regular file$"):
        read_json_object(irregular, CheckpointError)


def test_a_large_file_is_refused_by_its_size(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # holes take no room on the disk, but would in memory
    started = time.monotonic()
    with pytest.raises(PromptError, match=f"has {1 << 40} bytes; at most {MAX_FILE_BYTES} are read"):
        read_json_object(path, PromptError)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "cannot be read: No such file or directory"), ("a\0b", "cannot be read: embedded null byte"),
     ("a\ud800", r"cannot be read: 'utf-8' codec can't encode"), ("a" * 300, "cannot be read: File name too long")],
)  # fmt: skip
def test_a_file_that_is_not_there(tmp_path, name, message):
    with pytest.raises(PromptError, match=message):
        read_regular(tmp_path / name, PromptError)


@pytest.mark.parametrize("content", ["[]", '"text"', "3", "null"])
def test_an_object_is_needed(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="a JSON object is needed, got"):
        read_json_object(tmp_path / "config.json", CheckpointError)


def test_what_is_wrong_is_said_with_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match=r"config.json cannot be read as JSON: the key 'a' stands twice"):
        read_json_object(tmp_path / "config.json", CheckpointError)
