"""Parquet files as a batch: a row for each of theirs, an image in a column as bytes, a path or a URL.

Columns that are understood: the prompt's, ``messages`` (objects, or JSON), the image's (bytes, a text, ``{"bytes",
"path"}`` as ``datasets`` writes pictures, or a list of these), the id's, and sampling parameters. All others are only
kept. Paths count from the folder of their file.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_file import SAMPLING_KEYS, FileRequest, common_part, fingerprint_of, locate, located, sampling_of
from batch_inputs import Job, Source
from batch_records import without_bytes
from qwen3vl_moe.errors import OptionError, PromptError, UserError, one_line
from qwen3vl_moe.json_files import parse_json

_ROWS = 32  # read at a time
_READ = 6  # such pieces stay in memory: threads that prepare requests are not quite in order


class ParquetSource(Source):
    """Rows of parquet files of one schema. The footers are read now, and rows when their turn comes.

    Args:
        given: a file, a folder or a pattern.
        files: what it stands for, in order.

    Raises:
        UserError: a file cannot be read, or has other columns than the first.
        OptionError: a column that an option names is not there, or nothing says what to ask.
    """

    kind = "parquet"

    def __init__(self, given: Path, files: list[Path], job: Job):
        self.path, self._files, self._job = given, files, job
        self._groups: list[tuple[int, int, int]] = []  # file, its row group, how many rows
        self._starts: list[int] = []  # the first row of each group
        self._seen: dict[int, dict[str, Any]] = {}  # read rows of requests that are not answered yet
        self._length, schema = 0, None
        for number, path in enumerate(files):
            found, rows = _footer(path)
            if schema is not None and found != schema:
                raise UserError(f"{path} has other columns than {files[0]}; give files of one kind at a time")
            schema = found
            for group, count in enumerate(rows):
                self._groups.append((number, group, count))
                self._starts.append(self._length)
                self._length += count
        assert schema is not None  # there is a file
        self._schema = schema
        options = job.options
        names = set(self._schema.names)
        for option in ("prompt_column", "image_column", "id_column"):
            name = getattr(options, option)
            if name is not None and name not in names:
                raise OptionError(f"--{option.replace('_', '-')} {name}: {files[0]} has {_list(names)}")
        for name in options.drop:
            if name not in names:
                raise OptionError(f"--drop {name}: {files[0]} has {_list(names)}")
        self._prompt = options.prompt_column or ("prompt" if "prompt" in names else None)
        self._id = options.id_column or ("id" if "id" in names else None)
        self._image = options.image_column or next((name for name in ("image", "images") if name in names), None)
        self._messages = "messages" if "messages" in names and options.prompt_column is None else None
        if not (self._prompt or self._messages or options.prompt):
            raise OptionError(f"{given} has {_list(names)}: --prompt-column names the prompt's, or --prompt gives one")
        self._sampling: list[str] = []
        roles = set(self._used().values())
        self._sampling = [name for name in self._schema.names if name in SAMPLING_KEYS and name not in roles]
        rest = [name for name in self._schema.names if name not in {*roles, *self._sampling, *options.drop}]
        used = [name if role == name else f"{name} as the {role}" for role, name in self._used().items()]
        self.notes = [f"columns: {', '.join(used) or 'none'}" + (f"; only kept: {', '.join(rest)}" if rest else "")]
        self._forget()

    def __len__(self) -> int:
        return self._length

    def requests(self, start: int, stop: int) -> list[FileRequest]:
        common = common_part(self._job.params, self._job.settings, self._job.options.prompt)
        common += json.dumps([self._prompt, self._image, self._messages]).encode()
        sizes = [path.stat().st_size for path in self._files]
        made = []
        for index, small in zip(range(start, stop), self._small_columns(start, stop), strict=True):
            number = bisect_right(self._starts, index) - 1
            file, group, _ = self._groups[number]
            place = [self._files[file].name, sizes[file], group, index - self._starts[number]]
            name, error, params = small.pop(self._id, None), None, self._job.params
            try:
                params = replace(params, **sampling_of({k: v for k, v in small.items() if v is not None}))
            except UserError as problem:
                error = one_line(f"{self._where(index)}: {problem}")
            request = FileRequest(
                index,
                name if isinstance(name, str | int | None) else str(name),
                fingerprint_of(common, json.dumps(place).encode()),
                None if error else partial(self._conversation, index),
                params,
                error,
                partial(self._kept, index) if self._job.rows else None,
            )
            made.append(request)
        return made

    def _small_columns(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Ids and sampling parameters, which are wanted before the rows are."""
        names = [*([self._id] if self._id else []), *self._sampling]
        if not names:
            yield from ({} for _ in range(start, stop))
            return
        for batch in self._batches(start, stop, names, 4096):
            yield from batch.to_pylist()

    def schema(self) -> pa.Schema:
        drop = set(self._job.options.drop)
        return pa.schema([field for field in self._schema if field.name not in drop], self._schema.metadata)

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        yield from self._batches(start, stop, self.schema().names, _ROWS)

    def _batches(self, start: int, stop: int, names: list[str], size: int) -> Iterator[pa.RecordBatch]:
        at = start
        while at < stop:
            number = bisect_right(self._starts, at) - 1
            file, group, _ = self._groups[number]
            first = self._starts[number]
            with _reading(self._files[file]), pq.ParquetFile(self._files[file]) as opened:
                for batch in opened.iter_batches(size, row_groups=[group], columns=names):
                    rows = batch.slice(max(at - first, 0), max(0, min(stop, first + batch.num_rows) - max(at, first)))
                    first += batch.num_rows
                    at += rows.num_rows
                    if rows.num_rows:
                        yield rows

    def cuts(self, size: int) -> list[tuple[int, int]]:
        """At the ends of row groups, as a part of a group costs reading it from its beginning; larger ones are cut."""
        cuts, begun = [], 0
        for start, (_, _, count) in zip(self._starts, self._groups, strict=True):
            end = start + count
            if end - begun < size and end < self._length:
                continue
            pieces = max(1, round((end - begun) / size)) if end - begun > 4 * size else 1
            edges = [begun + (end - begun) * n // pieces for n in range(pieces + 1)]
            cuts += list(pairwise(edges))
            begun = end
        return cuts

    def identity(self) -> list[Any]:
        return [self.kind, [[path.name, path.stat().st_size] for path in self._files], list(self._used().items())]

    def _conversation(self, index: int) -> list[dict]:
        """The messages of a row, in the thread that prepares its request.

        Raises:
            PromptError: it cannot be read, or asks nothing.
        """
        try:
            row = self._read_row(index)
            if self._job.rows:
                drop = self._job.options.drop
                self._seen[index] = {key: without_bytes(value) for key, value in row.items() if key not in drop}
            number = bisect_right(self._starts, index) - 1
            return self._messages_of(row, self._files[self._groups[number][0]].parent)
        except PromptError as error:
            raise PromptError(f"{self._where(index)}: {error}") from None

    def _messages_of(self, row: Mapping[str, Any], folder: Path) -> list[dict]:
        images = [] if self._image is None else _images(row[self._image], folder)
        messages = row[self._messages] if self._messages else None
        if messages is not None:
            if images:
                raise PromptError(f"messages and {self._image} given; in messages, images are items of the content")
            return messages_of(messages, folder)
        prompt = row[self._prompt] if self._prompt else None
        prompt = self._job.options.prompt if prompt is None else prompt
        if not isinstance(prompt, str):
            raise PromptError("there is no prompt" if prompt is None else "the prompt is no text")
        items = [{"type": "image", "image": image} for image in images]
        return [{"role": "user", "content": [*items, {"type": "text", "text": prompt}]}]

    def _kept(self, index: int) -> dict[str, Any]:
        """What is written of a row beside its answer; forgotten then."""
        if index not in self._seen:  # its request had an error before it was read
            row = self._read_row(index)
            return {key: value for key, value in row.items() if key not in self._job.options.drop}
        return self._seen.pop(index)

    def _where(self, index: int) -> str:
        file = self._groups[bisect_right(self._starts, index) - 1][0]
        first = self._starts[bisect_left(self._groups, (file, 0, 0))]
        return f"row {index - first} of {self._files[file].name}"

    def _used(self) -> dict[str, str]:
        """What columns stand for."""
        roles = {"id": self._id, "messages": self._messages, "prompt": self._prompt, "image": self._image}
        return {role: name for role, name in roles.items() if name} | {name: name for name in self._sampling}

    # Rows are read in order, by threads that are not quite in order.

    def _read_row(self, index: int) -> dict[str, Any]:
        with self._lock:
            try:
                return self._row(index)
            except (OSError, ValueError, KeyError) as error:
                self._forget(lock=False)
                raise PromptError(f"it cannot be read: {error}") from None

    def _row(self, index: int) -> dict[str, Any]:
        number = bisect_right(self._starts, index) - 1
        place = index - self._starts[number]
        for group, first, batch in self._pieces:
            if group == number and first <= place < first + batch.num_rows:
                return batch.slice(place - first, 1).to_pylist()[0]
        if number != self._at[0] or place < self._at[1]:  # another group, or one that is read again
            file, group, _ = self._groups[number]
            self._reader = pq.ParquetFile(self._files[file]).iter_batches(_ROWS, row_groups=[group])
            self._at = number, 0
        for batch in self._reader:
            self._pieces.append((number, self._at[1], batch))
            self._at = number, self._at[1] + batch.num_rows
            if place < self._at[1]:
                return self._row(index)
        raise ValueError("the row group ends before it")

    def _forget(self, lock: bool = True) -> None:
        self._pieces: deque[tuple[int, int, pa.RecordBatch]] = deque(maxlen=_READ)
        self._at, self._reader = (-1, 0), iter(())
        if lock:
            self._lock, self._seen = Lock(), {}

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_lock", "_reader", "_pieces", "_at", "_seen"}
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget()


def messages_of(value: Any, folder: Path) -> list[dict]:
    """Messages as a column holds them: objects of which every one has the keys of all, or JSON.

    Raises:
        PromptError: they are no list of objects with a role.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise PromptError(f"messages is a text that is no JSON ({error})") from None
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and m.get("role") for m in value):
        raise PromptError("messages is a list of objects with role and content, or the JSON of one")
    return [located(_without_nulls(message), folder) for message in value]


def _images(value: Any, folder: Path) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, list):
        return [image for each in value for image in _images(each, folder)]
    if isinstance(value, Mapping):  # as `datasets` writes pictures: the bytes, or where they are
        if not value.keys() <= {"bytes", "path"}:
            raise PromptError(f"the image is an object with {_list(value)}; bytes and path are understood")
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
        return _images(value, folder)
    if not isinstance(value, str | bytes):
        raise PromptError(f"the image is of type {type(value).__name__}; bytes, a path or a URL are needed")
    return [locate(value, folder)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _footer(path: Path) -> tuple[pa.Schema, list[int]]:
    """The columns of a file, and how many rows each of its row groups has."""
    with _reading(path), pq.ParquetFile(path) as file:
        found = file.metadata
        return file.schema_arrow, [found.row_group(group).num_rows for group in range(found.num_row_groups)]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # Arrow's errors are among them
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read as parquet: {text}") from None


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no columns"
