"""Answer a batch on many GPUs and many machines, with Ray Data doing the distribution.

    pip install -e '.[ray]'
    python scripts/batch_ray.py --model Qwen/Qwen3-VL-30B-A3B-Instruct --actors 8 --input 'data/*.parquet' --output out

Inputs and answers are those of generate.py (docs/batches.md). The input is cut into parts of some hundred rows. An
actor, which holds a GPU and a model, works on several parts at a time and writes a file for each; nothing but their
names passes through the driver. --output x.parquet or x.jsonl becomes one file of all in the end; a folder keeps the
parts. The same command goes on after an interruption of any kind with the parts that are not there. All machines have
to see input, model and output under the same paths, and to have this package installed.

For a dataset of your own, ``from batch_worker import Worker`` gives the class for ``map_batches`` (docs/scale.md).

Exit status: as of generate.py.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import batch_options as batch
import cli_options as cli
from program import any_text
from qwen3vl_moe.errors import OptionError, UserError, one_line

if TYPE_CHECKING:
    from batch_parts import Parts
    from batch_worker import Part

SECONDS_BETWEEN_LINES = 30.0  # of progress
PARTS_AT_A_TIME = 3  # of an actor: while one ends and is written, the others keep the engine full

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[
        Path, typer.Option("--input", help="What to answer: a file, folder or pattern, as generate.py reads it.")
    ],
    output: Annotated[
        Path, typer.Option(help="A file in .parquet or .jsonl, or a folder, which keeps a file for each part.")
    ],
    model: cli.Model = "demo",
    actors: Annotated[int, typer.Option(min=1, help="How many models answer at a time.")] = 1,
    num_gpus: Annotated[
        int, typer.Option(min=0, max=1, help="1: on GPUs, as many an actor as --tensor-parallel-size; 0: on CPUs.")
    ] = 1,
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's, 'auto' for this machine's. [default: RAY_ADDRESS, or none]"),
    ] = None,
    rows_per_part: Annotated[int, typer.Option(min=1, help="About how many rows an actor takes at a time.")] = 256,
    format: Annotated[str, typer.Option(help="Of the files in a folder: parquet or jsonl.")] = "parquet",
    prompt: Annotated[str | None, typer.Option(help="What is asked of rows that bring no prompt.")] = None,
    prompt_column: batch.PromptColumn = None,
    image_column: batch.ImageColumn = None,
    id_column: batch.IdColumn = None,
    keep_input: batch.KeepInput = False,
    drop: batch.Drop = None,
    prefix: batch.Prefix = "",
    served_model_name: batch.ServedModelName = None,
    max_tokens: cli.MaxTokens = 512,
    temperature: cli.Temperature = None,
    top_p: cli.TopP = None,
    top_k: cli.TopK = None,
    min_p: cli.MinP = None,
    repetition_penalty: cli.RepetitionPenalty = None,
    presence_penalty: cli.PresencePenalty = None,
    frequency_penalty: cli.FrequencyPenalty = None,
    stop: cli.Stop = None,
    seed: cli.Seed = None,
    sampling: cli.Sampling = None,
    dtype: cli.Dtype = "auto",
    moe: cli.Moe = "auto",
    max_model_len: cli.MaxModelLen = None,
    max_num_seqs: cli.MaxNumSeqs = None,
    max_prefill_tokens: cli.MaxPrefillTokens = None,
    gpu_memory_utilization: cli.GpuMemoryUtilization = None,
    kv_cache_dtype: cli.KvCacheDtype = "auto",
    tensor_parallel_size: cli.TensorParallelSize = 1,
    eager: cli.Eager = False,
    min_pixels: cli.MinPixels = None,
    max_pixels: cli.MaxPixels = None,
    expert_layout: cli.ExpertLayout = None,
    engine: cli.Engine = None,
    media_root: cli.MediaRoot = None,
    allow_hosts: cli.AllowHosts = None,
    allow_private_hosts: batch.AllowPrivateHosts = None,
) -> None:
    """Answer a batch on many GPUs and many machines, with Ray Data doing the distribution.

    Exit status: 0 done, 1 some requests could not be answered, 2 an error in the call, 130 interrupted.
    """
    given = {**locals(), "allow_private_hosts": bool(allow_private_hosts)}
    try:
        if importlib.util.find_spec("ray") is None:
            raise UserError("Ray is not installed: pip install -e '.[ray]' (scripts/generate.py needs none)")
        if format not in ("parquet", "jsonl"):
            raise OptionError(f"--format {format}: parquet or jsonl is needed")
        from batch_inputs import Job, open_input
        from batch_parts import Parts
        from batch_run import Output, ended_by_signals, is_table

        one_file = is_table(output) or output.suffix.lower() == ".jsonl"
        understood = batch.input_options(
            model, prompt, prompt_column, image_column, id_column, keep_input, drop, served_model_name
        )
        params, options = cli.sampling_params(given), cli.engine_options(given)
        if tensor_parallel_size < 1:
            raise OptionError(f"--tensor-parallel-size {tensor_parallel_size}: 1 or more is needed")
        if "data_parallel_size" in options:
            raise OptionError("--engine says data_parallel_size; here --actors are the engines that share requests")
        options["progress"] = False
        table = is_table(output) if one_file else format == "parquet"
        job = Job(params, batch.answer_settings(given), understood, rows=not table)
        opened = open_input(source.absolute(), job)  # other processes have other working directories
        for note in opened.notes:
            stderr.print(note, style="dim")
        if opened.kind == "openai" and not one_file:
            table = False
        keeps = keep_input or opened.kind not in ("lines", "openai")
        form = Output.of(output.absolute(), opened.kind, served_model_name or model, keeps, prefix, table)
        if table:
            from batch_tables import check_columns

            check_columns(opened.schema(), prefix)
        folder = output.with_name(f"{output.name}.parts").absolute() if one_file else output.absolute()
        if one_file and output.exists() and not folder.exists():
            raise typer.Exit(_finished(form, opened))
        parts = Parts(folder, opened, job, form, rows_per_part)
        limits = cli.media_limits(given)
        limits |= {"media_root": None if media_root is None else media_root.absolute()}
        load = partial(
            _load,
            str(Path(model).absolute()) if model != "demo" and Path(model).is_dir() else model,
            device="cuda" if num_gpus else "cpu",
            **options,
            **limits,
        )
        each = Actors(actors, "GPU" if num_gpus else "CPU", tensor_parallel_size)
        with parts.locked(), ended_by_signals():
            speed = _answer(parts, load, each, address, len(opened)) if parts.todo else "nothing to do"
            errors = parts.count_errors()
            if one_file:
                parts.join(output.absolute())
                parts.remove()
        name = one_line(str(output))
        stderr.print(f"{name} is complete: {len(opened) - errors} answers, {errors} errors; {speed}")
        raise typer.Exit(1 if errors else 0)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print("interrupted: the same command goes on")
        raise typer.Exit(130) from None


def _load(model: str, **arguments: Any) -> Any:
    from qwen3vl_moe.engine import LLM

    return LLM(model, **arguments)


def _finished(output: Any, source: Any) -> int:
    """The exit status of a job whose one file is there.

    Raises:
        UserError: the file holds something else, or lacks answers.
    """
    from batch_answers import AnswerFile
    from batch_run import check_table

    requests = source.requests(0, len(source))
    if output.table:
        errors = check_table(output, requests, source.path)
    else:
        with AnswerFile(output.path, requests, source.path, output.form) as answers:
            errors = answers.num_errors
            if answers.todo:
                raise UserError(
                    f"{output.path} has {len(answers.done)} of {len(requests)} answers: scripts/generate.py, with the "
                    "same options, adds the others to it"
                )
    name = one_line(str(output.path))
    stderr.print(f"{name} is complete: {len(requests) - errors} answers, {errors} errors; nothing to do")
    return 1 if errors else 0


def _answer(parts: Parts, load: Any, actors: Actors, address: str | None, rows: int) -> str:
    """Have all parts that are left answered; how fast that was, in words."""
    if parts.done:
        stderr.print(f"{parts.folder} has {parts.done} parts; going on with the other {len(parts.todo)}")
    counts, begun, said = Counts(rows), time.monotonic(), time.monotonic()
    for done in answered_parts(parts.todo, load, actors, address):
        if done["problem"]:
            raise UserError(f"{done['problem']} (worker {done['worker']})")
        if counts.add(done):
            stderr.print(f"worker {done['worker']}: {done['settings']}", style="dim")
        if time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            stderr.print(counts.line(said - begun))
    for line in counts.by_worker():
        stderr.print(line, style="dim")
    return f"{counts.speed(time.monotonic() - begun)}, with starting and loading"


@dataclass(frozen=True)
class Actors:
    """Which actors there are to be.

    Attributes:
        count: most of them.
        unit: "GPU" or "CPU".
        each: how many of these an actor has: as many as its model has ranks.
    """

    count: int
    unit: str
    each: int = 1


def answered_parts(
    todo: Sequence[Part], load: Callable[[], Any], actors: Actors, address: str | None = None
) -> Iterator[dict[str, Any]]:
    """What :class:`.PartWorker` says of each part, as soon as it is written.

    Args:
        load: gives an actor its model.
        actors: no more of them than parts.
        address: of the cluster; None: RAY_ADDRESS, else Ray is started here. What is started here is ended.

    Raises:
        UserError: the cluster has nothing to run an actor on, or Ray has given up.
    """
    # Each pool of actors would be told of as an error, "has constructor arguments in the object store".
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data
    from ray.exceptions import RayError

    from batch_worker import PartWorker

    started = not ray.is_initialized()
    try:
        if started:
            _connect(address or os.environ.get("RAY_ADDRESS", "local"))
        unit, each = actors.unit, actors.each
        there = [int(node["Resources"].get(unit, 0)) for node in ray.nodes() if node["Alive"]]
        if max(there, default=0) < each:
            needed = f"{each} {unit}s" if each > 1 else f"a {unit}"
            raise UserError(f"no machine of the cluster has {needed}" + ("; --num-gpus 0 takes CPUs" * (unit == "GPU")))
        seats = sum(count // each for count in there)
        if seats < actors.count:
            having = f"{sum(there)} {unit}s" + (f", {each} an actor" if each > 1 else "")
            stderr.print(f"the cluster has {having}, so {actors.count - seats} of {actors.count} actors wait for more")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it tells of its own absence
        ray.data.DataContext.get_current().enable_progress_bars = False
        pool = ray.data.ActorPoolStrategy(
            size=min(actors.count, len(todo)),
            max_concurrent_calls_per_actor=PARTS_AT_A_TIME,
            max_tasks_in_flight_per_actor=PARTS_AT_A_TIME + 1,
        )
        items = [{"part": pickle.dumps(part)} for part in todo]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            PartWorker,
            batch_size=1,
            compute=pool,
            fn_constructor_kwargs={"load": load},
            **{f"num_{unit.lower()}s": each},
        )
        yield from done.iter_rows()
    except (RayError, ConnectionError) as error:
        last = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise UserError(f"Ray has given up: {last.strip()}; /tmp/ray/session_latest/logs has more") from None
    finally:
        if started:
            ray.shutdown()


def _connect(address: str) -> None:
    """Start Ray here, or join a cluster; workers find the modules beside this file either way."""
    import ray

    scripts = str(Path(__file__).resolve().parent)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        path = os.pathsep.join([scripts, *filter(None, [os.environ.get("PYTHONPATH")])])
        ray.init("local", include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
    else:
        ray.init(address, runtime_env={"working_dir": scripts}, **quiet)  # which travels to the other machines


class Counts:
    """What has been answered so far, of all and by worker."""

    def __init__(self, rows: int):
        self._all, self.rows, self.errors, self.tokens = rows, 0, 0, 0
        self._workers: dict[str, list[float]] = {}  # rows, tokens, when it began and ended

    def add(self, done: dict[str, Any]) -> bool:
        """Count a part; whether its worker is a new one."""
        new = done["worker"] not in self._workers
        row = self._workers.setdefault(done["worker"], [0, 0, done["begun"], done["ended"]])
        row[0] += done["rows"]
        row[1] += done["tokens"]
        row[2], row[3] = min(row[2], done["begun"]), max(row[3], done["ended"])
        self.rows += done["rows"]
        self.errors += done["errors"]
        self.tokens += done["tokens"]
        return new

    def speed(self, seconds: float) -> str:
        return f"{self.rows / max(seconds, 1e-9):.1f} rows/s, {self.tokens / max(seconds, 1e-9):.0f} answer tokens/s"

    def line(self, seconds: float) -> str:
        """All so far, and the range of the workers: one that is slow, or has its requests cut short, stands out."""
        spans = [(rows, tokens, max(ended - begun, 1e-9)) for rows, tokens, begun, ended in self._workers.values()]
        each = [
            f"{_range([n[at] / n[2] for n in spans])} {unit}" for at, unit in enumerate(("rows/s", "answer tokens/s"))
        ]
        total = f"{self.rows} of {self._all} rows, {self.errors} errors, {self.speed(seconds)}"
        return f"{total}; {len(spans)} workers, each {', '.join(each)}"

    def by_worker(self) -> Iterator[str]:
        """A line for each worker, of the time in which it had work: without loading and waiting."""
        for name, (rows, tokens, begun, ended) in self._workers.items():
            seconds = max(ended - begun, 1e-9)
            yield f"worker {name}: {rows:.0f} rows, {rows / seconds:.1f} rows/s, {tokens / seconds:.0f} answer tokens/s"


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


if __name__ == "__main__":
    any_text()
    sys.exit(app())
