"""Triton's interpreter has to be chosen before triton is imported, so its tests run in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[1]


def run_in_interpreter(tests: str | Path, at_least: int) -> None:
    """Run a test file, or ``file::test``, with kernels interpreted; at least so many of its tests must pass."""
    pytest.importorskip("triton", reason="triton is not installed, and with it its interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least, done.stdout[-2000:]
