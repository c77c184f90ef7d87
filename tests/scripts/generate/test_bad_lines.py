"""scripts/generate.py over files by anyone: no line stops a batch, and what may be read has limits."""

from __future__ import annotations

import base64

import pytest

from tests.scripts.generate.conftest import records

BIG = "9" * 400
IMAGES = (
    *("data:image/png;base64,\\ud800", "data:image/png;base64,A", "data:,", "data:", "", ".", "/dev/zero"),
    *("file://[x", "file://\\u0000", "http://[x", "http://", "http://a:b:c/", "https://\\u0000", "http://\\ud800/"),
    *("ftp://example.org/a.png", "a\\u0000.png", "\\udfff.png", "x" * 5000, "/proc/self/mem", "\\u001b[31m.png"),
)
SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed", "max_tokens", "top_k")
NO_NUMBERS = (BIG, f"-{BIG}", -(10**39), "1e400", "NaN", "-Infinity", '"1"', "[]", "{}", "true")
CONTENTS = (
    *("[" * 500 + "]" * 500, "[" * 90 + "]" * 90, '{"a":' * 90 + "1" + "}" * 90, "3", "[3]", "[null]"),
    *('[{"type": []}]', '[{"type": "image", "image": {"url": {}}}]', '[{"type": "image"}]'),
    *('[{"type": "image_url", "image_url": {"url": ["a"]}}]', '"\\ud800"', '[{"type": "text", "text": "\\udc00"}]'),
)
BAD_LINES = [
    *(f'{{"prompt": "Hi", "image": "{image}"}}' for image in IMAGES),
    *(f'{{"prompt": "Hi", "{key}": {value}}}' for key in SAMPLING for value in NO_NUMBERS),
    *(f'{{"prompt": "Hi", "seed": {seed}}}' for seed in (2**63, 2**64, -2, 1.5)),
    *(
        f'{{"prompt": "Hi", "stop_token_ids": {ids}}}'
        for ids in (f"[{BIG}]", f"[{2**64}]", "[-1]", "[true]", "[1e400]")
    ),
    *(f'{{"messages": [{{"role": "user", "content": {content}}}]}}' for content in CONTENTS),
    *(f'{{"messages": [{{"role": {role}, "content": "Hi"}}]}}' for role in ("[]", "null", '"nobody"')),
    *('{"prompt": ""} {}', '{"prompt": "Hi", "prompt": "Ho"}', '{"prompt": "\\ud83d"}', '{"prompt": "<|image_pad|>"}'),
    *("null", "{}", "[]", "-", "1e999", "9" * 10_000, "[" * 100_000, '{"a":' * 100_000, "\0", "\0" * 5000, '"' * 5000),
]


def test_no_line_stops_a_batch(run, batch, tmp_path):
    """Whatever a line holds, it is that line's error, and the lines after it are answered."""
    lines = [{"id": "first", "prompt": "Hello"}, *BAD_LINES, {"id": "last", "prompt": "Hello"}]
    status, _, stderr = run(*batch(lines))
    assert (status, stderr.count("\n")) == (1, 4)
    answers = records(tmp_path / "answers.jsonl")
    assert [lines[answer["index"]] for answer in answers if "text" in answer] == [lines[0], lines[-1]]
    assert [answers[0]["id"], answers[-1]["id"]] == ["first", "last"]
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert len(errors) == len(BAD_LINES)
    assert all(error.isprintable() and len(error) <= 1000 for error in errors)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["no such file", "private network", "private network", "answer"]),
        (["--allow-private-hosts"], ["no such file", "Connection refused", "Connection refused", "answer"]),
        (["--media-root", "{}/sub"], ["not within media_root", "private net", "private net", "not within media_root"]),
        (["--media-root", "{}"], ["no such file", "private network", "private network", "not within media_root"]),
        (
            ["--allow-hosts", "example.org"],
            ["no such file", "not one of allow_hosts", "not one of allow_hosts", "answer"],
        ),
        (["--allow-hosts", ""], ["no such file", "not one of allow_hosts", "not one of allow_hosts", "answer"]),
        (
            ["--allow-hosts", "127.0.0.1,example.org", "--allow-private-hosts"],
            ["no such file", "Connection refused", "not one of allow_hosts", "answer"],
        ),
    ],
)
def test_what_a_file_of_requests_may_read(run, batch, pictures, tmp_path, options, expected):
    """Addresses of this machine and of private networks are closed unless they are opened."""
    (tmp_path / "sub").mkdir()
    images = ["missing.png", "http://127.0.0.1:9/a.png", "http://localhost:9/a.png", str(pictures[0])]
    lines = [{"prompt": "Hi", "image": image} for image in images]
    run(*batch(lines), *(option.format(tmp_path) for option in options))
    for answer, text in zip(records(tmp_path / "answers.jsonl"), expected, strict=True):
        assert text in answer.get("error", "answer")


def test_a_picture_may_stand_in_its_line(run, batch, pictures, tmp_path):
    """A path, a URL of any case, or base64 alone: the same picture, the same answer."""
    data = base64.b64encode(pictures[1].read_bytes()).decode()
    images = [str(pictures[1]), f"data:image/jpeg;base64,{data}", f"DATA:IMAGE/JPEG;BASE64,{data}", data]
    items = [{"type": "image", "image": data}, {"type": "image", "base64": data}]
    lines = [{"prompt": "Hi", "image": image} for image in images]
    lines += [{"messages": [{"role": "user", "content": [item, {"type": "text", "text": "Hi"}]}]} for item in items]
    assert run(*batch(lines))[0] == 0
    first, *others = records(tmp_path / "answers.jsonl")
    assert first["image_tokens"] > 0
    for answer in others:
        assert (answer["text"], answer["prompt_tokens"]) == (first["text"], first["prompt_tokens"])


def test_what_is_given_by_hand_may_be_anywhere(run, plain):
    arguments = ["--model", plain.path, "--device", "cpu", "--prompt", "Hi", "--image", "http://127.0.0.1:9/a.png"]
    assert "Connection refused" in run(*arguments)[2]
    assert "private network" in run(*arguments, "--no-private-hosts")[2]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--media-root", "/no/such"], "media_root '/no/such' is not a directory"),
        (["--allow-hosts", "a b"], "allow_hosts"),
    ],
)
def test_mistaken_limits(run, batch, option, message):
    status, _, stderr = run(*batch([{"prompt": "Hi"}]), *option)
    assert (status, stderr.count("\n")) == (2, 1)
    assert message in stderr
