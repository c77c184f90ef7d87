"""Files of answers: records, and what is left to do after an end at any byte."""

import json
import os
import re
import resource
import secrets
import signal
import stat
from pathlib import Path

import pytest

import batch_answers
from batch_answers import AnswerFile
from qwen3vl_moe.engine import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from qwen3vl_moe.errors import UserError
from tests.scripts.conftest import SETTINGS


def output(text, length=3):
    answer = CompletionOutput(0, text, "", list(range(length)), None, None, "stop", None)
    return RequestOutput("0", None, [1, 2], None, [answer], True, RequestMetrics(0.0), 1)


@pytest.fixture
def open_answers(tmp_path):
    return lambda requests: AnswerFile(tmp_path / "answers.jsonl", requests, tmp_path / "requests.jsonl")


def indices(path):
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


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


def test_a_full_disk(job, open_answers):
    """What did not fit is cut off by the next run, which goes on."""
    requests = job([{"prompt": "Hi"}, {"prompt": "Ho"}])
    with open_answers(requests) as answers:
        answers.write(requests[0], output("one"))
        size = answers.path.stat().st_size
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, before[1][1]))  # as a disk that is full soon after
        try:
            with pytest.raises(UserError, match=r"answers.jsonl cannot be written: File too large"):
                answers.write(requests[1], output("two"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
            signal.signal(signal.SIGXFSZ, before[0])
    assert answers.path.stat().st_size == size + 40
    with open_answers(requests) as again:
        assert (again.repaired, again.todo) == (True, [requests[1]])
        again.write(requests[1], output("two"))
        again.sort()
    assert indices(again.path) == [0, 1]


@pytest.fixture
def unsorted(job, open_answers):
    """Answers that are all there, the last one first."""
    requests = job([{"prompt": "Hi"}, {"prompt": "Ho"}])
    with open_answers(requests) as answers:
        answers.write(requests[1], output("two"))
        answers.write(requests[0], output("one"))
        yield answers


def test_sorting_follows_a_link(unsorted, tmp_path):
    unsorted.path.rename(tmp_path / "real.jsonl")
    unsorted.path.symlink_to("real.jsonl")
    unsorted.sort()
    assert unsorted.path.is_symlink()
    assert indices(tmp_path / "real.jsonl") == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "real.jsonl", "requests.jsonl"]


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664, 0o444, 0o2755])
def test_sorting_keeps_the_mode(unsorted, mode):
    unsorted.path.chmod(mode)
    unsorted.sort()
    assert indices(unsorted.path) == [0, 1]
    assert stat.S_IMODE(unsorted.path.stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_sorting_keeps_the_owner(unsorted):
    os.chown(unsorted.path, 12345, 54321)
    unsorted.sort()
    found = unsorted.path.stat()
    assert (indices(unsorted.path), found.st_uid, found.st_gid) == ([0, 1], 12345, 54321)


def owned_by_another(monkeypatch):
    monkeypatch.setattr(os, "fchown", _refuse)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result([*real(fd)[:4], 4242, *real(fd)[5:]]))


def _refuse(*args):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("trouble", ["owner", "rename", "interrupt"])
def test_what_cannot_be_put_in_order_stays_as_it_is(unsorted, tmp_path, monkeypatch, trouble):
    before = unsorted.path.read_bytes()
    kind, text = UserError, "answers.jsonl holds all answers, but cannot be put in order: Operation not permitted"
    if trouble == "owner":
        owned_by_another(monkeypatch)
    elif trouble == "rename":
        monkeypatch.setattr(os, "replace", _refuse)
    else:
        kind, text = KeyboardInterrupt, None

        def interrupt(descriptor):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(kind, match=text):
        unsorted.sort()
    assert unsorted.path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "requests.jsonl"]


