"""Files of requests: what a line may say, and what is said of one that cannot be used."""

import base64
import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

import batch_file
from batch_file import SAMPLING_KEYS, read_requests
from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.errors import UserError
from tests.pictures import encoded, noise
from tests.scripts.conftest import DEFAULTS, SETTINGS

JPEG = base64.b64encode(encoded(noise(9, 8), "JPEG")).decode()


def test_what_a_line_may_say(job, tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image", "image": "a.png"}, {"type": "image", "url": "https://example.org/b.png"},
            {"type": "image", "base64": "QUJD"}, {"type": "text", "text": "path/like.png"},
        ]},
    ]  # fmt: skip
    requests = job([
        {"id": "x", "prompt": "Hi"},
        {"id": 7, "prompt": "Hi", "image": "sub/cat.jpg", "temperature": 0.5, "stop": ["\n"], "max_tokens": None},
        b"",
        {"prompt": "Hi", "images": ["/abs.png", "https://example.org/a.png", "data:image/png;base64,QQ=="]},
        b" \r",
        {"messages": messages, "seed": 3},
    ])  # fmt: skip
    assert [request.error for request in requests] == [None] * 4
    assert [(request.index, request.id) for request in requests] == [(0, "x"), (1, 7), (2, None), (3, None)]
    assert requests[0].params == DEFAULTS
    assert requests[1].params == SamplingParams(max_tokens=5, temperature=0.5, stop=["\n"])
    assert requests[3].params == SamplingParams(max_tokens=5, seed=3)

    def images(request):
        return [item["image"] for item in request.conversation[0]["content"] if item["type"] == "image"]

    assert requests[0].conversation == [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert images(requests[1]) == [str(tmp_path / "sub/cat.jpg")]
    assert images(requests[2]) == ["/abs.png", "https://example.org/a.png", "data:image/png;base64,QQ=="]
    messages[1]["content"][0]["image"] = str(tmp_path / "a.png")
    assert requests[3].conversation == messages


@pytest.mark.parametrize(
    ("item", "located"),
    [
        ({"type": "image", "path": "a.png"}, {"type": "image", "path": "{}/a.png"}),
        ({"type": "image", "url": "a.png"}, {"type": "image", "url": "{}/a.png"}),
        ({"type": "image", "base64": "QQ=="}, {"type": "image", "base64": "QQ=="}),
        ({"type": "image_url", "image_url": "a.png"}, {"type": "image_url", "image_url": "{}/a.png"}),
        (
            {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "{}/a.png", "detail": "low"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        ),
        (
            {"type": "image", "image": "DATA:image/png;BASE64,QQ=="},
            {"type": "image", "image": "DATA:image/png;BASE64,QQ=="},
        ),
        ({"type": "image", "image": "FILE:///a.png"}, {"type": "image", "image": "FILE:///a.png"}),
        ({"type": "image", "image": JPEG}, {"type": "image", "image": JPEG}),
        ({"type": "video", "video": "a.mp4", "fps": 1}, {"type": "video", "video": "{}/a.mp4", "fps": 1}),
        ({"type": "video", "video": ["a.png", "file:///b"]}, {"type": "video", "video": ["{}/a.png", "file:///b"]}),
        (
            {"type": "video_url", "video_url": {"url": "a.mp4"}},
            {"type": "video_url", "video_url": {"url": "{}/a.mp4"}},
        ),
        ({"type": "image", "image": "9j/a.png"}, {"type": "image", "image": "{}/9j/a.png"}),
        ({"image": "a.png", "text": None}, {"image": "{}/a.png", "text": None}),
        ({"type": "text", "text": "a.png"}, {"type": "text", "text": "a.png"}),
        ("a.png", "a.png"),
        (None, None),
    ],
)
def test_paths_in_messages_count_from_the_folder_of_the_file(job, tmp_path, item, located):
    (request,) = job([{"messages": [{"role": "user", "content": [item]}]}])
    expected = json.loads(json.dumps(located).replace("{}", str(tmp_path)))
    assert request.conversation == [{"role": "user", "content": [expected]}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"no JSON \(Expecting property name enclosed in double quotes at character 1\)"),
        (b"[" * 100_000, "no JSON"),
        (b'{"prompt": "\xff"}', "no UTF-8 text .* at byte 12"),
        (["prompt"], "a JSON object is needed, got list"),
        ({"prompt": "Hi", "max_token": 5}, "the key 'max_token' is unknown; known are id, prompt, messages, image"),
        ({"prompt": "Hi", "logprobs": 5}, "the key 'logprobs' is unknown"),
        ({}, "nothing given; one of prompt, messages is needed"),
        ({"prompt": "Hi", "messages": []}, "prompt and messages given"),
        ({"prompt": 3}, "prompt is of type int"),
        ({"messages": "Hi"}, "messages is a list of objects"),
        ({"messages": []}, "messages is a list of objects"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"content": "Hi"}]}, r"messages\[1\] has no role"),
        ({"messages": [{"role": "user", "content": "Hi"}], "image": "a.png"}, "image goes with prompt"),
        ({"prompt": "Hi", "image": ["a.png"]}, "image is a path or a URL, and images a list"),
        ({"prompt": "Hi", "images": "a.png"}, "image is a path or a URL, and images a list"),
        ({"prompt": "Hi", "image": "a", "images": ["a"]}, "image and images given"),
        ({"prompt": "Hi", "video": "a", "videos": ["a"]}, "video and videos given"),
        ({"prompt": "Hi", "video": ["a"]}, "video is a path or a URL, and videos a list of them"),
        ({"messages": [{"role": "user", "content": "Hi"}], "videos": ["a.mp4"]}, "video goes with prompt"),
        ({"prompt": "Hi", "id": 1.5}, "the id is of type float"),
        ({"prompt": "Hi", "id": "first"}, "the id 'first' is that of line 1 too"),
        ({"prompt": "Hi", "temperature": -1}, "temperature=-1.*: "),
        (b'{"prompt": "Hi", "temperature": NaN}', r"no JSON \(NaN is no JSON; what is not known is null\)"),
        (b'{"prompt": "Hi", "top_p": 1e400}', r"no JSON \(the number 1e400 is larger than any float\)"),
        (b'{"prompt": "Hi", "seed": ' + b"9" * 400 + b"}", r"no JSON \(an integer has 400 digits"),
        (b'{"prompt": "Hi", "prompt": "Ho"}', r"no JSON \(the key 'prompt' stands twice in one object\)"),
        (b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}", r"no JSON \(brackets are nested deeper than 100\)"),
        ({"prompt": "Hi\ud800"}, "prompt holds half of a surrogate pair, which is no character"),
        ({"prompt": "Hi", "stop": ["\udfff"]}, "stop holds half of a surrogate pair"),
        ({"prompt": "Hi", "image": "\ud800.png"}, "image holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages holds half of a surrogate pair"),
        ({"prompt": "Hi", "\ud800": 1}, r"the key '\\ud800' is unknown"),
        ({"prompt": "Hi", "\x1b[31m": 1}, r"the key '\\x1b\[31m' is unknown"),
        ({"prompt": "Hi", "ignore_eos": 1}, "ignore_eos=1: True or False is needed"),
        ({"prompt": "Hi", "seed": True}, "seed=True"),
        ({"prompt": "Hi", "seed": 2**64}, "seed=18446744073709551616"),
        ({"prompt": "Hi", "max_tokens": 5.5}, "max_tokens=5.5"),
        ({"prompt": "Hi", "max_tokens": 1e300}, "max_tokens=1e\\+300"),
        ({"prompt": "Hi", "images": [None]}, "image is a path or a URL, and images a list"),
        ({"prompt": "Hi", "max_tokens": "5"}, "max_tokens='5'"),
    ],
)
def test_a_line_that_cannot_be_used_says_why(job, line, message):
    good, bad = job([{"id": "first", "prompt": "Hi"}, line])
    assert good.error is None
    assert bad.conversation is None
    assert re.match(f"line 2: {message}", bad.error)


