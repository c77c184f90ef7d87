"""scripts/bench_serving.py: both ways do the same work, and it says what one costs beside the other."""

import json

import pytest
from typer.testing import CliRunner

import bench_serving

SMALL = ["--model", "demo", "--image-resolution", "64x96", "--random-input-len", "24", "--random-output-len", "6"]


def test_both_ways_do_the_same_work(tmp_path):
    file = tmp_path / "figures.json"
    options = ["--num-prompts", "6", "--max-concurrency", "3", "--rounds", "1", "--json", str(file)]
    result = CliRunner().invoke(bench_serving.app, [*SMALL, *options])
    assert result.exit_code == 0, result.stderr
    [figures] = json.loads(file.read_text())
    ways = [figures["rounds"][way][0] for way in bench_serving.WAYS]
    for name in ("completed", "output_tokens", "input_vision_tokens"):
        assert ways[0][name] == ways[1][name] > 0
    assert all(way["ttft"]["count"] == 6 for way in ways)
    assert result.stdout.count("Serving Benchmark Result") == 2
    assert "times" in result.stdout.splitlines()[-1]


def test_a_pretended_device_tells_how_long_it_waited(tmp_path):
    file = tmp_path / "figures.json"
    options = ["--pretend-device", "--num-prompts", "8", "--max-concurrency", "3", "--rounds", "1"]
    result = CliRunner().invoke(bench_serving.app, [*SMALL, *options, "--json", str(file)])
    assert result.exit_code == 0, result.stderr
    [figures] = json.loads(file.read_text())
    for way in bench_serving.WAYS:
        [found] = figures["rounds"][way]
        assert found["completed"] == 8
        assert found["idle"]["count"] > 0
        assert found["idle"]["max"] > 0
    assert "device idle a step" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-concurrency", "4,x"], "--max-concurrency '4,x'"),
        (["--rounds", "0"], "--rounds 0"),
        (["--pretend-device", "--device", "cuda"], "--pretend-device and --device cuda contradict"),
        (["--json", "/no/such/folder/x.json"], "there is no directory"),
        (["--image-format", "gif"], "gif"),
    ],
)
def test_mistakes_are_one_line(options, said):
    result = CliRunner().invoke(bench_serving.app, [*SMALL, *options])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