def test_no_name_beside_the_answers_is_touched(unsorted, tmp_path):
    """The new file has a name that nobody can have foreseen: nothing is followed there, and nothing removed."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "answers.jsonl.part").symlink_to("precious")
    (tmp_path / ".answers.jsonl.part").write_text("also")
    unsorted.sort()
    assert indices(unsorted.path) == [0, 1]
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "answers.jsonl.part").is_symlink()
    assert (tmp_path / ".answers.jsonl.part").read_text() == "also"


def test_a_planted_name_is_refused(unsorted, tmp_path, monkeypatch):
    """Even if somebody guesses the name, the file is made only where none is."""
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda count: "guessed")
    (tmp_path / ".guessed.part").symlink_to("precious")
    with pytest.raises(UserError, match="cannot be put in order: File exists"):
        unsorted.sort()
    assert indices(unsorted.path) == [1, 0]
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / ".guessed.part").is_symlink()


@pytest.mark.parametrize("link", [None, "symbolic", "hard"])
def test_the_requests_are_not_written_over(job, tmp_path, link):
    requests = job([{"prompt": "Hi"}])
    source = output = tmp_path / "requests.jsonl"
    if link:
        output = tmp_path / "answers.jsonl"
        output.symlink_to(source) if link == "symbolic" else output.hardlink_to(source)
    before = source.read_bytes()
    with pytest.raises(UserError, match="is the file of requests itself; give another --output"):
        AnswerFile(output, requests, source)
    assert source.read_bytes() == before


# What a loss of power leaves: the length of the file is known, but blocks of data were not written and read as zeros.


def test_zeros_after_a_loss_of_power(job, open_answers):
    """A hole anywhere costs the records that it touches, and no other."""
    lines = [{"id": n, "prompt": "Hi"} for n in range(5)]
    requests = job(lines)
    with open_answers(requests) as answers:
        for request in requests:
            answers.write(request, output(f"answer {request.index}"))
    whole = answers.path.read_bytes()
    ends = [0, *(match.end() for match in re.finditer(b"\n", whole))]
    for start in range(0, len(whole), 7):
        for stop in {min(start + length, len(whole)) for length in (1, 50, 200, len(whole))}:
            answers.path.write_bytes(whole[:start] + bytes(stop - start) + whole[stop:])
            with open_answers(requests) as again:
                hit = {n for n in range(5) if start < ends[n + 1] and stop > ends[n]}
                assert {request.index for request in again.todo} == hit
                assert again.repaired
                for request in again.todo:
                    again.write(request, output(f"answer {request.index}"))
                again.sort()
            assert answers.path.read_bytes() == whole


@pytest.mark.parametrize("zeros", [1, 4096, 100_000])
def test_zeros_at_the_end_are_cut_off(job, open_answers, zeros):
    requests = job([{"prompt": "Hi"}, {"prompt": "Ho"}])
    with open_answers(requests) as answers:
        answers.write(requests[0], output("one"))
    before = answers.path.read_bytes()
    for written in (before, before + b'{"index": 1, "te', b""):
        answers.path.write_bytes(written + bytes(zeros))
        with open_answers(requests) as again:
            assert again.repaired
            assert again.path.read_bytes() == (before if written else b"")


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"some\0notes\n", b'{"index": 0, "a": 1\0}, other\n', b'{"id": 1\0}\n'],
)
def test_zeros_in_a_file_of_something_else(job, open_answers, tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no answer; give another --output"):
        open_answers(job([{"prompt": "Hi"}]))
    assert path.read_bytes() == content


@pytest.mark.timeout(20)
def test_a_line_without_end_is_not_read_whole(job, open_answers, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_answers, "MAX_LINE_BYTES", 1000)
    with open(tmp_path / "answers.jsonl", "wb") as file:
        file.truncate(1 << 20)
    with pytest.raises(UserError, match="line 1 is no answer"):
        open_answers(job([{"prompt": "Hi"}]))


def test_more_than_one_answer_to_a_request(job, open_answers):
    (request,) = job([{"prompt": "Hi"}])
    both = output("one")
    both.outputs.append(output("two", length=5).outputs[0])
    with open_answers([request]) as answers:
        answers.write(request, both)
    (record,) = map(json.loads, answers.path.read_text().splitlines())
    assert record["text"] == "one"
    assert [choice["text"] for choice in record["choices"]] == ["one", "two"]
    assert [choice["answer_tokens"] for choice in record["choices"]] == [3, 5]


@pytest.mark.parametrize(
    "odd", ["\x1b[31m", "\x9b31m", "\x7f\x85\r\v\f\x1c", "\u2028\u2029", "\u202e\u2066", "\0", "\ud800"]
)
def test_a_record_is_one_line_that_a_terminal_can_show(job, open_answers, odd):
    (request,) = job([{"id": odd, "prompt": "Hi"}])
    with open_answers([request]) as answers:
        answers.write(request, output(f"漢字 é{odd}"))
    (line,) = answers.path.read_text().splitlines()
    assert line.isprintable()
    record = json.loads(line)
    assert (record["id"], record["text"]) == (odd, f"漢字 é{odd}")
    with open_answers([request]) as again:
        assert again.done == {0}


def test_reasons_show_no_control_characters(job, open_answers):
    (request,) = job([{"prompt": "Hi"}])
    with open_answers([request]) as answers:
        answers.write(request, UserError("\x1b[31mred\n"))
    (record,) = map(json.loads, answers.path.read_text().splitlines())
    assert record["error"] == r"\x1b[31mred\n"
