"""Tables of answers: parquet with the columns of the input, and those of the answers beside them.

The columns of an answer are ``index`` and ``request`` (which tie it to its row, as in JSON lines), ``text``,
``finish_reason``, ``answer_tokens``, ``prompt_tokens``, ``image_tokens``, ``choices`` (JSON, where more than one answer
was asked for) and ``error``. A row has either a text or an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen3vl_moe.errors import OptionError, UserError
from replace_file import replacing

ANSWER_COLUMNS = {
    "index": pa.int64(),
    "request": pa.string(),
    "text": pa.string(),
    "finish_reason": pa.string(),
    "answer_tokens": pa.int64(),
    "prompt_tokens": pa.int64(),
    "image_tokens": pa.int64(),
    "choices": pa.string(),
    "error": pa.string(),
}
_ROWS = 256  # of an input of lines at a time
_HUGGING_FACE = b"huggingface"


def check_columns(kept: pa.Schema, prefix: str) -> None:
    """Refuse an input with a column that an answer has too.

    Raises:
        OptionError: as said.
    """
    for name in kept.names:
        if name.startswith(prefix) and name.removeprefix(prefix) in ANSWER_COLUMNS:
            raise OptionError(
                f"the input has a column {name!r}, as the answers have; --prefix answer_ names theirs "
                f"'answer_{name.removeprefix(prefix)}' and so on, and --drop {name} leaves the input's out"
            )


def write_table(
    path: Path, kept: pa.Schema, batches: Iterable[pa.RecordBatch], records: Iterable[Mapping[str, Any]], prefix: str
) -> None:
    """Write rows of an input with their answers; the file is there whole, or not at all.

    Args:
        kept: the columns of ``batches``.
        batches: rows of the input, in order.
        records: the plain record (batch_records.py) of each of these rows, in the same order.
        prefix: of the names of an answer's columns.

    Raises:
        OSError: it cannot be written.
    """
    schema = schema_of_answers(kept, prefix)
    left = iter(records)
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        for batch in batches:
            columns = _columns(list(islice(left, batch.num_rows)))
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, *columns], schema=schema))


def schema_of_answers(kept: pa.Schema, prefix: str) -> pa.Schema:
    """The columns of a table of answers: those that are kept of the input, and those of the answers."""
    answers = [pa.field(f"{prefix}{name}", kind) for name, kind in ANSWER_COLUMNS.items()]
    return pa.schema([*kept, *answers], metadata=_metadata(kept, prefix))


def answered_rows(path: Path, prefix: str) -> list[tuple[int, str, bool]]:
    """Of each row of a table of answers: the number and the fingerprint of its request, and whether it is an error.

    Raises:
        UserError: it is no table of answers.
    """
    names = [f"{prefix}{name}" for name in ("index", "request", "error")]
    try:
        table = pq.read_table(path, columns=names)
        columns = [table.column(name).to_pylist() for name in names]
    except (OSError, ValueError, KeyError):  # Arrow's errors are among them
        raise UserError(f"{path} is no table of answers; give another --output") from None
    return [(index, request, error is not None) for index, request, error in zip(*columns, strict=True)]


def schema_of_rows(rows: Iterable[Mapping[str, Any] | None], drop: Iterable[str]) -> pa.Schema:
    """The columns of rows of JSON: a type where all values have it, else text that holds JSON."""
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for key, value in (row or {}).items():
            if value is not None:
                # A number that no column of integers holds is text, too.
                wide = type(value) is int and not -(1 << 63) <= value < 1 << 63
                kinds.setdefault(key, set()).add(dict if wide else type(value))
    return pa.schema([(key, _type_of(found)) for key, found in kinds.items() if key not in set(drop)])


def batches_of_rows(rows: Iterable[Mapping[str, Any] | None], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows of JSON in columns; a row that could not be read is empty."""
    left = iter(rows)
    while some := list(islice(left, _ROWS)):
        columns = []
        for field in schema:
            values = [(row or {}).get(field.name) for row in some]
            if field.type == pa.string():
                values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
                values = [None if v is None else v.encode("utf-8", "backslashreplace").decode() for v in values]
            columns.append(pa.array(values, field.type))
        # Without columns a batch would have no rows.
        yield pa.RecordBatch.from_struct_array(
            pa.StructArray.from_arrays(columns, fields=list(schema))
            if columns
            else pa.array([{}] * len(some), pa.struct([]))
        )


def _type_of(found: set[type]) -> pa.DataType:
    if found == {bool}:
        return pa.bool_()
    if found == {int}:
        return pa.int64()
    if found and found <= {int, float}:
        return pa.float64()
    return pa.string()


def _columns(records: list[Mapping[str, Any]]) -> list[pa.Array]:
    columns = []
    for name, kind in ANSWER_COLUMNS.items():
        values = [record.get(name) for record in records]
        if name == "choices":
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        columns.append(pa.array(values, kind))
    return columns


def _metadata(kept: pa.Schema, prefix: str) -> dict[bytes, bytes] | None:
    """What ``datasets`` wrote of its columns, with those of the answers: it refuses columns that are not there."""
    said = (kept.metadata or {}).get(_HUGGING_FACE)
    if said is None:
        return None
    try:
        features = json.loads(said)["info"]["features"]
        features = {name: features[name] for name in kept.names}
    except (ValueError, KeyError, TypeError):
        return None
    for name, kind in ANSWER_COLUMNS.items():
        features[f"{prefix}{name}"] = {"dtype": str(kind), "_type": "Value"}
    return {_HUGGING_FACE: json.dumps({"info": {"features": features}}).encode()}
