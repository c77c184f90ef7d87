"""What a batch is read from: JSON lines, parquet, webdataset tars, a folder of images; and parts of it.

Every kind is a :class:`Source`: rows in one fixed order, each of which becomes a request (batch_file.py). What a row
holds beside its request is kept with its answer. Of large inputs only the places of the rows are in memory; images are
read when their turn comes.

A path is a file, a folder of files of one kind (images: with all folders in it), or a pattern such as 'data/*.parquet'.
"""

from __future__ import annotations

import glob
import importlib.util
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_file import FileRequest, LineOptions, is_openai_file, read_requests
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.errors import OptionError, UserError
from qwen3vl_moe.json_files import check_regular

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".avif", ".heic", ".heif", ".ppm", ".pgm", ".pnm"),
)
_KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".parquet": "parquet", ".pq": "parquet"} | {
    ".tar": "tars"
}
_SUFFIXES = {"lines": ".jsonl", "parquet": ".parquet", "tars": ".tar", "folder": ".jpg"}


@dataclass(frozen=True)
class InputOptions:
    """How an input is understood.

    Attributes:
        prompt: what is asked of rows that bring no prompt of their own.
        prompt_column, image_column, id_column: of parquet; the first two of tars. None: ``prompt``; ``image`` or
            ``images``; ``id``.
        keep_input: JSON lines: whether unknown keys are kept rather than refused, and the line stands with its answer.
        drop: columns that are not kept with the answers.
        model_names: what ``body.model`` may be in OpenAI's format.
        served_model_name: the option that set these, if one did.
    """

    prompt: str | None = None
    prompt_column: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    keep_input: bool = False
    drop: tuple[str, ...] = ()
    model_names: tuple[str, ...] = ()
    served_model_name: str | None = None


@dataclass(frozen=True)
class Job:
    """What the answers to an input depend on beside the input.

    Attributes:
        params: sampling parameters of rows that do not set them.
        settings: the model and so on, as JSON values.
        options: how the input is understood.
        rows: whether requests bring their rows, to be written beside the answers.
    """

    params: SamplingParams
    settings: Mapping[str, Any]
    options: InputOptions
    rows: bool = False


class Source(ABC):
    """Rows of an input, in order. It can be sent to another process, which has to reach the same files.

    Attributes:
        kind: "lines", "openai", "parquet", "tars" or "folder".
        path: what was given.
        notes: what a user should know of how it is read.
    """

    kind: str
    path: Path
    notes: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def requests(self, start: int, stop: int) -> list[FileRequest]:
        """Rows ``start`` to ``stop`` as requests; images are read later."""

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns that are kept with the answers in a table."""

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The kept columns of rows ``start`` to ``stop``, some rows at a time."""

    def part(self, start: int, stop: int) -> Source:
        """A source that serves at least these rows under the same numbers; small enough to be sent."""
        return self

    def cuts(self, size: int) -> list[tuple[int, int]]:
        """Ranges of about ``size`` rows, which together are all rows, cut where reading them apart costs least."""
        return [(at, min(at + size, len(self))) for at in range(0, len(self), size)]

    def identity(self) -> list[Any]:
        """What tells this input from another one, as JSON values."""
        return [self.kind, len(self)]


class LineSource(Source):
    """A file of JSON lines, read whole: only what lines say is in memory, not the images that they name."""

    def __init__(self, path: Path, job: Job):
        options = LineOptions(job.options.prompt, job.options.keep_input, job.options.model_names)
        self.kind, self.path, self.notes = "openai" if is_openai_file(path) else "lines", path, []
        self._drop, self._first = job.options.drop, 0
        self._requests = read_requests(path, job.params, job.settings, options)
        self._length = len(self._requests)
        if self._drop:
            self._leave_out(job)

    def _leave_out(self, job: Job) -> None:
        known = {key for request in self._requests for key in request.row or ()}
        missing = [name for name in self._drop if name not in known]
        if missing:
            raise OptionError(f"--drop {missing[0]}: no line of {self.path} has that key")
        if job.rows and not job.options.keep_input:
            raise OptionError("--drop goes with --keep-input, or with an output in .parquet: nothing is kept otherwise")
        for place, request in enumerate(self._requests):
            if isinstance(request.row, Mapping):
                row = {key: value for key, value in request.row.items() if key not in self._drop}
                self._requests[place] = replace(request, row=row)

    def __len__(self) -> int:
        return self._length

    def requests(self, start: int, stop: int) -> list[FileRequest]:
        return self._requests[start - self._first : stop - self._first]

    def part(self, start: int, stop: int) -> LineSource:
        part = object.__new__(LineSource)
        part.__dict__ |= self.__dict__ | {"_requests": self.requests(start, stop), "_first": start}
        # The types of all columns, which a part alone would not tell.
        part.__dict__["_schema"] = self.schema() if self.kind == "lines" else None
        return part

    def schema(self) -> pa.Schema:
        from batch_tables import schema_of_rows

        if "_schema" not in self.__dict__:
            self._schema = schema_of_rows((request.row for request in self._requests), self._drop)
        return self._schema

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        from batch_tables import batches_of_rows

        yield from batches_of_rows((request.row for request in self.requests(start, stop)), self.schema())

    def identity(self) -> list[Any]:
        return [self.kind, [request.fingerprint for request in self._requests]]


