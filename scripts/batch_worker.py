"""What works in each actor of Ray (or of anything like it): a model that is never idle while batches follow each other.

:class:`Worker` is for datasets of your own. Ray calls it with batches of rows, several at a time; each call is a thread
that asks the one engine, whose steps serve the requests of all calls: as a batch ends, the next one is at work already.
:class:`PartWorker` is what batch_ray.py runs. This file needs no Ray.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batch_file import FileRequest
from batch_inputs import Source
from batch_model import answered
from batch_records import PlainForm, Result, line_of
from batch_run import Output
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.server.parts import Reasons
from replace_file import replace_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PLAIN = PlainForm()
_ANSWER_KEYS = ("text", "finish_reason", "answer_tokens", "prompt_tokens", "image_tokens", "error")


class Worker:
    """Answers rows; for ``map_batches``, with a batch size and an actor for each GPU::

        dataset.map_batches(
            Worker, batch_size=64, num_gpus=1, compute=ActorPoolStrategy(size=8),
            fn_constructor_kwargs={"model": "Qwen/Qwen3-VL-30B-A3B-Instruct", "prompt": "Describe this picture."},
        )

    A batch keeps its columns and its order, and gains ``text``, ``finish_reason``, ``answer_tokens``,
    ``prompt_tokens``, ``image_tokens`` and ``error``: a row has a text, or an error that says why it has none, and
    never stops the job.

    Args:
        model: a checkpoint directory, a hub id, or "demo"; or a function that gives an :class:`LLM`.
        prompt: what is asked of rows that have no prompt.
        prompt_column: where a row has its prompt, if there is such a column.
        image_column: where a row has its image, if there is such a column: bytes, a path, a URL, an array [height,
            width, 3] of uint8, or a list of these.
        sampling: names and values of :class:`SamplingParams`.
        prefix: of the names of the new columns.
        options: of :class:`LLM`.

    Raises:
        UserError: the model or an option cannot be used.
    """

    def __init__(
        self,
        model: str | Callable[[], LLM] = "demo",
        *,
        prompt: str | None = None,
        prompt_column: str = "prompt",
        image_column: str = "image",
        sampling: Mapping[str, Any] | None = None,
        prefix: str = "",
        **options: Any,
    ):
        self._params = SamplingParams(**(sampling or {}))
        self._prompt, self._columns, self._prefix = prompt, (prompt_column, image_column), prefix
        self._llm = model() if callable(model) else LLM(model, progress=False, **options)

    async def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """A batch with its answers.

        Raises:
            UserError: a column of the batch has the name of a new one, or there is nothing to ask.
        """
        return await asyncio.to_thread(self._answer, batch)

    def _answer(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        twice = [name for name in batch if name.startswith(self._prefix) and self._key(name) in _ANSWER_KEYS]
        if twice:
            raise UserError(f"the dataset has a column {twice[0]!r}, as answers have; give the worker a prefix")
        count = len(next(iter(batch.values()), ()))
        prompts, images = (batch.get(name) for name in self._columns)
        if prompts is None and self._prompt is None:
            raise UserError(f"the dataset has no column {self._columns[0]!r}, and the worker has no prompt")
        requests = []
        for number in range(count):
            prompt = self._prompt if prompts is None or prompts[number] is None else prompts[number]
            # Made in its turn, so that what is wrong with a row is that row's error.
            conversation = partial(_conversation, prompt, None if images is None else images[number])
            requests.append(FileRequest(number, None, "", conversation, self._params))
        results = answers(self._llm, requests)
        records = [_PLAIN.record(request, *result) for request, result in zip(requests, results, strict=True)]
        new = {key: _column([record.get(key) for record in records]) for key in _ANSWER_KEYS}
        return {**batch, **{f"{self._prefix}{key}": values for key, values in new.items()}}

    def _key(self, column: str) -> str:
        return column.removeprefix(self._prefix)


@dataclass(frozen=True)
class Part:
    """Some rows of a job, and the file that their answers go to.

    Attributes:
        source: has at least these rows.
        start, stop: which.
        output: of this part.
        number: of the part.
    """

    source: Source
    start: int
    stop: int
    output: Output
    number: int


class PartWorker:
    """Answers parts of a job, and writes each to its file, whole or not at all.

    Args:
        load: gives the model.

    Attributes:
        problem: why there is no model, or "".
    """

    def __init__(self, load: Callable[[], LLM]):
        self.problem, self._settings = "", {}
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        try:
            self._llm = load()
            self._settings = self._llm.settings
        except Exception as error:  # raised, it would have Ray start the actor again and again
            self.problem = _said(error)

    async def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Work on parts.

        Args:
            batch: pickled :class:`Part` objects under "part".

        Returns:
            Of each part: its ``number``, how many ``rows``, ``errors`` and answer ``tokens``, when it was ``begun`` and
            ``ended`` (seconds since the epoch), the ``worker`` and its ``settings``, and the ``problem`` with the job
            that should end it, or "".
        """
        parts = [pickle.loads(part) for part in batch["part"]]
        done = [await asyncio.to_thread(self._part, part) for part in parts]
        return {key: [each[key] for each in done] for key in done[0]}

    def _part(self, part: Part) -> dict[str, Any]:
        begun, counts, problem = time.time(), (0, 0, 0), self.problem
        if not problem:
            try:
                counts = self._write(part)
            except Exception as error:
                problem = _said(error)
        rows, errors, tokens = counts
        return {
            "number": part.number,
            "rows": rows,
            "errors": errors,
            "tokens": tokens,
            "begun": begun,
            "ended": time.time(),
            "worker": self._name,
            "settings": ", ".join(f"{key} {value}" for key, value in self._settings.items()),
            "problem": problem,
        }

    def _write(self, part: Part) -> tuple[int, int, int]:
        requests, output = part.source.requests(part.start, part.stop), part.output
        results = answers(self._llm, requests)
        records = [output.form.record(request, *result) for request, result in zip(requests, results, strict=True)]
        path = Path(output.path)
        try:
            if output.table:
                from batch_tables import write_table

                rows = part.source.batches(part.start, part.stop)
                write_table(path, part.source.schema(), rows, records, output.prefix)
            else:
                replace_file(path, map(line_of, records))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        errors = sum(isinstance(result, Exception | str) for result, _ in results)
        return len(records), errors, sum(_tokens(result) for result, _ in results)


