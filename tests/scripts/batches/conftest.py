"""The same rows as every kind of input, and the programs run over them in this process."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import generate
from batch_inputs import InputOptions, Job, open_input
from qwen3vl_moe.engine import SamplingParams

QUESTION = "What colour is the circle?"
COLOURS = ("red", "green", "blue", "yellow")
PARAMS = SamplingParams(max_tokens=4, temperature=0)


def picture(number: int) -> bytes:
    """A picture of its own size with one circle; the size and the colour depend on the number."""
    image = Image.new("RGB", (64 + 32 * (number % 3), 64 + 32 * (number % 2)), "white")
    ImageDraw.Draw(image).ellipse((12 + number % 7, 10, 48 + number % 7, 46), fill=COLOURS[number % 4])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, columns: dict, rows_per_group: int = 8) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


@pytest.fixture(scope="session")
def opened():
    """``opened(path, **options)``: the input as a source."""

    def call(path, *, rows=False, params=PARAMS, **options):
        return open_input(Path(path), Job(params, {"model": "m"}, InputOptions(**options), rows))

    return call


@pytest.fixture(scope="session")
def run():
    """``run(program, *arguments)``: (exit status, stderr), in this process."""

    def call(program, *arguments):
        result = CliRunner().invoke(program.app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stderr

    return call


@pytest.fixture(scope="session")
def generated(run):
    """``generated(model, source, output, *options)`` runs generate.py, greedily and on the CPU."""

    def call(model, source, output, *options):
        common = ["--model", model, "--device", "cpu", "--temperature", 0, "--max-tokens", 4]
        return run(generate, *common, "--input", source, "--output", output, *options)

    return call


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
