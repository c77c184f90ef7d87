"""The answers to a file of requests (batch_file.py): a job that can be killed at any moment and taken up again.

Every record is one write at the end of the file. What an end at any byte can leave behind is known, and mended: a
record that was written in part, and, after a loss of power, blocks of zeros where the file system had not got to the
data.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batch_file import MAX_LINE_BYTES, FileRequest, lines_of
from batch_records import PlainForm, RecordForm, Result, line_of
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.json_files import parse_json
from qwen3vl_moe.server.parts import Reasons
from replace_file import replace_file

_PLAIN = PlainForm()


class AnswerFile:
    """The answers to ``requests``: those that are there already, and those that :meth:`write` adds.

    Use it as a context manager. While it is open, nobody else can open it for the same job.

    Args:
        requests: all of a job, or a part of one without gaps.
        source: the file of requests; a folder does as well.
        form: how a record looks.

    Attributes:
        done: index of every request that has its record, error records included.
        num_errors: how many of them are error records.
        repaired: whether records had been written in part only; their requests are not done.

    Raises:
        UserError: the file holds something else than answers to these requests (it is left as it is then), another
            process writes to it, or it cannot be written.
    """

    def __init__(self, path: Path, requests: list[FileRequest], source: Path, form: RecordForm = _PLAIN):
        self.path, self.requests, self._source, self._form = path, requests, source, form
        self._first = requests[0].index if requests else 0
        self.done: set[int] = set()
        self.num_errors, self.repaired = 0, False
        try:
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a regular file, so it cannot be taken up again; give another --output")
            if path.exists() and source.exists() and path.samefile(source):
                raise UserError(f"{path} is the file of requests itself; give another --output")
            # No buffer: a record that could not be written must not be tried again when the file is closed.
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._take_stock()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def todo(self) -> list[FileRequest]:
        """Requests without a record, in order."""
        return [request for request in self.requests if request.index not in self.done]

    def write(self, request: FileRequest, result: Result, reasons: Reasons = "never") -> None:
        """Append the record of one request: its answer, or the error in its place. It survives the process.

        Args:
            reasons: where the reasoning of the answer is.

        Raises:
            UserError: the file cannot be written.
        """
        record = self._form.record(request, result, reasons)
        line = line_of(record)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        self._count(*self._form.identity(record))

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, as they stand in the file."""
        with open(self.path, "rb") as file:
            for line in lines_of(file):
                if b"\0" not in line:
                    yield parse_json(line)

    def sort(self) -> None:
        """Put the records of a complete job in the order of the requests; at once, or not at all."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        kept = (line for line in lines if b"\0" not in line)
        ordered = sorted(kept, key=lambda line: self._form.identity(parse_json(line))[0])
        if ordered == lines:
            return
        try:
            replace_file(self.path.resolve(), ordered)  # a link stays a link
        except OSError as error:
            raise UserError(
                f"{self.path} holds all answers, but cannot be put in order: {error.strerror or error}"
            ) from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it when this process ends
        except BlockingIOError:
            raise UserError(
                f"{self.path} is being written by another run; wait for it, or give another --output"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; the job itself does not need one

    def _take_stock(self) -> None:
        whole = 0  # bytes up to the end of the last line that has one
        with open(self.path, "rb") as file:
            for number, line in enumerate(lines_of(file), start=1):
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"{self.path}, line {number} is no answer; give another --output")
                if line.endswith(b"\n"):
                    whole += len(line)
                    if b"\0" in line and _was_a_record(line, self._form.start):
                        self.repaired = True  # it stays where it is until all are put in order
                    else:
                        self._check(number, line)
                elif _was_a_record(line, self._form.start):
                    self.repaired = True
                    self._file.truncate(whole)
                else:
                    raise UserError(f"{self.path}: its last line is no answer; give another --output")

    def _check(self, number: int, line: bytes) -> None:
        where = f"{self.path}, line {number}"
        try:
            index, fingerprint, is_error = self._form.identity(parse_json(line))
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{where} is no answer; give another --output") from None
        place = index - self._first
        if not 0 <= place < len(self.requests) or self.requests[place].fingerprint != fingerprint:
            raise UserError(
                f"{where} answers another request than {self._source} has there (index {index}), or was made with "
                "another model, or other sampling or image options: go on with the same ones, or give another --output"
            )
        if index in self.done:
            raise UserError(f"{where} repeats the answer to request {index}; delete one of the two")
        self._count(index, fingerprint, is_error)

    def _count(self, index: int, fingerprint: str, is_error: bool) -> None:
        self.done.add(index)
        self.num_errors += is_error


def _was_a_record(line: bytes, start: bytes) -> bool:
    """Whether a line is a record, or several, of which an end or blocks in the middle were lost: zeros stand for these.

    A record has no zero byte. What stands before the first and after the last tells whether it was written here; any
    other file is none of ours to mend. A line without its end may end in anything.
    """
    pieces = line.split(b"\0")
    begins = pieces[0].startswith(start) or start.startswith(pieces[0])
    return begins and (not line.endswith(b"\n") or pieces[-1] == b"\n" or pieces[-1].endswith(b"}\n"))