@pytest.mark.parametrize("name", ["x", 7, "é\ud800"])
@pytest.mark.parametrize(
    "rest",
    [
        b'"prompt": "Hi", "colour": "red"',
        b'"prompt": "Hi", "temperature": -1',
        b'"prompt": 3',
        b'"prompt": "Hi", "top_p": NaN',
        b'"prompt": "Hi", "seed": ' + b"9" * 400,
        b'"prompt": "a", "prompt": "b"',
        b'"messages": ' + b"[" * 500 + b"]" * 500,
        b'"messages": ' + b"[" * 100_000,
        b'"prompt": "Hi',
        b'"prompt": "\xff"',
        b'"prompt": "\0"',
    ],
)
def test_an_id_survives_whatever_is_wrong_with_its_line(job, name, rest):
    (request,) = job([b'{"id": ' + json.dumps(name).encode() + b", " + rest + b"}"])
    assert request.error is not None
    assert request.id == name


@pytest.mark.parametrize(
    "line", [b'{"id": 1.5, "prompt"}', b'{"id": "\\x", ', b'{"id": [', b'{"a": {"id": "x"', b'["id"']
)
def test_what_is_no_id_does_not_become_one(job, line):
    (request,) = job([line])
    assert (request.id, request.error is None) == (None, False)


