"""Answering what is left of an input (batch_inputs.py), in this process: progress, signals, and the file of answers."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batch_answers import AnswerFile
from batch_file import FileRequest
from batch_inputs import Source, require_pyarrow
from batch_model import answered
from batch_records import OpenAIForm, PlainForm, RecordForm
from qwen3vl_moe.errors import OptionError, UserError, one_line

if TYPE_CHECKING:
    from qwen3vl_moe.engine import LLM

SECONDS_BETWEEN_LINES = 30.0  # of progress, where stderr is no terminal


@dataclass(frozen=True)
class Output:
    """Where answers go, and in which form.

    Attributes:
        path: the file.
        form: of a record in JSON lines, which is what answers are until all are there.
        table: whether the file is parquet.
        prefix: of the columns of answers there.
    """

    path: Path
    form: RecordForm
    table: bool
    prefix: str = ""

    @classmethod
    def of(cls, path: Path, source_kind: str, model: str, keep_input: bool, prefix: str, table: bool) -> Output:
        """The output that fits an input.

        Raises:
            UserError: OpenAI's format is no table, or pyarrow is missing.
        """
        if source_kind == "openai":
            if table:
                raise OptionError(f"{path}: OpenAI's batch format is answered in JSON lines; give a name in .jsonl")
            return cls(path, OpenAIForm(model), False)
        if table:
            require_pyarrow(path)
            return cls(path, PlainForm(), True, prefix)
        if prefix:
            raise OptionError("--prefix is for the columns of a parquet file; in JSON lines the input has its own key")
        return cls(path, PlainForm(keep_input), False)


def is_table(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def answer_input(
    load: Callable[[], LLM], source: Source, rows: tuple[int, int], output: Output, console: Console
) -> int:
    """Answer what is left of some rows of an input.

    Args:
        load: gives the model, if there is anything to answer.
        rows: from which to which.

    Returns:
        The exit status: 1 if there are errors among the answers, else 0.

    Raises:
        UserError: the output holds something else, or cannot be written.
    """
    requests, name = source.requests(*rows), one_line(str(output.path))
    if output.table:
        from batch_tables import check_columns

        check_columns(source.schema(), output.prefix)
    journal = output.path.with_name(f"{output.path.name}.partial.jsonl") if output.table else output.path
    if output.table and output.path.exists() and not journal.exists():
        errors = check_table(output, requests, source.path)
        console.print(_complete(name, len(requests), errors, "nothing to do"))
        return 1 if errors else 0
    with AnswerFile(journal, requests, source.path, output.form) as answers:
        todo, before = answers.todo, len(answers.done)
        if answers.repaired:
            console.print(f"{one_line(str(journal))}: what was written in part only is answered again")
        if before and todo:
            console.print(f"{name} has {before} of {len(requests)} answers; going on with the other {len(todo)}")
        try:
            # The model first: a mistake in its options should leave no records behind that were made with them.
            llm = load() if any(request.error is None for request in todo) else None
            with ended_by_signals():
                speed = _answer(llm, todo, answers, console) if todo else "nothing to do"
                answers.sort()
                if output.table:
                    _write_table(output, source, rows, answers)
        except (KeyboardInterrupt, SystemExit):
            console.print(f"interrupted: {len(answers.done)} of {len(requests)} are there; the same command goes on")
            raise
        errors = answers.num_errors
    again = "" if output.table else "; delete the lines with an error to have those requests tried again"
    console.print(_complete(name, len(requests), errors, speed) + (again if errors else ""))
    return 1 if errors else 0


def _complete(name: str, count: int, errors: int, speed: str) -> str:
    return f"{name} is complete: {count - errors} answers, {errors} errors; {speed}"


def check_table(output: Output, requests: list[FileRequest], source: Path) -> int:
    """How many errors there are in a table of answers to just these requests."""
    from batch_tables import answered_rows

    found = answered_rows(output.path, output.prefix)
    if [row[:2] for row in found] != [(request.index, request.fingerprint) for request in requests]:
        raise UserError(
            f"{output.path} answers other requests than {source} has, or was made with another model, or other "
            "sampling or image options; give another --output"
        )
    return sum(is_error for _, _, is_error in found)


def _write_table(output: Output, source: Source, rows: tuple[int, int], answers: AnswerFile) -> None:
    from batch_tables import write_table

    try:
        write_table(output.path, source.schema(), source.batches(*rows), answers.records(), output.prefix)
    except OSError as error:
        raise UserError(f"{output.path} cannot be written: {error.strerror or error}") from None
    answers.path.unlink()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal to end ends the program as an exception does, so that nothing is left lying about half written.

    Only while something is written: some modules in C++ do not survive an exception while they are being imported.
    """

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    # A job under nohup ignores one of them, and goes on doing so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, stop)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _answer(llm: Any, todo: list[FileRequest], answers: AnswerFile, console: Console) -> str:
    """Write a record for each request of ``todo``; how fast that was, in words."""
    start = said = time.monotonic()
    requests = tokens = 0

    def speed() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        return f"{requests / seconds:.1f} requests/s, {tokens / seconds:.0f} answer tokens/s"

    valid = [request for request in todo if request.error is None]
    for request in todo:
        if request.error is not None:
            answers.write(request, request.error)
    if not valid:
        return "no request of this run could be read"
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        closing(answered(llm, valid)) as results,
    ):
        bar = progress.add_task(speed(), total=len(valid))
        for number, result, reasons in results:
            answers.write(valid[number], result, reasons)
            requests += 1
            tokens += 0 if isinstance(result, Exception) else sum(len(each.token_ids) for each in result.outputs)
            progress.update(bar, advance=1, description=speed())
            if not console.is_terminal and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                console.print(f"{requests} of {len(valid)}, {speed()}")
    return speed()
