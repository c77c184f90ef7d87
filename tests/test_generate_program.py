"""scripts/generate.py as a person uses it: what is on stdout, what is on stderr, and how it ends."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.errors import PromptError, UserError
from tests.pictures import encoded, noise

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "generate.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("generate_program", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(program):
    """Run the program in this process: (exit status, stdout, stderr)."""

    def call(*arguments, stdin=""):
        result = CliRunner().invoke(program.app, [str(a) for a in arguments], input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two image files, one wide and red, one high and blue."""
    directory = tmp_path_factory.mktemp("pictures")
    paths = directory / "red.png", directory / "blue.jpg"
    Image.new("RGB", (48, 24), "red").save(paths[0])
    Image.new("RGB", (16, 40), "blue").save(paths[1])
    return paths


@pytest.fixture(autouse=True)
def _ctrl_c_arrives():
    """A job in the background of a shell ignores SIGINT, and its children would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*arguments, **options):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], env=ENVIRONMENT, **pipes | options)


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


def test_demo_says_that_its_weights_are_random():
    """A chat from a pipe: one answer per line that holds something."""
    process = start("--max-tokens", 4, "--device", "cpu")
    stdout, stderr = process.communicate("Hello\n\nHow are you?\n", timeout=300)
    assert process.returncode == 0
    assert "random_weights True" in stderr
    assert "its answers noise" in stderr
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
def test_a_line_that_cannot_be_used(program, plain, pictures, monkeypatch, capsys, stdin):
    """At a terminal the chat goes on as if it had not been said; a pipe is at its end."""
    llm, params = LLM(plain.path, device="cpu", progress=False), SamplingParams(max_tokens=6)
    images = [{"type": "image", "image": pictures[0]}]
    monkeypatch.setattr(sys, "stdin", stdin("Hello\nAnd now?\n"))
    program._chat(llm, images, params)
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", stdin("<|image_pad|>\nHello\n<|image_pad|>\nAnd now?\n"))
    if stdin is Typed:
        program._chat(llm, images, params)
        captured = capsys.readouterr()
        assert captured.out == expected
        assert captured.err.count("error: messages[") == 2
    else:
        with pytest.raises(PromptError, match="the text holds the token"):
            program._chat(llm, images, params)


def test_empty_stdin_ends_the_chat(run, plain):
    assert run("--model", plain.path, "--device", "cpu")[:2] == (0, "")


def test_a_reader_that_has_seen_enough(plain):
    process = start("--model", plain.path, "--device", "cpu", "--prompt", "Hi", "--max-tokens", 3000)
    assert process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(timeout=300) == 0
    assert "Traceback" not in stderr
    assert "Error" not in stderr


@pytest.mark.parametrize(("prompt", "status"), [(["--prompt", "Hi"], 130), ([], 0)])
def test_ctrl_c(plain, prompt, status):
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
        (["--temperature", "-1"], "temperature=-1.0: 0 (greedy) or a positive number is needed"),
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
def test_a_full_disk_is_an_error(program, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(UserError, match="cannot be written to stdout: No space left on device"):
            program._write("an answer")


# --input and --output


@pytest.fixture
def batch(plain, tmp_path):
    """Arguments for a file of requests in ``tmp_path``, with the answers beside it."""

    def write(lines, output="answers.jsonl"):
        source = tmp_path / "requests.jsonl"
        source.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        files = ["--input", source, "--output", tmp_path / output]
        return [*files, "--model", plain.path, "--device", "cpu", "--temperature", 0, "--max-tokens", 9]

    return write


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
        6: "more than max_model_len=4096",
        8: "line 9: the key 'colour' is unknown; known are id, prompt",
        9: "messages[0] has the role 'nobody'",
        10: "stop_token_ids: 100000 is outside of the vocabulary",
    }
    assert errors.keys() == expected.keys()
    assert all(text in errors[index] for index, text in expected.items())

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

    backwards = reversed(before.splitlines(keepends=True))  # as an end just before the answers were put in order
    (tmp_path / "answers.jsonl").write_bytes(b"".join(backwards))
    assert run(*arguments)[0] == 1
    assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_is_taken_up_again(run, batch, tmp_path, how):
    # Short and long answers in turn: they end in another order than they begin.
    lines = [
        {"id": f"r{n}", "prompt": f"Tell me about {n}", "max_tokens": 3 if n % 3 else 800, "ignore_eos": True}
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
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on" in stderr
        assert "Traceback" not in stderr
    part.write_bytes(left + b'{"index": 0, "id": "r')  # and one that a full disk or the kill cut short
    status, _, stderr = run(*batch(lines, part.name))
    assert status == 0
    assert "the last line was written in part only" in stderr
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
        (["--input", "requests.jsonl", "--output", "a", "--prompt", "Hi"], "--input brings prompts and images"),
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
