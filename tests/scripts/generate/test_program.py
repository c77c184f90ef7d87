"""scripts/generate.py as a person uses it: what is on stdout, what is on stderr, and how it ends."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import pytest

import chat
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.errors import PromptError, UserError
from tests.pictures import encoded, noise
from tests.scripts.generate.conftest import SCRIPT


def test_the_answer_alone_goes_to_stdout(run, plain, pictures):
    arguments = ["--model", plain.path, "--device", "cpu", "--image", pictures[0], "--prompt", "Hi", "--max-tokens", 9]
    status, stdout, stderr = run(*arguments)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "Hi"}]
    llm = LLM(plain.path, device="cpu", progress=False)
    (output,) = llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=9))
    assert status == 0
    assert stdout == output.outputs[0].text + "\n"
    for text in (
        str(plain.path),
        "device cpu",
        "dtype float32",
        "moe reference",
        "max_model_len 4096",
        "9 answer tokens",
    ):
        assert text in stderr


def test_json_is_one_object(run, plain, pictures):
    """Images come before the text, in the order given."""
    images = ["--image", pictures[0], "--image", pictures[1]]
    arguments = ["--model", plain.path, "--device", "cpu", "--prompt", "Hi", "--max-tokens", 5, "--seed", 3, "--json"]
    status, stdout, stderr = run(*arguments, *images, "--temperature", 0.9)
    answer = json.loads(stdout)
    assert (status, stdout.count("\n")) == (0, 1)
    assert "model" in stderr

    content = [*({"type": "image", "image": path} for path in pictures), {"type": "text", "text": "Hi"}]
    llm = LLM(plain.path, device="cpu", progress=False)
    params = SamplingParams(max_tokens=5, seed=3, temperature=0.9)
    (output,) = llm.chat([{"role": "user", "content": content}], params)
    assert answer["text"] == output.outputs[0].text
    assert answer["token_ids"] == output.outputs[0].token_ids
    assert answer["finish_reason"] == output.outputs[0].finish_reason
    assert answer["prompt_tokens"] == len(output.prompt_token_ids)
    assert answer["image_tokens"] == output.num_image_tokens > 0
    assert (answer["device"], answer["dtype"], answer["moe"]) == ("cpu", "float32", "reference")
    assert answer["random_weights"] is False
    stages = {"preprocess", "queue", "host_to_device", "vision", "prefill", "decode", "sample"}
    assert set(answer["seconds"]) == {"to_first_token", "total", *stages}

    swapped = json.loads(run(*arguments, "--image", pictures[1], "--image", pictures[0])[1])
    assert swapped["image_tokens"] == answer["image_tokens"]
    assert swapped["token_ids"] != answer["token_ids"]


def test_demo_is_what_answers_where_no_model_is_named(start):
    """A chat from a pipe: one answer per line that holds something."""
    process = start("--max-tokens", 4, "--device", "cpu")
    stdout, stderr = process.communicate("Hello\n\nHow are you?\n", timeout=300)
    assert process.returncode == 0
    assert "model demo, random_weights False" in stderr
    assert stderr.count("4 answer tokens") == 2
    assert stdout.count("\n") >= 2


def test_chat_keeps_the_history(run, plain, pictures):
    arguments = ["--model", plain.path, "--device", "cpu", "--max-tokens", 6, "--image", pictures[0]]
    status, stdout, _ = run(*arguments, stdin="Hello\nAnd now?\n")
    llm = LLM(plain.path, device="cpu", progress=False)
    params = SamplingParams(max_tokens=6)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "Hello"}]
    conversation = [{"role": "user", "content": content}]
    first = llm.chat(conversation, params)[0].outputs[0].text
    conversation += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    second = llm.chat(conversation, params)[0].outputs[0].text
    assert (status, stdout) == (0, f"{first}\n{second}\n")


class Typed(io.StringIO):
    """Lines as from a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stdin", [Typed, io.StringIO])
def test_a_line_that_cannot_be_used(plain, pictures, monkeypatch, capsys, stdin):
    """At a terminal the chat goes on as if it had not been said; a pipe is at its end."""
    llm, params = LLM(plain.path, device="cpu", progress=False), SamplingParams(max_tokens=6)
    images = [{"type": "image", "image": pictures[0]}]
    monkeypatch.setattr(sys, "stdin", stdin("Hello\nAnd now?\n"))
    chat.talk(llm, images, params)
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", stdin("<|image_pad|>\nHello\n<|image_pad|>\nAnd now?\n"))
    if stdin is Typed:
        chat.talk(llm, images, params)
        captured = capsys.readouterr()
        assert captured.out == expected
        assert captured.err.count("error: messages[") == 2
    else:
        with pytest.raises(PromptError, match="the text holds the token"):
            chat.talk(llm, images, params)


def test_empty_stdin_ends_the_chat(run, plain):
    assert run("--model", plain.path, "--device", "cpu")[:2] == (0, "")


def test_a_reader_that_has_seen_enough(start, plain):
    process = start("--model", plain.path, "--device", "cpu", "--prompt", "Hi", "--max-tokens", 3000)
    assert process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=300) == 0
    assert "Traceback" not in stderr
    assert "Error" not in stderr


@pytest.mark.parametrize(("prompt", "status"), [(["--prompt", "Hi"], 130), ([], 0)])
def test_ctrl_c(start, plain, prompt, status):
    process = start("--model", plain.path, "--device", "cpu", "--max-tokens", 4000, *prompt)
    process.stdin.write("Hi\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it is in the middle of an answer
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == status
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all is neither a directory nor a hub id"),
        (["--image", "nowhere.png"], "'nowhere.png'): there is no such file"),
        (["--image", str(SCRIPT)], "is not an image"),
        (["--temperature", "-1"], "temperature=-1.0: "),
        (["--max-tokens", "0"], "max_tokens=0"),
        (["--dtype", "float7"], "float7"),
        (["--device", "toaster"], "toaster"),
        (["--moe", "fast"], "moe='fast' is unknown"),
        (["--moe", "tma"], "moe='tma' cannot run here"),
        (["--max-model-len", "0"], "max_model_len=0"),
        (["--max-model-len", "4"], "max_model_len=4"),
        (["--max-pixels", "1"], "max_pixels"),
    ],
)
def test_mistakes_are_one_line(run, plain, arguments, message):
    common = [] if "--model" in arguments else ["--model", plain.path]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    status, stdout, stderr = run(*common, *device, "--prompt", "Hello there", *arguments)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert (status, stdout) == (2, "")
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in stderr


def test_a_damaged_picture_shows_before_the_weights_are_loaded(run, plain, tmp_path):
    data = encoded(noise(64, 64), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    status, stdout, stderr = run("--model", plain.path, "--prompt", "Hi", "--image", tmp_path / "cut.jpg")
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith(f"error: image 0 ('{tmp_path / 'cut.jpg'}') cannot be decoded")


def test_json_needs_a_prompt(run):
    status, stdout, stderr = run("--json")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: --json needs --prompt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match="cannot be written to stdout: No space left on device"):
            chat.write("an answer")