def answers(llm: LLM, requests: list[FileRequest]) -> list[tuple[Result, Reasons]]:
    """The answer to each request, or what is wrong with it, in their order; and where the reasoning of each is."""
    results: list[tuple[Result, Reasons]] = [(request.error or "", "never") for request in requests]
    valid = [number for number, request in enumerate(requests) if request.error is None]
    with closing(answered(llm, [requests[number] for number in valid])) as done:
        for place, result, reasons in done:
            results[valid[place]] = result, reasons
    return results


def _tokens(result: Result) -> int:
    return 0 if isinstance(result, Exception | str) else sum(len(output.token_ids) for output in result.outputs)


def _said(error: Exception) -> str:
    """What the user is told of an error; of one that nobody foresaw, the worker's log has the rest."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def _conversation(prompt: Any, image: Any) -> list[dict]:
    images = [_image(each) for each in (image if isinstance(image, list | tuple) else [image]) if each is not None]
    items = [{"type": "image", "image": each} for each in images]
    text = prompt.item() if isinstance(prompt, np.generic) else prompt
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def _image(value: Any) -> Any:
    """An image as a message takes it: ``datasets`` and Ray have some forms of their own."""
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        from PIL import Image

        return Image.fromarray(value)
    return value.item() if isinstance(value, np.generic) else value


def _column(values: list[Any]) -> NDArray[Any]:
    """A column with gaps: Ray makes an Arrow column of the objects."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
