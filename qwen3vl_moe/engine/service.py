"""Requests of callers in any thread, served by one engine.

A call is a generator that works while somebody asks it for its next value: it takes prompts that are ready, computes a
step, and looks which of its requests have ended. A step serves the requests of all calls, and calls take turns at it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from qwen3vl_moe.engine.calls import Call, Turns
from qwen3vl_moe.engine.engine import Engine
from qwen3vl_moe.engine.intake import Intake
from qwen3vl_moe.engine.outputs import RequestOutput, joined
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import PromptError, UserError
from qwen3vl_moe.inputs.processor import Prompt

Prepare = Callable[[Any, int | None], Prompt]  # of a request, and of how many tokens to keep at most (None: of all)
Timed = tuple[
    Prompt, float, float
]  # a prompt, when work on it began (since the epoch) and how long it took, in seconds


_AHEAD = 128  # requests that are prepared and wait for the engine


class Service:
    """Calls of one engine.

    Args:
        engine: used by nobody else while a call is at work.
    """

    def __init__(self, engine: Engine):
        self.engine, self._turns = engine, Turns()

    def answers(
        self, items: list, prepare: Prepare, kind: str, params: list[SamplingParams], return_exceptions: bool
    ) -> Generator[tuple[int, RequestOutput | UserError], None, None]:
        """See :meth:`.LLM.as_completed`. Requests begin when the first answer is asked for."""
        call = self._turns.joined_by(Call())
        return call.runs(self._answers(call, items, prepare, kind, params, return_exceptions))

    def stream(self, item: Any, prepare: Prepare, params: SamplingParams) -> Generator[RequestOutput, None, None]:
        """See :meth:`.LLM.stream`. The prompt is made and checked at once, the request begins with the first output."""
        call = self._turns.joined_by(Call())
        prompt, arrival, seconds = self.prepared(prepare, (item, params))
        return call.runs(self._stream(self.engine.requests(prompt, params, arrival, seconds, call)))

    def _stream(self, sequences: list[Sequence]) -> Generator[RequestOutput, None, None]:
        shown, finished = 0, False
        try:
            self._begin(sequences)
            while not finished:
                with self._turns.lock:  # also while its text is made: a step of another call may add to it
                    self._step_for([sequences])
                    for sequence in sequences:
                        sequence.spell()
                    finished, written = _ended(sequences), sum(len(sequence.text.text) for sequence in sequences)
                    outputs = [sequence.output() for sequence in sequences] if finished or written > shown else []
                self._turns.let_others()
                error = _error_of(sequences)
                if error is not None:
                    raise error
                if outputs:
                    shown = written
                    yield joined(outputs)
        finally:
            self._give_up([sequences])

    def _answers(
        self,
        call: Call,
        items: list,
        prepare: Prepare,
        kind: str,
        params: list[SamplingParams],
        return_exceptions: bool,
    ) -> Generator[tuple[int, RequestOutput | UserError], None, None]:
        going: dict[int, list[Sequence]] = {}

        def result(number: int, error_or_output: RequestOutput | UserError) -> tuple[int, RequestOutput | UserError]:
            if isinstance(error_or_output, UserError) and not return_exceptions:
                where = f"{kind} {number}: " if len(items) > 1 else ""
                raise type(error_or_output)(f"{where}{error_or_output}") from error_or_output.__cause__
            return number, error_or_output

        # Images take far more memory as pixels than as files: only so many requests are prepared ahead.
        ahead = min(self.engine.scheduler.max_num_seqs, _AHEAD)
        pairs = list(zip(items, params, strict=True))
        intake = Intake(lambda pair: self.prepared(prepare, pair), pairs, ahead)
        with closing(intake):
            try:
                self._begin([])
                while intake.left or going:
                    while intake.left and self.engine.has_room:
                        taken = intake.take(may_wait=not going)
                        if taken is None:
                            break
                        number, get = taken
                        try:
                            prompt, arrival, seconds = get()
                            sequences = self.engine.requests(prompt, params[number], arrival, seconds, call)
                        except UserError as error:
                            yield result(number, error)
                        else:
                            going[number] = sequences
                            self._begin(sequences)
                    self._advance(going.values())
                    for number in [number for number, sequences in going.items() if _ended(sequences)]:
                        sequences = going.pop(number)
                        self._give_up([sequences])  # of a failed request's other answers
                        error = _error_of(sequences)
                        yield result(number, error or joined([sequence.output() for sequence in sequences]))
            finally:
                # After an error or Ctrl-C nothing of this call stays behind, and the engine can go on.
                self._give_up(going.values())

    def _begin(self, sequences: list[Sequence]) -> None:
        with self._turns.lock:
            self.engine.settle()
            for sequence in sequences:
                self.engine.add(sequence)

    def _advance(self, requests: Any) -> None:
        """A step for these requests, and then one of another call."""
        with self._turns.lock:
            self._step_for(requests)
        self._turns.let_others()

    def _step_for(self, requests: Any) -> None:
        """A step, unless one of these requests has been brought to its end meanwhile, by another call."""
        if not any(_ended(sequences) for sequences in requests):
            self.engine.step()

    def _give_up(self, requests: Any) -> None:
        with self._turns.lock:
            for sequences in requests:
                for sequence in sequences:
                    self.engine.abort(sequence)
            self.engine.settle()

    def prepared(self, prepare: Prepare, pair: tuple[Any, SamplingParams]) -> Timed:
        """Make a prompt.

        Raises:
            PromptError: it cannot be made, for whatever reason: one bad request is that request's error alone.
        """
        item, params = pair
        arrival = time.time()
        try:
            return prepare(item, self._kept(params)), arrival, time.time() - arrival
        except UserError:
            raise
        except Exception as error:  # of a library that met what nobody foresaw; the cause keeps its traceback
            raise PromptError(f"the request cannot be prepared: {type(error).__name__}: {error}") from error

    def _kept(self, params: SamplingParams) -> int | None:
        """How many tokens of a prompt are kept at most."""
        if params.truncate_prompt_tokens != -1:
            return params.truncate_prompt_tokens
        answer = self.engine.defaults.complete(params).max_tokens or 1
        return max(1, self.engine.max_model_len - answer)


def _ended(sequences: list[Sequence]) -> bool:
    if len(sequences) == 1:  # nearly always, and asked twice a step of every request
        return sequences[0].finished
    return all(sequence.finished for sequence in sequences) or _error_of(sequences) is not None


def _error_of(sequences: list[Sequence]) -> UserError | None:
    return next((sequence.error for sequence in sequences if sequence.error is not None), None)
