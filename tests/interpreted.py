"""Triton's interpreter has to be chosen before triton is imported, so its tests run in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available()
# Where the model's kernels are tested: compiled on a GPU, else interpreted.
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]
runs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's own process")
ROOT = Path(__file__).resolve().parents[1]


def run_in_interpreter(tests: str | Path, at_least: int) -> None:
    """Run a test file, or ``file::test``, with kernels interpreted; at least so many of its tests must pass."""
    pytest.importorskip("triton", reason="triton is not installed, and with it its interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.quick_interpreter", str(tests)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least, done.stdout[-2000:]
