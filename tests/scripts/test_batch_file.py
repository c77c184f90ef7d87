"""Files of requests and answers: what a line may say, and what is left to do after an end at any byte."""

import json
import os
import re
from pathlib import Path

import pytest

from batch_file import SAMPLING_KEYS, AnswerFile, read_requests
from qwen3vl_moe.engine import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from qwen3vl_moe.errors import UserError

SETTINGS = {"model": "m", "max_pixels": None}
DEFAULTS = SamplingParams(max_tokens=5)


def output(text, length=3):
    answer = CompletionOutput(0, text, "", list(range(length)), None, None, "stop", None)
    return RequestOutput("0", None, [1, 2], None, [answer], True, RequestMetrics(0.0), 1)


@pytest.fixture
def job(tmp_path):
    """``job(lines)``: the requests of a file with these lines (JSON values or bytes)."""

    def make(lines, defaults=DEFAULTS, settings=SETTINGS):
        path = tmp_path / "requests.jsonl"
        path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
        return read_requests(path, defaults, settings)

    return make


@pytest.fixture
def open_answers(tmp_path):
    return lambda requests: AnswerFile(tmp_path / "answers.jsonl", requests, tmp_path / "requests.jsonl")


# Requests


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
        ({"type": "text", "text": "a.png", "url": "a.png"}, {"type": "text", "text": "a.png", "url": "a.png"}),
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
        ({"prompt": "Hi", "id": 1.5}, "the id is of type float"),
        ({"prompt": "Hi", "id": "first"}, "the id 'first' is that of line 1 too"),
        ({"prompt": "Hi", "temperature": -1}, "temperature=-1: 0 "),
        (b'{"prompt": "Hi", "temperature": NaN}', "temperature=nan"),
        ({"prompt": "Hi", "max_tokens": "5"}, "max_tokens='5'"),
    ],
)
def test_a_line_that_cannot_be_used_says_why(job, line, message):
    good, bad = job([{"id": "first", "prompt": "Hi"}, line])
    assert good.error is None
    assert bad.conversation is None
    assert re.match(f"line 2: {message}", bad.error)


def test_every_sampling_key_is_a_parameter(job):
    values = {"stop": "x", "stop_token_ids": [1], "ignore_eos": True, "top_p": 0.5}
    line = {key: values.get(key, 1) for key in SAMPLING_KEYS}
    (request,) = job([{"prompt": "Hi", **line}])
    assert request.params == SamplingParams(**line)


def test_a_byte_order_mark_is_no_part_of_the_first_line(job):
    (request,) = job([b'\xef\xbb\xbf{"prompt": "Hi"}'])
    assert request.error is None


def test_a_requests_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl cannot be read: No such file or directory"):
        read_requests(tmp_path / "nowhere.jsonl", DEFAULTS, SETTINGS)


# Answers


def test_records(job, open_answers):
    requests = job([{"id": "é\ud800", "prompt": "Hi"}, b"{", {"prompt": "Ho"}])
    with open_answers(requests) as answers:
        answers.write(requests[2], output("漢字\n\u2028", length=4))
        answers.write(requests[1], requests[1].error)
        answers.write(requests[0], UserError("no"))
        assert (answers.todo, answers.num_errors) == ([], 2)
        answers.sort()
    raw = answers.path.read_bytes()
    assert raw.count(b"\n") == 3
    assert "漢字" in raw.decode()
    records = [json.loads(line) for line in raw.decode().split("\n")[:3]]
    assert [record.pop("request") for record in records] == [request.fingerprint for request in requests]
    assert records == [
        {"index": 0, "id": "é\ud800", "error": "no"},
        {"index": 1, "id": None, "error": requests[1].error},
        {"index": 2, "id": None, "text": "漢字\n\u2028", "finish_reason": "stop", "prompt_tokens": 2, "image_tokens": 1,
         "answer_tokens": 4},
    ]  # fmt: skip


