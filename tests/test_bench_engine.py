"""scripts/bench_engine.py: runs anywhere on the demo checkpoint, and refuses what it cannot do."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    assert all(row["floor_ms"] > 0 for row in rows[1:])
    assert rows[1]["note"] == "4 of 16 experts a layer"  # one token, four experts of it
    stages = [float(part.split()[1]) for part in rows[0]["note"].split(", ")]
    assert sum(stages) <= 1.3 * rows[0]["ms"]


def test_the_full_size_needs_a_gpu():
    done = run("--model", "random")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model random")
