"""The program as a module and as a process, and pictures for it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "generate.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("generate_program", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(program):
    """Run the program in this process: (exit status, stdout, stderr)."""

    def call(*arguments, stdin=""):
        result = CliRunner().invoke(program.app, [str(a) for a in arguments], input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two image files, one wide and red, one high and blue."""
    directory = tmp_path_factory.mktemp("pictures")
    paths = directory / "red.png", directory / "blue.jpg"
    Image.new("RGB", (48, 24), "red").save(paths[0])
    Image.new("RGB", (16, 40), "blue").save(paths[1])
    return paths


@pytest.fixture(autouse=True)
def _ctrl_c_arrives():
    """A job in the background of a shell ignores SIGINT, and its children would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def start():
    """Start the program in a process of its own."""

    def call(*arguments, **options):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        return subprocess.Popen(command, env=ENVIRONMENT, **pipes | options)

    return call


@pytest.fixture
def batch(plain, tmp_path):
    """Arguments for a file of requests in ``tmp_path``, with the answers beside it."""

    def write(lines, output="answers.jsonl"):
        source = tmp_path / "requests.jsonl"
        source.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        files = ["--input", source, "--output", tmp_path / output]
        return [*files, "--model", plain.path, "--device", "cpu", "--temperature", 0, "--max-tokens", 9]

    return write


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
