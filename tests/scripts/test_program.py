"""stdout and stderr of any encoding take whatever a program has to say."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from program import any_text, json_line

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (".", "kernels", "scripts", "eval")
SLOW = {"torch", "transformers", "numpy", "triton", "pyarrow", "ray", "matplotlib", "fastapi"}
OWN_HELP = ("lm.py", "command_line.py")  # of lm-eval, and of the list of commands
TEXT = "naïve 漢字 😀 \ud800 \udcff"
PROGRAMS = sorted(
    path
    for folder in ("scripts", "eval")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


ENCODINGS = pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])


def open_streams(monkeypatch, encoding):
    """stdout and stderr of an encoding, as Python opens them."""
    names = ("stdout", "stderr")
    for name in names:
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict"))
    any_text()
    return [getattr(sys, name) for name in names]


def written(stream):
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


@ENCODINGS
def test_any_text_can_be_written(monkeypatch, encoding):
    for stream in open_streams(monkeypatch, encoding):
        print(TEXT, file=stream)
        Console(file=stream, highlight=False, markup=False, soft_wrap=True).print(TEXT)
        text = written(stream)
        assert text.count("\\ud800 \\udcff") == 2
        assert text.count("naïve" if encoding != "ascii" else "na\\xefve") == 2
        assert text.count("漢字 😀" if encoding == "utf-8" else "\\u6f22\\u5b57 \\U0001f600") == 2


@ENCODINGS
def test_json_stays_json(monkeypatch, encoding):
    """An escape of Python's, such as \\xef, would be none of JSON."""
    stdout, _ = open_streams(monkeypatch, encoding)
    stdout.write(json_line({"text": TEXT}))
    text = written(stdout)
    assert json.loads(text) == {"text": TEXT}
    assert ("漢字" in text) == (encoding == "utf-8")


def test_there_may_be_no_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    any_text()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_program_begins_so(program):
    block = re.search(r'^if __name__ == "__main__":.*\n((?:    .*\n|\n)+)', program.read_text(encoding="utf-8"), re.M)
    lines = [line.strip() for line in block[1].splitlines() if line.strip() not in ("", "raise SystemExit")]
    assert lines.index("any_text()") == len(lines) - 2, "right before the program itself"


def test_help_imports_nothing_slow():
    """Neither torch nor what brings it: `--help` is read more often than a program is run. (One process for all.)"""
    code = (
        "import contextlib, io, runpy, sys\n"
        f"slow = {SLOW!r}\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--help']\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:\n"
        "        runpy.run_path(path, run_name='__main__')\n"
        "    print(path, 'Usage:' in shown.getvalue(), slow & sys.modules.keys())\n"
    )
    programs = [str(path.relative_to(ROOT)) for path in PROGRAMS if path.name not in OWN_HELP]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / each) for each in SOURCES)}
    command = [sys.executable, "-c", code, *programs]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"{program} True set()" for program in programs], done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict"])
def test_an_error_about_an_odd_name(encoding):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONIOENCODING": encoding}
    command = [sys.executable, ROOT / "scripts/generate.py", "--prompt", "Hi", "--image", "漢\udcff.png"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == ["error: image 0 ('\\u6f22\\udcff.png'): there is no such file"]
