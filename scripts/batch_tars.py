"""Webdataset tars as a batch: the files of a sample stand side by side in a tar and differ from the first dot on.

``000012.jpg``, ``000012.txt`` and ``000012.json`` are one row with the columns ``__key__`` (its id), ``jpg``, ``txt``
and ``json``. All files that are images by their names are the row's images, in their order. The prompt is in a column
(``--prompt-column txt``), or is the same for all.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_file import FileRequest, common_part, fingerprint_of
from batch_inputs import IMAGE_SUFFIXES, Job, Source
from batch_records import without_bytes
from qwen3vl_moe.errors import OptionError, PromptError, UserError
from qwen3vl_moe.inputs.fetch import MAX_FILE_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = "__key__"
_TEXTS = ("txt", "text", "json", "cls", "caption", "prompt", "url", "html", "md", "csv", "xml")


@dataclass(frozen=True, slots=True)
class _Sample:
    """Where a sample is: its tar, where its first header begins there, and its key."""

    path: Path
    offset: int
    key: str


class TarSource(Source):
    """Samples of tars. The headers are read once; a sample is read from its place when its turn comes.

    Args:
        given: a file, a folder or a pattern.
        files: what it stands for, in order.

    Raises:
        UserError: a file is no tar, or has no samples.
        OptionError: a column that an option names is not there, or nothing says what to ask.
    """

    kind = "tars"

    def __init__(self, given: Path, files: list[Path], job: Job):
        self.path, self._job, self._first = given, job, 0
        self._samples: list[_Sample] = []
        found: dict[str, None] = {}  # columns, in the order in which they were met
        for path in files:
            for sample, columns in _samples(path):
                self._samples.append(sample)
                found |= dict.fromkeys(columns)
        if not self._samples:
            raise UserError(f"{given} has no samples")
        self._length, self._columns = len(self._samples), list(found)
        self._sizes = {path: path.stat().st_size for path in files}
        options, have = job.options, ", ".join([_KEY, *self._columns])
        if options.id_column is not None:
            raise OptionError(f"--id-column is for parquet; the id of a sample is its {_KEY}")
        named = [("--prompt-column", options.prompt_column), ("--image-column", options.image_column)]
        for option, name in [*named, *(("--drop", name) for name in options.drop)]:
            if name is not None and name not in (_KEY, *self._columns):
                raise OptionError(f"{option} {name}: {given} has {have}")
        if options.prompt is None and options.prompt_column is None:
            raise OptionError(f"{given} has {have}: --prompt-column names the prompt's, or --prompt gives one")
        images = [column for column in self._columns if f".{column}".endswith(IMAGE_SUFFIXES)]
        self._images = images if options.image_column is None else [options.image_column]
        self._common = common_part(job.params, job.settings, options.prompt)
        self._common += json.dumps([options.prompt_column, self._images]).encode()
        used = [_KEY, *self._images, *([options.prompt_column] if options.prompt_column else [])]
        rest = [name for name in self._columns if name not in {*used, *options.drop}]
        self.notes = [f"columns: {', '.join(used)}" + (f"; only kept: {', '.join(rest)}" if rest else "")]
        self._seen: dict[int, dict[str, Any]] = {}  # read samples of requests that are not answered yet

    def __len__(self) -> int:
        return self._length

    def part(self, start: int, stop: int) -> TarSource:
        part = object.__new__(TarSource)
        samples = self._samples[start - self._first : stop - self._first]
        part.__dict__ |= self.__dict__ | {"_samples": samples, "_first": start, "_seen": {}}
        return part

    def requests(self, start: int, stop: int) -> list[FileRequest]:
        made = []
        for index in range(start, stop):
            sample = self._samples[index - self._first]
            place = json.dumps([sample.path.name, self._sizes[sample.path], sample.offset]).encode()
            request = FileRequest(
                index,
                sample.key,
                fingerprint_of(self._common, place),
                partial(self._conversation, index),
                self._job.params,
                row=partial(self._kept, index) if self._job.rows else None,
            )
            made.append(request)
        return made

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        text = {name: pa.string() if name.rpartition(".")[2] in _TEXTS else pa.binary() for name in self._columns}
        kinds = {_KEY: pa.string()} | text
        return pa.schema([(name, kind) for name, kind in kinds.items() if name not in self._job.options.drop])

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        schema = self.schema()
        for at in range(start, stop, 64):
            rows = []
            for index in range(at, min(at + 64, stop)):
                try:
                    rows.append(self._row(index))
                except PromptError:  # its answer says so
                    rows.append({_KEY: self._samples[index - self._first].key})
            columns = []
            for field in schema:
                values = [row.get(field.name) for row in rows]
                if field.type == pa.string():
                    values = [None if v is None else v.encode("utf-8", "backslashreplace").decode() for v in values]
                columns.append(pa.array(values, field.type))
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    def identity(self) -> list[Any]:
        return [self.kind, [[path.name, size] for path, size in self._sizes.items()], self._images]

    def _conversation(self, index: int) -> list[dict]:
        """The messages of a sample, in the thread that prepares its request.

        Raises:
            PromptError: it cannot be read, or has no prompt.
        """
        row, options = self._row(index), self._job.options
        if self._job.rows:
            self._seen[index] = self._without_bytes(row)
        prompt = row.get(options.prompt_column) if options.prompt_column else None
        prompt = options.prompt if prompt is None else prompt
        if not isinstance(prompt, str):
            what = "has no prompt" if prompt is None else f"has a prompt that is no text, {options.prompt_column}"
            raise PromptError(f"{self._where(index)} {what}")
        images = [{"type": "image", "image": row[name]} for name in self._images if name in row]
        if not images and self._images:
            raise PromptError(f"{self._where(index)} has no image ({', '.join(self._images)})")
        return [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]

    def _kept(self, index: int) -> dict[str, Any]:
        """What is written of a sample beside its answer; forgotten then."""
        try:
            return self._seen.pop(index) if index in self._seen else self._without_bytes(self._row(index))
        except PromptError:  # the answer says so
            return {_KEY: self._samples[index - self._first].key}

    def _without_bytes(self, row: dict[str, Any]) -> dict[str, Any]:
        return without_bytes({key: value for key, value in row.items() if key not in self._job.options.drop})

    def _row(self, index: int) -> dict[str, Any]:
        sample = self._samples[index - self._first]
        row: dict[str, Any] = {_KEY: sample.key}
        try:
            with open(sample.path, "rb") as file:
                file.seek(sample.offset)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        key, column = _split(member.name)
                        if key != sample.key:
                            break
                        if member.size > MAX_FILE_BYTES:
                            raise PromptError(
                                f"{self._where(index)} has a file of more than {MAX_FILE_BYTES >> 20} MiB"
                            )
                        content = tar.extractfile(member) if member.isreg() else None
                        if content is not None:
                            row[column] = _value(column, content.read())
        except (OSError, tarfile.TarError) as error:
            raise PromptError(f"{self._where(index)} cannot be read: {error}") from None
        return row

    def _where(self, index: int) -> str:
        sample = self._samples[index - self._first]
        return f"sample {sample.key} of {sample.path.name}"


def _samples(path: Path) -> Iterator[tuple[_Sample, list[str]]]:
    """The samples of a tar, with the columns of each.

    Raises:
        UserError: it is no tar, or ends before its end.
    """
    sample, columns = None, []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                tar.members = []  # or all headers stay in memory
                if not member.isreg():
                    continue
                key, column = _split(member.name)
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample, columns
                    sample, columns = _Sample(path, member.offset, key), []
                columns.append(column)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read as a tar: {error}") from None
    if sample is not None:
        yield sample, columns


def _split(name: str) -> tuple[str, str]:
    """Key and column of a file in a tar: its name up to the first dot, with its folder, and the rest."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, column = file.partition(".")
    return f"{folder}{slash}{stem}", column.lower()


def _value(column: str, content: bytes) -> str | bytes:
    if column.rpartition(".")[2] not in _TEXTS:
        return content
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("utf-8", "backslashreplace")
