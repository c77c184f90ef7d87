"""A folder of images as a batch: a row for each, with the folders in it, in the order of their paths."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batch_file import FileRequest, common_part, fingerprint_of
from batch_inputs import IMAGE_SUFFIXES, Job, Source
from qwen3vl_moe.errors import OptionError, UserError

if TYPE_CHECKING:
    import pyarrow as pa


class FolderSource(Source):
    """Images as files. ``path``, from the folder, is the id of a row and the one column that is kept.

    Args:
        given: the folder, or a pattern, or an image.
        files: what it stands for.

    Raises:
        UserError: there is no image, or no prompt to ask of each.
    """

    kind = "folder"

    def __init__(self, given: Path, files: list[Path], job: Job):
        self.path = given
        self._base = given if given.is_dir() else _before_the_pattern(given)
        self._files = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self._files:
            raise UserError(
                f"{given} has no image ({', '.join(IMAGE_SUFFIXES[:6])} and so on), no parquet, tar or jsonl; files "
                f"deeper within are named by a pattern: '{given}/**/*.parquet'"
            )
        for name in ("prompt_column", "image_column", "id_column"):
            if getattr(job.options, name) is not None:
                raise OptionError(f"--{name.replace('_', '-')} is for parquet and tars; {given} is images")
        if job.options.prompt is None:
            raise OptionError(f"{given} is images: --prompt says what to ask of each")
        if job.options.drop not in ((), ("path",)):
            raise OptionError(f"--drop {job.options.drop[0]}: images have the column path alone")
        others = Counter(
            path.suffix.lower() or path.name for path in files if path.suffix.lower() not in IMAGE_SUFFIXES
        )
        self.notes = [f"passed over, as no image: {count} of {name!r}" for name, count in sorted(others.items())]
        self._job, self._keeps = job, "path" not in job.options.drop
        self._common = common_part(job.params, job.settings, job.options.prompt)

        self._length, self._first = len(self._files), 0

    def __len__(self) -> int:
        return self._length

    def part(self, start: int, stop: int) -> FolderSource:
        part = object.__new__(FolderSource)
        files = self._files[start - self._first : stop - self._first]
        part.__dict__ |= self.__dict__ | {"_files": files, "_first": start}
        return part

    def requests(self, start: int, stop: int) -> list[FileRequest]:
        made = []
        for index in range(start, stop):
            name = self._name(index)
            line = json.dumps([name, self._size(index)]).encode()
            content = [
                {"type": "image", "image": self._files[index - self._first].absolute()},
                {"type": "text", "text": self._job.options.prompt},
            ]
            conversation = [{"role": "user", "content": content}]
            fingerprint, row = fingerprint_of(self._common, line), {"path": name}
            made.append(FileRequest(index, name, fingerprint, conversation, self._job.params, row=row))
        return made

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        return pa.schema([("path", pa.string())] if self._keeps else [])

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        from batch_tables import batches_of_rows

        yield from batches_of_rows(({"path": self._name(index)} for index in range(start, stop)), self.schema())

    def identity(self) -> list[Any]:
        return [self.kind, [[self._name(index), self._size(index)] for index in range(len(self))]]

    def _name(self, index: int) -> str:
        path = self._files[index - self._first]
        return path.relative_to(self._base).as_posix() if path.is_relative_to(self._base) else path.as_posix()

    def _size(self, index: int) -> int | None:
        """Bytes of a file: another picture under the same name is another request. None: it cannot be looked at."""
        try:
            return self._files[index - self._first].stat().st_size
        except OSError:
            return None


def _before_the_pattern(given: Path) -> Path:
    """The folder that names count from: the last one that is named without a pattern."""
    parts = given.parts
    plain = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:plain])
