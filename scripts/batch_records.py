"""What is written for a request: its answer, or what is wrong with it, in one of two forms of a JSON line.

A form also reads its records back, which is how a job is taken up again (batch_answers.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import batch_openai
from batch_file import FileRequest
from qwen3vl_moe.engine.outputs import CompletionOutput, RequestOutput
from qwen3vl_moe.errors import one_line
from qwen3vl_moe.server.parts import Reasons

Result = RequestOutput | Exception | str  # of a request: a text or an exception is what is wrong with it

# What JSON may hold as it is, but a terminal may act on, or a reader of lines take for the end of one.
_UNSEEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class RecordForm(Protocol):
    """How a record looks.

    Attributes:
        start: the bytes that every record begins with.
    """

    start: bytes

    def record(self, request: FileRequest, result: Result, reasons: Reasons = "never") -> dict[str, Any]:
        """The record of a request; ``reasons``: where the reasoning of the answer is."""
        ...

    def identity(self, record: Mapping[str, Any]) -> tuple[int, str, bool]:
        """Number and fingerprint of the request, and whether the record is an error; ValueError, KeyError or TypeError
        where it is no record."""
        ...


class PlainForm:
    """``{"index": ..., "id": ..., "request": ..., "text": ...}``, as batch_file.py describes it.

    Args:
        keep_input: whether what the input says of the request stands beside the answer, as ``input``. Bytes, which
            JSON does not have, are left out.

    A text is whole, as the model wrote it: with its reasoning.
    """

    start = b'{"index": '

    def __init__(self, keep_input: bool = False):
        self._keep_input = keep_input

    def record(self, request: FileRequest, result: Result, reasons: Reasons = "never") -> dict[str, Any]:
        record = {"index": request.index, "id": request.id, "request": request.fingerprint}
        if isinstance(result, RequestOutput):
            counts = {"prompt_tokens": len(result.prompt_token_ids), "image_tokens": result.num_image_tokens}
            answers = [_answer(output) for output in result.outputs]
            record |= {**answers[0], **counts, **({"choices": answers} if len(answers) > 1 else {})}
        else:
            record["error"] = one_line(str(result))
        if self._keep_input:
            row = request.row() if callable(request.row) else request.row
            record["input"] = None if row is None else without_bytes(row)
        return record

    def identity(self, record: Mapping[str, Any]) -> tuple[int, str, bool]:
        index = record["index"]
        if type(index) is not int or not ("error" in record or "text" in record):
            raise ValueError
        return index, record["request"], "error" in record


class OpenAIForm:
    """The lines that answer OpenAI's batch format.

    Args:
        model: the name that the answers give.
    """

    start = b'{"id": "batch_req_'

    def __init__(self, model: str):
        self._model = model

    def record(self, request: FileRequest, result: Result, reasons: Reasons = "never") -> dict[str, Any]:
        common = request.index, request.id, request.fingerprint
        if isinstance(result, RequestOutput):
            return batch_openai.answer_record(*common, self._model, result, reasons)
        return batch_openai.error_record(*common, str(result))

    def identity(self, record: Mapping[str, Any]) -> tuple[int, str, bool]:
        return batch_openai.identity(record)


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as one line that a terminal can show.

    An id may hold half of a surrogate pair, which UTF-8 cannot say and JSON writes as an escape.
    """
    text = _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False, default=str))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _answer(output: CompletionOutput) -> dict[str, Any]:
    return {"text": output.text, "finish_reason": output.finish_reason, "answer_tokens": len(output.token_ids)}


def without_bytes(value: Any) -> Any:
    """A value of a row without the bytes in it, which JSON does not have; nor does it have NaN, which becomes null."""
    if isinstance(value, Mapping):
        return {key: without_bytes(inner) for key, inner in value.items() if not isinstance(inner, bytes)}
    if isinstance(value, list):
        return [without_bytes(inner) for inner in value if not isinstance(inner, bytes)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
