"""scripts/bench_batch.py: the process's way, and what is made of nvidia-smi's samples."""

import json

import pytest
from typer.testing import CliRunner

import bench_batch


def test_one_process(plain):
    arguments = ["--model", plain.path, "--num-gpus", 0, "--rows", 7, "--max-tokens", 2]
    result = CliRunner().invoke(bench_batch.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["through"], found["rows"], found["errors"], found["busy"]) == ("process", 7, 0, {})
    assert found["rows_per_second"] == pytest.approx(7 / found["seconds"])


def test_busy_shares_are_of_the_timed_span():
    samples = [(0.0, 0, 1.0), (1.0, 0, 0.5), (1.0, 1, 0.0), (2.0, 0, 1.0), (2.0, 1, 0.0), (9.0, 1, 1.0)]
    assert bench_batch.busy_shares(samples, (0.5, 3.0)) == {0: 0.75}
