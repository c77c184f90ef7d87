"""scripts/bench_engine.py: runs anywhere on the demo checkpoint, and refuses what it cannot do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarking import engine_steps
from benchmarking.loading import load_llm
from scripts import bench_engine

ROOT = Path(__file__).resolve().parents[2]


def run(*args):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "scripts/bench_engine.py", "--device", "cpu", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_every_figure_is_there(tmp_path):
    done = run("--model", "demo", "--quick", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["what"].split(",")[0] for row in rows] == [
        "time to first token",
        "decode step",
        "decode step",
        "prefill of 100 text tokens in one step",
        "vision tower",
    ]
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["p20_ms"] <= row["ms"] <= row["p80_ms"] for row in rows[1:3])
    assert all(row["floor_ms"] > 0 for row in rows[1:])
    assert rows[1]["note"] == "4 of 16 experts a layer"  # one token, four experts of it
    assert rows[3]["note"].endswith(" of 16 experts a layer")
    stages = [float(part.split()[1]) for part in rows[0]["note"].split(", ")]
    assert sum(stages) <= 1.3 * rows[0]["ms"]


def test_the_full_size_needs_a_gpu():
    app = typer.Typer()
    app.command()(bench_engine.main)
    done = CliRunner().invoke(app, ["--device", "cpu", "--load-format", "dummy"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: random weights at the 30B sizes need a GPU")


def test_timed_steps_are_those_in_which_all_decode(monkeypatch):
    """With a prefill of one sequence a step, the first ones are far ahead of the last, and end before them."""
    options = {"max_prefill_tokens": 40, "num_blocks": 64, "block_size": 16}
    llm = load_llm("qwen3vl_moe/demo", load_format="dummy", device="cpu", routing="balanced", **options)
    step, running = llm.engine.step, []

    def counted():
        running.append([sequence.pending for sequence in llm.engine.scheduler.running])
        step()

    llm.engine.step = counted
    timed = []
    monkeypatch.setattr(engine_steps.statistics, "median", lambda seconds: timed.append(len(seconds)) or 1.0)
    row = engine_steps.decode_step(llm, 6, 40, 1e9, np.random.default_rng(0), 16)
    together = sum(pending == [1] * 6 for pending in running)
    assert timed == [together - 1]  # one of them counted the experts
    assert 4 < together < 16 < len(running)
    assert row["note"].endswith("of 16 experts a layer")
    assert engine_steps.decode_step(llm, 20, 40, 1e9, np.random.default_rng(0), 16) is None


def test_what_a_step_reads():
    llm = load_llm("qwen3vl_moe/demo", load_format="dummy", device="cpu")
    text, parameters = llm.engine.model.text, dict(llm.engine.model.named_parameters())
    experts = sum(p.nbytes for layer in text.layers for p in layer.moe.experts.parameters())
    whole = sum(p.nbytes for n, p in parameters.items() if n.startswith(("text.", "lm_head")))
    whole -= text.embed.weight.nbytes  # of which a step reads a few rows
    assert engine_steps.bytes_of_step(llm, 16, 0) == whole
    assert engine_steps.bytes_of_step(llm, 4, 0) == whole - experts * 12 / 16
    cache = llm.engine.cache
    a_token = cache.tensor.nbytes / (cache.num_blocks * cache.block_size)
    assert engine_steps.bytes_of_step(llm, 16, 100) == whole + 100 * a_token


def test_what_was_measured_is_kept_where_the_rest_fails(monkeypatch, tmp_path, capsys):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no room for the pictures")

    monkeypatch.setattr(engine_steps, "vision_call", fail)
    file = tmp_path / "out.json"
    with pytest.raises(torch.OutOfMemoryError):
        bench_engine.main("demo", "auto", "balanced", "cpu", "auto", "auto", 1, False, True, False, file, None)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 4
    assert "prefill of 100 text tokens" in capsys.readouterr().out