def open_input(given: Path, job: Job) -> Source:
    """The rows of ``--input``.

    Raises:
        UserError: there is nothing there, it is of no kind that is read, or of several; or an option does not fit.
    """
    files = _files(given)
    kind = _kind(given, files)
    if kind == "lines":
        if len(files) > 1:
            raise UserError(f"{given} stands for {len(files)} files of JSON lines; give one, or join them with cat")
        for name in ("prompt_column", "image_column", "id_column"):
            if getattr(job.options, name) is not None:
                raise OptionError(
                    f"--{name.replace('_', '-')} is for parquet and tars; the keys of JSON lines are fixed"
                )
        source = LineSource(files[0], job)
        given_options = {
            "--prompt": job.options.prompt,
            "--keep-input": job.options.keep_input,
            "--drop": job.options.drop,
        }
        idle = next((name for name, value in given_options.items() if value), None)
        if source.kind == "openai" and idle:
            raise OptionError(f"{idle} means nothing for OpenAI's batch format, which {given} is in")
        if source.kind != "openai" and job.options.served_model_name is not None:
            raise OptionError(f"--served-model-name is for OpenAI's batch format, which {given} is not in")
        return source
    if job.options.served_model_name is not None:
        raise OptionError(f"--served-model-name is for OpenAI's batch format, which {given} is not in")
    try:
        for path in files:
            check_regular(path, UserError, most=1 << 60)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if kind == "folder":
        from batch_folders import FolderSource

        return FolderSource(given, files, job)
    if kind == "tars":
        from batch_tars import TarSource

        return TarSource(given, files, job)
    require_pyarrow(files[0])
    from batch_parquet import ParquetSource

    return ParquetSource(given, files, job)


def require_pyarrow(path: Path) -> None:
    """Refuse a parquet file where it could not be read or written.

    Raises:
        UserError: as said.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: parquet needs pyarrow: pip install -e '.[parquet]'")


def parse_shard(text: str | None, total: int) -> tuple[int, int]:
    """The rows of shard "i/n" of ``total``: n ranges of the same length, give or take one; i counts from 0.

    Raises:
        OptionError: it is no such thing.
    """
    if text is None:
        return 0, total
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if number >= count:
        what = f"from 0/{count} to {count - 1}/{count}" if count else "such as 3/16"
        raise OptionError(f"--shard {text}: shards are {what}, as ranks count")
    return total * number // count, total * (number + 1) // count


def _files(given: Path) -> list[Path]:
    """The files that a path stands for, in order; of a folder of folders, those of all of them."""
    if given.is_dir():
        files = sorted(path for path in given.iterdir() if not path.name.startswith(".") and path.is_file())
        if any(_kind_of(path) in ("lines", "parquet", "tars") for path in files):
            return files
        return sorted(path for path in given.rglob("*") if not path.name.startswith(".") and path.is_file())
    if not given.exists() and glob.has_magic(str(given)):
        files = sorted(Path(name) for name in glob.glob(str(given), recursive=True))
        if not files:
            raise UserError(f"{given}: no file is of that pattern")
        return files
    return [given]


def _kind(given: Path, files: list[Path]) -> str:
    kinds = Counter(_kind_of(path) for path in files)
    if given.is_dir() and not kinds["lines"] + kinds["parquet"] + kinds["tars"]:
        return "folder"  # what is no image in it is passed over, and told of
    found = sorted(kind for kind in kinds if kind)
    if len(found) > 1 or (found and kinds[""]):
        first = found[0]
        odd = next(path for path in files if _kind_of(path) != first)
        pattern = (given if given.is_dir() else given.parent) / f"*{_SUFFIXES[first]}"
        raise UserError(
            f"{given} has files of more than one kind, {odd.name!r} among them; give a pattern, such as '{pattern}'"
        )
    compressed = next((path for path in files if re.search(r"\.(gz|tgz|bz2|xz|zst|zip)$", path.name, re.I)), None)
    if compressed is not None:
        raise UserError(f"{compressed} is compressed; unpack it: rows are read from their places in the file")
    return found[0] if found else "lines"  # a file of any other name was one of JSON lines from the beginning


def _kind_of(path: Path) -> str:
    suffix = path.suffix.lower()
    return "folder" if suffix in IMAGE_SUFFIXES else _KINDS.get(suffix, "")
