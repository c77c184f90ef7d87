"""scripts/generate.py over a file of requests: the answers, and how a run that was cut short goes on."""

from __future__ import annotations

import json
import signal
import time

import pytest
from PIL import Image

from qwen3vl_moe.engine import LLM, SamplingParams
from tests.scripts.generate.conftest import records


def test_a_file_of_requests(run, batch, plain, pictures, tmp_path):
    """Bad lines become error records, the others get the answers of LLM.chat, all in the order of the requests."""
    Image.new("RGB", (30, 30), "green").save(tmp_path / "near.png")
    hello = [{"role": "user", "content": "Hello"}]
    near = [{"type": "image", "image": "near.png"}, {"type": "text", "text": "What?"}]
    lines = [
        {"id": "long", "prompt": "Hello", "max_tokens": 40, "ignore_eos": True},
        {"id": "picture", "prompt": "What?", "image": "near.png"},
        "{broken",
        {"prompt": "What?", "images": [str(path) for path in pictures]},
        {"id": 5, "prompt": "Hello", "image": "missing.png"},
        {"messages": hello, "temperature": 0.9, "seed": 4, "max_tokens": 3, "ignore_eos": True},
        {"prompt": "too long " * 3000},
        {"messages": [{"role": "user", "content": near}]},
        {"prompt": "Hello", "colour": "red"},
        {"messages": [{"role": "nobody", "content": "Hello"}]},
        {"prompt": "Hello", "stop_token_ids": [100000]},
    ]
    arguments = batch(lines)
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith(f"{tmp_path / 'answers.jsonl'} is complete: 5 answers, 6 errors; ")
    assert "requests/s" in stderr

    answers = records(tmp_path / "answers.jsonl")
    assert [answer["index"] for answer in answers] == list(range(len(lines)))
    assert [answer["id"] for answer in answers] == ["long", "picture", None, None, 5, *[None] * 6]
    errors = {answer["index"]: answer["error"] for answer in answers if "error" in answer}
    expected = {
        2: "line 3: no JSON",
        4: f"image 0 ('{tmp_path / 'missing.png'}'): there is no such file",
        6: "max_model_len=4096",
        8: "line 9: the key 'colour' is unknown; known are id, prompt",
        9: "messages[0] has the role 'nobody'",
        10: "stop_token_ids: 100000 is outside of the vocabulary",
    }
    assert errors.keys() == expected.keys()
    assert not [(errors[index], text) for index, text in expected.items() if text not in errors[index]]

    llm = LLM(plain.path, device="cpu", progress=False)
    near[0]["image"] = tmp_path / "near.png"
    both = [*({"type": "image", "image": path} for path in pictures), {"type": "text", "text": "What?"}]
    greedy = {"temperature": 0, "max_tokens": 9}
    for index, content, params in (
        (0, "Hello", {**greedy, "max_tokens": 40, "ignore_eos": True}),
        (1, near, greedy),
        (3, both, greedy),
        (5, "Hello", {"temperature": 0.9, "seed": 4, "max_tokens": 3, "ignore_eos": True}),
        (7, near, greedy),
    ):
        (output,) = llm.chat([{"role": "user", "content": content}], SamplingParams(**params))
        answer = answers[index]
        assert answer["text"] == output.outputs[0].text
        assert answer["finish_reason"] == output.outputs[0].finish_reason
        assert answer["prompt_tokens"] == len(output.prompt_token_ids)
        assert answer["image_tokens"] == output.num_image_tokens
        assert answer["answer_tokens"] == len(output.outputs[0].token_ids)

    before = (tmp_path / "answers.jsonl").read_bytes()
    status, _, stderr = run(*arguments)
    assert (status, stderr.count("\n")) == (1, 1), "no model is loaded for a job that is done"
    assert "is complete: 5 answers, 6 errors; nothing to do" in stderr
    assert (tmp_path / "answers.jsonl").read_bytes() == before

    # The picture that was missing is there now: its record goes, and only that request is tried again.
    assert "delete the lines with an error to have those requests tried again" in stderr
    Image.new("RGB", (30, 30), "green").save(tmp_path / "missing.png")
    lines_before = before.splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines_before[:4] + lines_before[5:]))
    status, _, stderr = run(*arguments)
    assert (status, "is complete: 6 answers, 5 errors; " in stderr) == (1, True)
    lines_after = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert lines_after[:4] + lines_after[5:] == lines_before[:4] + lines_before[5:]
    assert "text" in json.loads(lines_after[4])
    before = b"".join(lines_after)

    backwards = reversed(before.splitlines(keepends=True))  # as an end just before the answers were put in order
    (tmp_path / "answers.jsonl").write_bytes(b"".join(backwards))
    assert run(*arguments)[0] == 1
    assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_is_taken_up_again(start, run, batch, tmp_path, how):
    # Short and long answers in turn: they end in another order than they begin.
    lines = [
        {"id": f"r{n}", "prompt": f"Tell me about {n}", "max_tokens": 3 if n % 3 else 400, "ignore_eos": True}
        for n in range(12)
    ]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert run(*batch(lines, whole.name))[0] == 0
    process = start(*batch(lines, part.name))
    while not (part.exists() and part.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=300)
    left = part.read_bytes()
    assert 2 <= left.count(b"\n") < 12
    if how != signal.SIGKILL:
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}[how]
        assert "the same command goes on" in stderr
        assert "Traceback" not in stderr
    part.write_bytes(left + b'{"index": 0, "id": "r')  # and one that a full disk or the kill cut short
    status, _, stderr = run(*batch(lines, part.name))
    assert status == 0
    assert "what was written in part only is answered again" in stderr
    assert f"has {left.count(10)} of 12 answers; going on" in stderr
    assert part.read_bytes() == whole.read_bytes()
    assert [record["id"] for record in records(part)] == [f"r{n}" for n in range(12)]


def test_answers_to_something_else_are_left_alone(run, batch, tmp_path):
    lines = [{"prompt": "Hello"}]
    assert run(*batch(lines))[0] == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    for arguments in ([*batch(lines), "--max-pixels", 5000], batch([{"prompt": "Bye"}])):
        status, _, stderr = run(*arguments)
        assert status == 2
        assert stderr.startswith(f"error: {tmp_path / 'answers.jsonl'}, line 1 answers another request")
        assert stderr.count("\n") == 1
    assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "requests.jsonl"], "--input and --output go together"),
        (["--output", "answers.jsonl"], "--input and --output go together"),
        (["--input", "requests.jsonl", "--output", "a", "--image", "a.png"], "--input brings media of its own"),
        (["--input", "nowhere.jsonl", "--output", "a"], "nowhere.jsonl cannot be read: No such file or directory"),
    ],
)
def test_mistakes_with_files(run, arguments, message):
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"error: {message}")


def test_a_mistaken_model_leaves_no_records(run, batch, tmp_path):
    arguments = [*batch(["{broken", {"prompt": "Hello"}]), "--model", "/nowhere/at/all"]
    assert run(*arguments)[0] == 2
    assert (tmp_path / "answers.jsonl").read_bytes() == b""


def test_no_requests(run, batch):
    status, _, stderr = run(*batch([""]))
    assert (status, stderr.count("\n")) == (0, 1)
    assert "is complete: 0 answers, 0 errors; nothing to do" in stderr