def test_an_end_at_any_byte_loses_and_repeats_nothing(job, open_answers):
    requests = job([{"id": "a", "prompt": "Hi"}, b"{", {"prompt": "Ho"}])
    results = [output("one"), requests[1].error, output("three")]
    with open_answers(requests) as answers:
        for index in (2, 0, 1):
            answers.write(requests[index], results[index])
    unsorted = answers.path.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", unsorted)]
    expected = b"".join(sorted(unsorted.splitlines(keepends=True)))
    for size in range(len(unsorted) + 1):
        answers.path.write_bytes(unsorted[:size])
        with open_answers(requests) as again:
            whole = sum(end <= size for end in ends)
            assert again.done == set([2, 0, 1][:whole])
            assert again.repaired == (size not in (0, *ends))
            for request in again.todo:
                again.write(request, results[request.index])
            assert again.num_errors == 1
            again.sort()
        assert again.path.read_bytes() == expected


@pytest.mark.parametrize("change", ["line", "defaults", "settings", "fewer"])
def test_answers_to_other_requests_are_refused(job, open_answers, change):
    lines = [{"prompt": "Hi"}, {"prompt": "Ho"}]
    requests = job(lines)
    with open_answers(requests) as answers:
        answers.write(requests[1], output("two"))
    before = answers.path.read_bytes()
    others = {
        "line": lambda: job([lines[0], {"prompt": "He"}]),
        "defaults": lambda: job(lines, defaults=SamplingParams(max_tokens=6)),
        "settings": lambda: job(lines, settings={**SETTINGS, "model": "n"}),
        "fewer": lambda: job(lines[:1]),
    }[change]()
    with pytest.raises(UserError, match=r"answers.jsonl, line 1 answers another request than .*requests.jsonl"):
        open_answers(others)
    assert answers.path.read_bytes() == before
    with open_answers(job([*lines, {"prompt": "more"}])) as longer:  # requests that are added at the end are fine
        assert [request.index for request in longer.todo] == [0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some notes\n", "line 1 is no answer"),
        (b"some notes", "its last line is no answer"),
        (b'{"prompt": "Hi"}', "its last line is no answer"),
        (b"[1]\n", "line 1 is no answer"),
        (b"\n", "line 1 is no answer"),
        (b'{"index": 0, "request": "x"}\n', "line 1 is no answer"),
        (b'{"index": -1, "request": "x", "text": ""}\n', "line 1 answers another request"),
    ],
)
def test_a_file_of_something_else_is_left_alone(job, open_answers, tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_answers(job([{"prompt": "Hi"}]))
    assert path.read_bytes() == content


def test_an_answer_that_stands_twice(job, open_answers):
    requests = job([{"prompt": "Hi"}])
    with open_answers(requests) as answers:
        answers.write(requests[0], output("one"))
    answers.path.write_bytes(answers.path.read_bytes() * 2)
    with pytest.raises(UserError, match="line 2 repeats the answer to request 0"):
        open_answers(requests)


def test_two_runs_at_once(job, open_answers):
    requests = job([{"prompt": "Hi"}])
    with open_answers(requests), pytest.raises(UserError, match="being written by another run"):
        open_answers(requests)
    open_answers(requests).__exit__()


def test_a_place_that_cannot_be_written(job, tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        AnswerFile(tmp_path / "no" / "answers.jsonl", job([{"prompt": "Hi"}]), tmp_path)


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_a_place_that_is_no_file(job, tmp_path, kind):
    """A pipe cannot be read back, and some devices can be read for ever."""
    path = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "directory":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match="is not a regular file"):
        AnswerFile(path, job([{"prompt": "Hi"}]), tmp_path)


def test_sorting_follows_a_link(job, open_answers, tmp_path):
    (tmp_path / "real.jsonl").write_bytes(b"")
    (tmp_path / "answers.jsonl").symlink_to("real.jsonl")
    requests = job([{"prompt": "Hi"}, {"prompt": "Ho"}])
    with open_answers(requests) as answers:
        answers.write(requests[1], output("two"))
        answers.write(requests[0], output("one"))
        answers.sort()
    assert (tmp_path / "answers.jsonl").is_symlink()
    assert [json.loads(line)["index"] for line in (tmp_path / "real.jsonl").read_text().splitlines()] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "real.jsonl", "requests.jsonl"]
