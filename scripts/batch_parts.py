"""A job in parts: which files its answers go to, what is left of it, and how they become one file.

The folder of parts holds ``job.json``, which tells the job from another one, and a file for each part, written whole or
not at all. So the files that are there say what is left to do, whoever was killed, and however often.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from batch_inputs import Job, Source
from batch_run import Output
from batch_worker import Part
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.json_files import parse_json
from replace_file import replace_file, replacing

_ABOUT = "job.json"


class Parts:
    """The parts of a job.

    Args:
        folder: of their files.
        source: the input.
        job: what the answers depend on beside it.
        output: what the parts are in the form of.
        size: about how many rows a part has.

    Attributes:
        todo: parts without a file.
        done: how many have theirs.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """

    def __init__(self, folder: Path, source: Source, job: Job, output: Output, size: int):
        self.folder, self._output, self._source = folder, output, source
        self._cuts = source.cuts(size)
        self._about = {"rows": len(source), "parts": len(self._cuts), "job": _digest(source, job, output, size)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check()
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}") from None
        numbers = range(len(self._cuts))
        self.todo = [self._part(number) for number in numbers if not self.path(number).exists()]
        self.done = len(self._cuts) - len(self.todo)

    def path(self, number: int) -> Path:
        start, stop = self._cuts[number]
        return self.folder / f"part-{start:012d}-{stop:012d}{'.parquet' if self._output.table else '.jsonl'}"

    def join(self, path: Path) -> None:
        """Make one file of all parts, in the order of the rows.

        Raises:
            UserError: it cannot be written.
        """
        parts = [self.path(number) for number in range(len(self._cuts))]
        try:
            with replacing(path) as file:
                if self._output.table:
                    _join_tables(parts, self._source, self._output, file)
                else:
                    for part in parts:
                        with open(part, "rb") as opened:
                            shutil.copyfileobj(opened, file)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None

    def count_errors(self) -> int:
        """How many answers of all parts are errors."""
        return sum(self._errors(self.path(number)) for number in range(len(self._cuts)))

    def remove(self) -> None:
        """Delete the folder: what it held is elsewhere now."""
        shutil.rmtree(self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else works on the job within the block.

        Raises:
            UserError: somebody does.
        """
        with open(self.folder / _ABOUT, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it when this process ends
            except BlockingIOError:
                raise UserError(f"{self.folder} is being written by another run; wait for it") from None
            except OSError:
                pass  # some network file systems have no locks; two runs would write the same files
            try:
                yield
            finally:
                self._leave_nothing_begun()

    def _leave_nothing_begun(self) -> None:
        """Without a part, as after a mistake in the options, the folder would hold other options up."""
        if self.folder.exists() and {path.name for path in self.folder.iterdir()} == {_ABOUT}:
            with suppress(OSError):
                (self.folder / _ABOUT).unlink()
                self.folder.rmdir()

    def _part(self, number: int) -> Part:
        start, stop = self._cuts[number]
        return Part(self._source.part(start, stop), start, stop, replace(self._output, path=self.path(number)), number)

    def _check(self) -> None:
        about = self.folder / _ABOUT
        if not about.exists():
            if any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty, and holds no parts of answers; give another --output")
            replace_file(about, [json.dumps(self._about).encode() + b"\n"])
            return
        try:
            found: Any = parse_json(about.read_bytes())
        except ValueError:
            found = None
        if found != self._about:
            raise UserError(
                f"{self.folder} holds answers to another input, or to one that has changed, or was begun with another "
                "model or other options: go on with the same ones, or give another --output"
            )

    def _errors(self, path: Path) -> int:
        if self._output.table:
            from batch_tables import answered_rows

            return sum(is_error for _, _, is_error in answered_rows(path, self._output.prefix))
        with open(path, "rb") as file:
            return sum(self._output.form.identity(parse_json(line))[2] for line in file)


def _digest(source: Source, job: Job, output: Output, size: int) -> str:
    options = job.options
    kept = [options.keep_input, list(options.drop), options.prompt, options.prompt_column, options.image_column]
    said = [source.identity(), dict(job.settings), str(job.params), kept, options.id_column, output.table]
    return hashlib.sha256(json.dumps([said, output.prefix, type(output.form).__name__, size]).encode()).hexdigest()


def _join_tables(parts: list[Path], source: Source, output: Output, file: Any) -> None:
    import pyarrow.parquet as pq

    from batch_tables import schema_of_answers

    with pq.ParquetWriter(file, schema_of_answers(source.schema(), output.prefix)) as writer:
        for part in parts:
            with pq.ParquetFile(part) as opened:
                for batch in opened.iter_batches(1024):
                    writer.write_batch(batch)
