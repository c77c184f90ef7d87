"""scripts/eval_demo.py: counts by kind as JSON, a sample picture, wrong calls in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

import eval_demo

ROOT = Path(__file__).resolve().parents[3]


def invoke(*options: object):
    return CliRunner().invoke(eval_demo.app, list(map(str, options)))


def test_counts_come_as_json(untrained):
    done = invoke("--model", untrained[0], "--questions", 3, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["pictures"]["all"]["of"] == 3


def test_counts_are_recorded_beside_what_was_recorded_before(untrained, tmp_path):
    folder = shutil.copytree(untrained[0], tmp_path / "demo")
    done = invoke("--model", folder, "--questions", 0, "--new", 2, "--device", "cpu", "--record")
    assert done.exit_code == 2
    assert "train_demo.py writes" in done.stderr
    (folder / "training.json").write_text('{"seed": 7, "final": {"pictures": {"all": {"right": 1, "of": 1}}}}')
    done = invoke("--model", folder, "--questions", 0, "--new", 2, "--device", "cpu", "--record")
    assert done.exit_code == 0, done.output
    record = json.loads((folder / "training.json").read_text())
    assert record["seed"] == 7
    assert record["final"]["pictures"]["all"] == {"right": 1, "of": 1}
    assert record["final"]["new"]["all"]["of"] == 2
    assert "device cpu" in record["final"]["evaluated_on"]


def test_the_sample_is_a_picture_with_its_question_and_answer(tmp_path):
    done = invoke("--sample", tmp_path / "new" / "picture.png")
    assert done.exit_code == 0, done.output
    asked = re.search(r"question: (.*)", done.stderr)[1]
    assert f'--prompt "{asked}"' in (ROOT / "Makefile").read_text()
    assert "expected: " in done.stderr
    assert Image.open(tmp_path / "new" / "picture.png").mode == "RGB"


def test_wrong_calls_are_one_line(tmp_path):
    for options, message in (
        ((), "--model"),
        (("--model", tmp_path / "none"), "train_demo.py"),
        (("--sample", tmp_path / "picture.unknown"), ".png"),
        (("--model", tmp_path, "--questions", 0), "--questions"),
    ):
        done = invoke(*options)
        assert done.exit_code == 2
        assert message in done.stderr
        assert "Traceback" not in done.output


def test_the_demo_by_its_name():
    done = invoke("--model", "demo", "--questions", 3, "--json")
    assert done.exit_code == 0
    assert sum(kind["of"] for kind in json.loads(done.stdout)["pictures"].values() if "of" in kind) >= 3
