"""scripts/generate.py with videos: in a call, and in a file of requests."""

from __future__ import annotations

import json

import pytest

from qwen3vl_moe.engine import LLM, SamplingParams
from tests.inputs.clips import make_clip
from tests.scripts.generate.conftest import records

pytest.importorskip("av", reason="videos need PyAV")


@pytest.fixture
def clip(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(make_clip())
    return tmp_path / "clip.mp4"


def test_a_call_and_a_file_of_requests_answer_alike(run, plain, clip, batch, tmp_path):
    arguments = ["--model", plain.path, "--device", "cpu", "--video", clip, "--prompt", "Hi", "--max-tokens", 9]
    status, stdout, _ = run(*arguments, "--json", "--temperature", 0, "--fps", 3)
    assert status == 0
    answer = json.loads(stdout)
    content = [{"type": "video", "video": str(clip), "fps": 3}, {"type": "text", "text": "Hi"}]
    params = SamplingParams(max_tokens=9, temperature=0)
    (output,) = LLM(plain.path, device="cpu", progress=False).chat([{"role": "user", "content": content}], params)
    assert answer["token_ids"] == output.outputs[0].token_ids
    assert answer["image_tokens"] == output.num_image_tokens > 0

    content[0]["video"] = "clip.mp4"
    lines = [{"messages": [{"role": "user", "content": content}]}, {"prompt": "Hi", "video": "clip.mp4"}]
    assert run(*batch([*lines, {"prompt": "Hi", "video": "no.mp4"}]))[0] == 1
    by_fps, by_default, missing = records(tmp_path / "answers.jsonl")
    assert by_fps["text"] == answer["text"]
    assert by_default["image_tokens"] > 0
    assert "there is no such file" in missing["error"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--video", "no.mp4"], "video 0 ('no.mp4'): there is no such file"),
        (["--fps", 2], "--fps is of videos: give --video"),
        (["--video", __file__], "is not a video that can be read"),
        (["--video", "CLIP", "--fps", -1], "fps -1.0; a number of frames a second"),
    ],
)
def test_mistakes_show_before_the_weights_are_loaded(run, clip, options, said):
    options = [clip if option == "CLIP" else option for option in options]
    status, stdout, stderr = run("--model", "no/such/model", "--prompt", "Hi", *options)
    assert (status, stdout) == (2, "")
    [line] = stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
