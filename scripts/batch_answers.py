"""The answers to a file of requests (batch_file.py): a job that can be killed at any moment and taken up again.

Every record is one write at the end of the file. What an end at any byte can leave behind is known, and mended: a
record that was written in part, and, after a loss of power, blocks of zeros where the file system had not got to the
data.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_file import MAX_LINE_BYTES, FileRequest, lines_of
from qwen3vl_moe.engine.outputs import CompletionOutput, RequestOutput
from qwen3vl_moe.errors import UserError, one_line
from qwen3vl_moe.json_files import parse_json
from replace_file import replace_file

_RECORD_START = b'{"index": '
# What JSON may hold as it is, but a terminal may act on, or a reader of lines take for the end of one.
_UNSEEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class AnswerFile:
    """The answers to ``requests``: those that are there already, and those that :meth:`write` adds.

    Use it as a context manager. While it is open, nobody else can open it for the same job.

    Attributes:
        done: index of every request that has its record, error records included.
        num_errors: how many of them are error records.
        repaired: whether records had been written in part only; their requests are not done.

    Raises:
        UserError: the file holds something else than answers to these requests (it is left as it is then), another
            process writes to it, or it cannot be written.
    """

    def __init__(self, path: Path, requests: list[FileRequest], source: Path):
        self.path, self.requests, self._source = path, requests, source
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

    def write(self, request: FileRequest, result: RequestOutput | Exception | str) -> None:
        """Append the record of one request: its answer, or the error in its place. It survives the process.

        Raises:
            UserError: the file cannot be written.
        """
        record = {"index": request.index, "id": request.id, "request": request.fingerprint}
        if isinstance(result, RequestOutput):
            counts = {"prompt_tokens": len(result.prompt_token_ids), "image_tokens": result.num_image_tokens}
            answers = [_answer(output) for output in result.outputs]
            record |= {**answers[0], **counts, **({"choices": answers} if len(answers) > 1 else {})}
        else:
            record["error"] = one_line(str(result))
        # An id may hold half of a surrogate pair, which UTF-8 cannot say and JSON writes as \udXXX.
        text = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False))
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        self._count(record)

    def sort(self) -> None:
        """Put the records of a complete job in the order of the requests; at once, or not at all."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        ordered = sorted((line for line in lines if b"\0" not in line), key=lambda line: parse_json(line)["index"])
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
                    if b"\0" in line and _was_a_record(line):
                        self.repaired = True  # it stays where it is until all are put in order
                    else:
                        self._check(number, line)
                elif _was_a_record(line):
                    self.repaired = True
                    self._file.truncate(whole)
                else:
                    raise UserError(f"{self.path}: its last line is no answer; give another --output")

    def _check(self, number: int, line: bytes) -> None:
        where = f"{self.path}, line {number}"
        try:
            record = parse_json(line)
            index, fingerprint = record["index"], record["request"]
            if type(index) is not int or not ("error" in record or "text" in record):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{where} is no answer; give another --output") from None
        if not 0 <= index < len(self.requests) or self.requests[index].fingerprint != fingerprint:
            raise UserError(
                f"{where} answers another request than {self._source} has there (index {index}), or was made with "
                "another model, or other sampling or image options: go on with the same ones, or give another --output"
            )
        if index in self.done:
            raise UserError(f"{where} repeats the answer to request {index}; delete one of the two")
        self._count(record)

    def _count(self, record: Mapping[str, Any]) -> None:
        self.done.add(record["index"])
        self.num_errors += "error" in record


def _answer(output: CompletionOutput) -> dict[str, Any]:
    return {"text": output.text, "finish_reason": output.finish_reason, "answer_tokens": len(output.token_ids)}


def _was_a_record(line: bytes) -> bool:
    """Whether a line is a record, or several, of which an end or blocks in the middle were lost: zeros stand for these.

    A record has no zero byte. What stands before the first and after the last tells whether it was written here; any
    other file is none of ours to mend. A line without its end may end in anything.
    """
    pieces = line.split(b"\0")
    begins = pieces[0].startswith(_RECORD_START) or _RECORD_START.startswith(pieces[0])
    return begins and (not line.endswith(b"\n") or pieces[-1] == b"\n" or pieces[-1].endswith(b"}\n"))
