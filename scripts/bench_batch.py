"""Rows per second of a batch of pictures: one process as generate.py runs it, or actors of Ray as batch_ray.py does.

    python scripts/bench_batch.py --load-format dummy --through process
    python scripts/bench_batch.py --load-format dummy --through ray --actors 1
    python scripts/bench_batch.py --load-format dummy --through ray --actors 2        # on two cards

All read the same parquet of JPEGs of mixed sizes, with a question each, and write JSON lines. What is timed goes from
the first row's reading to the last row's writing; starting Ray and loading models are reported apart. The busy share of
a card is what nvidia-smi says: of the time, in which anything was running on it. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import cli_options as cli
from program import any_text, json_line
from qwen3vl_moe.errors import OptionError, UserError

RESOLUTIONS = ((224, 224), (448, 336), (560, 560), (640, 480), (768, 1024), (1280, 720))

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    through: Annotated[str, typer.Option(help="process, or ray.")] = "process",
    model: cli.ModelOrSizes = None,
    load_format: cli.LoadFormatOrSizes = "auto",
    routing: Annotated[str | None, typer.Option(help="With dummy: balanced or skewed.")] = None,
    actors: Annotated[int, typer.Option(min=1, help="Of Ray.")] = 1,
    num_gpus: Annotated[int, typer.Option(min=0, max=1, help="Of an actor or the process; 0: on CPUs.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Pictures.")] = 2000,
    rows_per_part: Annotated[int, typer.Option(min=1, help="Of Ray, at a time.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of every answer: none ends before.")] = 32,
    moe: cli.Moe = "auto",
) -> None:
    """Rows per second of a batch of pictures, in one process or through Ray."""
    try:
        if through not in ("process", "ray"):
            raise OptionError(f"--through {through}: process or ray is needed")
        from batch_inputs import InputOptions, Job, open_input
        from batch_parts import Parts
        from batch_run import Output
        from qwen3vl_moe.engine import SamplingParams

        device = "cuda" if num_gpus else "cpu"
        load = partial(_load, model, load_format=load_format, device=device, moe=moe, routing=routing)
        job = Job(SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True), {}, InputOptions(), rows=True)
        with tempfile.TemporaryDirectory() as folder:
            source = open_input(_write_pictures(Path(folder) / "pictures.parquet", rows), job)
            output = Output.of(Path(folder) / "answers.jsonl", source.kind, "model", True, "", table=False)
            if through == "process":
                found = _process(load, source, output)
            else:
                parts = Parts(Path(folder) / "parts", source, job, output, rows_per_part)
                found = _ray(parts, load, actors, num_gpus)
        found |= {"rows": rows, "rows_per_second": rows / found["seconds"], "max_tokens": max_tokens}
        busy = ", ".join(f"card {card} busy {share:.0%}" for card, share in found["busy"].items())
        stderr.print(
            f"{through}: {found['rows_per_second']:.1f} rows/s ({rows} in {found['seconds']:.1f} s), {found['errors']} "
            f"errors; {found['before']:.1f} s of loading before; {busy or 'no card'}"
        )
        sys.stdout.write(json_line({"through": through, **({"actors": actors} if through == "ray" else {}), **found}))
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None


def _load(model: str | None, load_format: str, **arguments: Any) -> Any:
    from benchmarking.loading import load_llm

    return load_llm(model, load_format=load_format, **arguments)


def _write_pictures(path: Path, rows: int) -> Path:
    """JPEGs of noise, which cost the most to decode; the same in each run."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarking.inputs import make_image

    rng = np.random.default_rng(0)
    some = [make_image("random", RESOLUTIONS[n % len(RESOLUTIONS)], "jpeg", rng) for n in range(min(rows, 96))]
    # What follows a JPEG's end makes it another file: no row finds the tokens of an equal picture in the cache.
    images = [some[n % len(some)] + n.to_bytes(4, "big") for n in range(rows)]
    table = {"image": images, "prompt": ["What is this?"] * rows}
    pq.write_table(pa.table(table), path, row_group_size=256)
    return path


def _process(load: Any, source: Any, output: Any) -> dict[str, Any]:
    from batch_run import answer_input

    begun, loaded = time.monotonic(), []

    def timed() -> Any:
        llm = load()
        loaded.append(time.monotonic())
        return llm

    with card_use() as samples:
        status = answer_input(timed, source, (0, len(source)), output, Console(file=sys.stderr, quiet=True))
    ended = time.monotonic()
    times = loaded[0], ended
    errors = sum("error" in json.loads(line) for line in output.path.read_text().splitlines()) if status else 0
    return {
        "seconds": ended - times[0],
        "before": times[0] - begun,
        "errors": errors,
        "busy": busy_shares(samples, times),
    }


def _ray(parts: Any, load: Any, actors: int, num_gpus: int) -> dict[str, Any]:
    from batch_ray import Actors, answered_parts

    begun = time.time()
    shift = begun - time.monotonic()
    first, last, errors = float("inf"), 0.0, 0
    with card_use() as samples:
        for done in answered_parts(parts.todo, load, Actors(actors, "GPU" if num_gpus else "CPU")):
            if done["problem"]:
                raise UserError(done["problem"])
            first, last, errors = min(first, done["begun"]), max(last, done["ended"]), errors + done["errors"]
    busy = busy_shares(samples, (first - shift, last - shift))
    return {"seconds": last - first, "before": first - begun, "errors": errors, "busy": busy}


Samples = list[tuple[float, int, float]]  # when (monotonic), which card, its busy share of the last moments


@contextmanager
def card_use() -> Iterator[Samples]:
    """What nvidia-smi says of every card, twice a second, while the block runs; nothing where there is none."""
    samples: Samples = []
    program = shutil.which("nvidia-smi")
    if program is None:
        yield samples
        return
    query = [program, "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        for line in process.stdout or ():
            card, share = line.split(",")
            samples.append((time.monotonic(), int(card), float(share) / 100))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        process.terminate()
        thread.join()
        process.wait()


def busy_shares(samples: Samples, times: tuple[float, float]) -> dict[int, float]:
    """The mean busy share of each card between two times; cards that were idle all along are left out."""
    found: dict[int, list[float]] = {}
    for at, card, share in samples:
        if times[0] <= at <= times[1]:
            found.setdefault(card, []).append(share)
    return {card: sum(shares) / len(shares) for card, shares in found.items() if any(shares)}


if __name__ == "__main__":
    any_text()
    app()
