"""All hostile lines in one file of requests: each gets its record, and none keeps another from its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hostile.request_lines import cases

ROOT = Path(__file__).resolve().parents[2]
SOUND = b'{"prompt": "How many?", "max_tokens": 1}'


def test_no_line_ends_a_batch(tmp_path):
    lines = [line for _, line in cases() if line.strip() and b"\n" not in line]
    # Ids are unique, and a sound line stands after each.
    lines = [
        line.replace(b'"id": "a"', b'"id": "%d"' % n).replace(b'"id": 7', b'"id": %d' % n)
        for n, line in enumerate(lines)
    ]
    requests, answers = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_bytes(b"".join(line + b"\n" + SOUND + b"\n" for line in lines))
    command = [sys.executable, "scripts/generate.py", "--model", "demo", "--device", "cpu", "--max-tokens", "1"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--input", requests, "--output", answers],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert b"Traceback" not in done.stderr
    records = [json.loads(line) for line in answers.read_bytes().splitlines()]
    assert [record["index"] for record in records] == list(range(2 * len(lines)))
    assert all("text" in record for record in records[1::2])
    errors = [record["error"] for record in records[::2] if "error" in record]
    assert 400 < len(errors) < len(lines)
    assert all(error.isprintable() and len(error) <= 1200 for error in errors)
