"""scripts/bench_load.py: both loaders on the same files, the values compared, and clean errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarking import load_times
from scripts import bench_load

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    command = [sys.executable, "scripts/bench_load.py", *map(str, args)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def program():
    """The program in this process."""
    app = typer.Typer()
    app.command()(bench_load.main)
    return app


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache cannot be dropped here")
def test_both_loaders_on_a_synthetic_checkpoint(tmp_path):
    out = tmp_path / "figures.json"
    where = tmp_path / "weights"
    done = run("--dir", where, "--gb", 0.04, "--tiny", "--device", "cpu", "--rounds", 2, "--json", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["files"] > 1  # sharded
    assert report["gb"] > 0.04
    assert report["verified_tensors"] > 60
    assert len(report["runs"]) == 2 * 2 * 2  # rounds, cold and warm, two loaders
    assert all(row["seconds"] > 0 and row["gb_per_s"] > 0 for row in report["runs"])
    assert "warm: ours is " in done.stdout
    assert not where.exists()


def test_a_checkpoint_that_is_there_is_measured_and_left_alone(plain):
    files = sorted(path.name for path in plain.published.iterdir())
    done = run("--dir", plain.published, "--device", "cpu", "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in plain.published.iterdir()) == files


def test_errors_are_one_line(program, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("--dir", tmp_path, "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "not empty" in done.stderr.replace("\n", " ")
    assert (tmp_path / "notes.txt").exists()
    done = CliRunner().invoke(program, ["--dir", str(tmp_path / "new"), "--gb", "5000", "--device", "cpu"])
    assert done.exit_code == 2
    assert "--gb" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--gb", "nan"], "--gb nan: a positive number is needed"),
        (["--json", "no/such/place.json"], "--json no/such/place.json: there is no directory no/such"),
    ],
)
def test_options_are_checked_before_anything_is_written(program, tmp_path, options, message):
    done = CliRunner().invoke(program, ["--dir", str(tmp_path / "new"), "--device", "cpu", *options])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {message}")
    assert not (tmp_path / "new").exists()


def test_what_was_measured_is_kept_where_the_rest_fails(program, plain, tmp_path, monkeypatch):
    def fail(directory, files, device):
        raise OSError("the disk has gone")

    monkeypatch.setitem(load_times.LOADERS, "safetensors", fail)
    file = tmp_path / "out.json"
    done = CliRunner().invoke(program, ["--dir", str(plain.published), "--device", "cpu", "--json", str(file)])
    assert done.exit_code == 2
    assert "error: the disk has gone" in done.stderr
    (only,) = json.loads(file.read_text())["runs"]
    assert only["loader"] == "qwen3vl_moe"
    assert "qwen3vl_moe" in done.stdout
