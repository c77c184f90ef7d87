"""Requests of a batch to a model, and its answers back: the same in one process (batch_run.py) and in many
(batch_worker.py).

Checkpoints that think before they answer are served as the server serves them: a form of the answer begins where the
thinking has ended, and where the reasoning of an answer is goes with it to whoever writes the record.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from batch_file import FileRequest
from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.outputs import RequestOutput
from qwen3vl_moe.errors import OptionError, UserError
from qwen3vl_moe.server.parts import Reasons, reasons_of
from qwen3vl_moe.server.tools import after_thinking

if TYPE_CHECKING:
    from qwen3vl_moe.engine import LLM

Answered = tuple[int, RequestOutput | UserError, Reasons]


def answered(llm: LLM, requests: list[FileRequest]) -> Generator[Answered, None, None]:
    """Answer requests that have no error of their own, in any order. Closing the iterator gives the rest up.

    Yields:
        the place of a request in the list; its answer, or what is wrong with it; and where the reasoning of the answer
        is (:class:`.Parts`).
    """
    formed = any(request.params.structured_outputs is not None for request in requests)
    thinks = formed and _thinks_first(llm)
    asked: list[tuple[int, SamplingParams]] = []
    for place, request in enumerate(requests):
        params = request.params
        if thinks and params.structured_outputs is not None:
            try:
                params = replace(params, structured_outputs=after_thinking(dict(params.structured_outputs)))
            except OptionError as error:
                yield place, error, "never"
                continue
        asked.append((place, params))
    conversations = [requests[place].conversation for place, _ in asked]
    template = llm.processor.chat_template
    with closing(llm.as_completed(conversations, [params for _, params in asked], return_exceptions=True)) as results:
        for number, result in results:
            prompt = result.prompt if isinstance(result, RequestOutput) else None
            yield asked[number][0], result, reasons_of(template, prompt)


def _thinks_first(llm: LLM) -> bool:
    """Whether the template has every answer begin within its reasoning."""
    template = llm.processor.chat_template
    prompt = None if template is None else llm.processor.chat([{"role": "user", "content": "Hello"}]).text
    return reasons_of(template, prompt) == "at once"
