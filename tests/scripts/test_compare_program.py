"""scripts/compare_transformers.py: a verdict on a real directory, and clean errors."""

import json
import subprocess
import sys
from pathlib import Path

import typer
from PIL import Image
from typer.testing import CliRunner

from scripts import compare_transformers
from tests.fp8 import write_fp8
from tests.inputs.clips import make_clip

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    command = [sys.executable, "scripts/compare_transformers.py", *map(str, args)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def here(*args):
    """The program in this process."""
    app = typer.Typer()
    app.command()(compare_transformers.main)
    return CliRunner().invoke(app, list(map(str, args)))


def test_our_bf16_is_as_good_as_transformers(plain, tmp_path):
    image = tmp_path / "green.png"
    Image.new("RGB", (40, 30), "green").save(image)
    out, clip = tmp_path / "figures.json", tmp_path / "clip.mp4"
    clip.write_bytes(make_clip())
    arguments = ["--image", image, "--video", clip, "--json", out, "--device", "cpu"]
    done = run("--model", plain.published, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert [row["verdict"] for row in rows] == ["right", "the peer"] * 3
    assert all(0 < row["relative"] < 1 and 0 <= row["top1"] <= 1 for row in rows)


def test_errors_are_one_line(tmp_path):
    done = run("--model", tmp_path, "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    done = here("--model", tmp_path, "--json", tmp_path / "no" / "figures.json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"error: --json {tmp_path}/no/figures.json: there is no directory {tmp_path}/no\n"
    done = here("--load-format", "dummy", "--dtype", "float32", "--device", "cpu")
    assert done.exit_code == 2
    assert "fp32 evaluation" in done.stderr


def test_fp8_is_refused_before_anything_is_made(plain, tmp_path):
    done = here("--load-format", "dummy-fp8", "--device", "cpu")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: weights in FP8 cannot be compared")
    write_fp8(plain.published, tmp_path, published=True)
    (tmp_path / "model.safetensors").unlink()  # so that loading it would be another error
    done = here("--model", tmp_path, "--device", "cpu")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: weights in FP8 cannot be compared")