def test_an_error_that_nobody_foresaw_is_that_of_its_line(job, monkeypatch):
    def fail(message, folder):
        raise ZeroDivisionError("odd\n\x1b")

    monkeypatch.setattr(batch_file, "located", fail)
    bad, good = job([{"id": "a", "messages": [{"role": "user", "content": []}]}, {"prompt": "Hi"}])
    assert (bad.id, bad.error) == ("a", r"line 1: it cannot be used: ZeroDivisionError: odd\n\x1b")
    assert good.error is None


@pytest.mark.parametrize("given", [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}])
def test_null_is_what_is_not_given(job, given):
    """Tables that are written as lines have every key in every line."""
    everything = dict.fromkeys(("id", "prompt", "messages", "image", "images", *SAMPLING_KEYS, "another column"))
    request, plain = job([{**everything, **given}, given])
    assert (request.error, request.id, request.params) == (None, None, DEFAULTS)
    assert request.conversation == plain.conversation


def test_whole_numbers_may_be_floats(job):
    """In a column with gaps, pandas makes floats of integers."""
    (request,) = job([{"id": 3.0, "prompt": "Hi", "max_tokens": 50.0, "seed": 1.0, "temperature": 1.0}])
    assert request.error is None
    assert (repr(request.id), request.params) == ("3", SamplingParams(max_tokens=50, seed=1, temperature=1.0))
    assert type(request.params.max_tokens) is int


def test_a_line_that_is_too_long_is_one_error(job, monkeypatch):
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 100)
    lines = [{"prompt": "Hi"}, {"id": "long", "prompt": "x" * 100}, b"{" * 3_000_000, {"id": 2, "prompt": "Ho"}]
    requests = job(lines)
    assert [request.error is None for request in requests] == [True, False, False, True]
    assert requests[1].error == "line 2: it has more than 100 bytes; give images as paths or URLs"
    assert [request.id for request in requests] == [None, "long", None, 2]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "sparse"])
def test_a_requests_file_that_is_none(tmp_path, kind):
    path = tmp_path / "requests.jsonl"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "directory":
            path.mkdir()
        case "sparse":
            with open(path, "wb") as file:
                file.truncate(1 << 40)
    with pytest.raises(UserError, match="bytes; at most" if kind == "sparse" else "is not a regular file"):
        read_requests(path, DEFAULTS, SETTINGS)


def test_every_sampling_key_is_a_parameter(job):
    kinds = {f.name: str(f.type) for f in fields(SamplingParams)}
    values = {"bool": True, "str | Sequence[str]": "x", "Sequence[str]": ["x"], "Sequence[int]": [1]}
    values |= {"Mapping[int, float]": {"5": 1.0}, "Mapping[str, Any]": {"json_object": True}}
    line = {key: values.get(kinds[key].removesuffix(" | None"), 1) for key in SAMPLING_KEYS}
    line["ignore_eos"] = False  # which does not go with structured_outputs
    (request,) = job([{"prompt": "Hi", **line}])
    assert request.error is None
    assert request.params == SamplingParams(**line)


def test_a_byte_order_mark_is_no_part_of_the_first_line(job):
    (request,) = job([b'\xef\xbb\xbf{"prompt": "Hi"}'])
    assert request.error is None


def test_a_requests_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl cannot be read: No such file or directory"):
        read_requests(tmp_path / "nowhere.jsonl", DEFAULTS, SETTINGS)
