"""eval/answer_cache.py: what is written is read again after any interruption, and nothing else is."""

import fcntl
import json
import os
import pickle

import pytest

from answer_cache import AnswerCache, CachingLM
from qwen3vl_moe.errors import UserError

ENTRIES = {"a": "an answer\u2028of two lines\n", "b": (-0.1 - 0.2, True), "c": -1e-300, "d": "", "e": (0.0, False)}


@pytest.fixture
def path(tmp_path):
    with AnswerCache(tmp_path / "cache.jsonl") as cache:
        for key, value in ENTRIES.items():
            cache[key] = value
    return tmp_path / "cache.jsonl"


def contents(path):
    with AnswerCache(path) as cache:
        return {key: cache[key] for key in ENTRIES if key in cache}


def test_what_is_written_is_read_again(path):
    assert contents(path) == ENTRIES
    with AnswerCache(path) as cache:
        assert len(cache) == len(ENTRIES)
        cache["a"] = ENTRIES["a"]  # again, as lm-eval does
        cache["b"] = "changed"
    assert len(path.read_text().split("\n")) == len(ENTRIES) + 2
    assert contents(path)["b"] == "changed"


def test_what_was_cut_off_is_dropped(path):
    data = path.read_bytes()
    last = data.rstrip(b"\n").rindex(b"\n") + 1
    for length in range(last, len(data)):
        path.write_bytes(data[:length])
        assert contents(path) == {key: value for key, value in ENTRIES.items() if key != "e"}
        assert path.read_bytes() == data[:last]


class Command:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Command()),
        b"SQLite format 3\x00" + bytes(4096),
        b"[]\n",
        b'{"key": "a"}\n',
        b'{"key": 1, "value": "a"}\n',
        b'{"key": "a", "value": null}\n',
        b'{"key": "a", "value": ["a"]}\n',
        b'{"key": "a", "value": "b", "more": 1}\n',
        b'{"key": "a", "value": [' * 50_000 + b"\n",
        b"\n",
        b"no cache",
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "cache.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="was not written by this program"):
        AnswerCache(path)
    assert path.read_bytes() == content


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "absent/cache", "\0"):
        with pytest.raises(UserError, match=r"^cache '"):
            AnswerCache(tmp_path / name)


def test_one_run_at_a_time(path):
    with AnswerCache(path), pytest.raises(UserError, match="in use by another run"):
        AnswerCache(path)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # both have let go


def test_a_full_disk_is_one_line(path):
    with AnswerCache(path) as cache:
        cache._file.close()
        cache._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(UserError, match="cannot be written: No space left"):
            cache["x"] = "y"
        assert "x" not in cache


def test_lm_evals_wrapper(demo, tmp_path):
    from lm import EngineLM
    from tests.eval.conftest import instance

    model = EngineLM(demo.llm, progress=False)
    requests = [instance("Hello", {"until": [], "max_gen_toks": 3}), instance("The", {"until": [], "max_gen_toks": 2})]
    wrapped = CachingLM(model, str(tmp_path / "new" / "cache.db"))
    answers = wrapped.generate_until(requests)
    wrapped.dbdict.close()
    lines = [json.loads(line) for line in (tmp_path / "new" / "cache.jsonl").read_text().splitlines()]
    assert sorted(line["value"] for line in lines) == sorted(answers)
    model.answers = []
    again = CachingLM(model, str(tmp_path / "new" / "cache.db"))
    assert again.generate_until(requests) == answers
    assert model.answers == []
    again.dbdict.close()
