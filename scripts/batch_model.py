"""Requests of a batch to a model, and its answers back: the same in one process (batch_run.py) and in many
(batch_worker.py).

Checkpoints that think before they answer are served as the server serves them: where the reasoning of an answer is goes
with it to whoever writes the record.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

from batch_file import FileRequest
from qwen3vl_moe.engine.outputs import RequestOutput
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.server.parts import Reasons, reasons_of

if TYPE_CHECKING:
    from qwen3vl_moe.engine import LLM

Answered = tuple[int, RequestOutput | UserError, Reasons]


def answered(llm: LLM, requests: list[FileRequest]) -> Generator[Answered, None, None]:
    """Answer requests that have no error of their own, in any order. Closing the iterator gives the rest up.

    Yields:
        the place of a request in the list; its answer, or what is wrong with it; and where the reasoning of the answer
        is (:class:`.Parts`).
    """
    conversations, params = [request.conversation for request in requests], [request.params for request in requests]
    template = llm.processor.chat_template
    with closing(llm.as_completed(conversations, params, return_exceptions=True)) as results:
        for place, result in results:
            prompt = result.prompt if isinstance(result, RequestOutput) else None
            yield place, result, reasons_of(template, prompt)
