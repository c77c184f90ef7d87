"""Requests of callers in any thread, served by one engine.

A call is a generator that works while somebody asks it for its next value: it takes prompts that are ready, computes a
step, and looks which of its requests have ended. A step serves the requests of all calls, and calls take turns at it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any

from qwen3vl_moe.engine.admission import Prepare, Timed
from qwen3vl_moe.engine.calls import Call, Turns
from qwen3vl_moe.engine.engine import Engine
from qwen3vl_moe.engine.feed import Feed
from qwen3vl_moe.engine.intake import Intake
from qwen3vl_moe.engine.outputs import RequestOutput, joined
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import UserError

Answer = tuple[Any, RequestOutput | UserError]  # with the number, or another key, of its request
Answers = Generator[Answer, None, None]
Going = dict[Any, list[Sequence]]  # the answers of requests that are under way

MOST_AHEAD = 128  # requests that are prepared and wait for the engine


class Service:
    """Calls of one engine.

    Args:
        engine: used by nobody else while a call is at work.
    """

    def __init__(self, engine: Engine):
        self.engine, self._turns = engine, Turns()

    def answers(
        self, items: list, prepare: Prepare, kind: str, params: list[SamplingParams], return_exceptions: bool
    ) -> Answers:
        """See :meth:`.LLM.as_completed`. Requests begin when the first answer is asked for."""
        pairs = list(zip(items, params, strict=True))
        # Of several, one is decoded while others are answered: whole, so that they make the same steps each time.
        ahead = len(pairs) == 1
        intake = Intake(lambda pair: self.prepared(prepare, pair, ahead), pairs, self.ahead)
        answers = self.serve(intake, params.__getitem__)
        return answers if return_exceptions else first_error_raised(answers, kind, len(items))

    @property
    def ahead(self) -> int:
        """How many requests are prepared ahead: images take far more memory as pixels than as files."""
        return min(self.engine.scheduler.max_num_seqs, MOST_AHEAD)

    def stream(self, item: Any, prepare: Prepare, params: SamplingParams) -> Generator[RequestOutput, None, None]:
        """See :meth:`.LLM.stream`. The prompt is made and checked at once, the request begins with the first output."""
        call = self._turns.joined_by(Call())
        prompt, arrival, seconds = self.prepared(prepare, (item, params), ahead=True)
        body = self._stream(self.engine.requests(prompt, params, arrival, seconds, call))
        next(body)
        return call.runs(body)

    def _stream(self, sequences: list[Sequence]) -> Generator[Any, None, None]:
        shown, finished = 0, False
        try:
            # Up to here at once: from Python 3.12 on, closing a generator that never began lets go of nothing, neither
            # of the prompt's pixels nor of frames that are being decoded.
            yield
            self._begin(sequences)
            while not finished:
                with self._turns.lock:  # also while its text is made: a step of another call may add to it
                    self._step_for([sequences])
                    for sequence in sequences:
                        sequence.spell()
                    finished, written = _ended(sequences), sum(len(sequence.text.text) for sequence in sequences)
                    outputs = [sequence.output() for sequence in sequences] if finished or written > shown else []
                self._let_others()
                error = _error_of(sequences)
                if error is not None:
                    raise error
                if outputs:
                    shown = written
                    yield joined(outputs)
        finally:
            self.give_up([sequences])

    def serve(
        self,
        source: Intake | Feed,
        params_of: Callable[[Any], SamplingParams],
        between: Callable[[Going], Iterable[Answer]] = lambda going: (),
    ) -> Answers:
        """Answer what a source has; yields its keys with outputs, or with what is wrong with a request.

        Args:
            source: of results of :meth:`prepared`; closed at the end.
            params_of: of a key.
            between: called before each step with the requests that are under way. It may add to the source, take some
                of them out (:meth:`give_up`), and has answers of others.
        """
        call = self._turns.joined_by(Call())
        return call.runs(self._serve(call, source, params_of, between))

    def _serve(
        self,
        call: Call,
        source: Intake | Feed,
        params_of: Callable[[Any], SamplingParams],
        between: Callable[[Going], Iterable[Answer]],
    ) -> Answers:
        going: Going = {}
        with closing(source):
            try:
                self._begin([])
                while source.left or going:
                    yield from between(going)
                    while source.left and self.engine.has_room:
                        taken = source.take(may_wait=not going)
                        if taken is None:
                            break
                        key, get = taken
                        try:
                            prompt, arrival, seconds = get()
                            sequences = self.engine.requests(prompt, params_of(key), arrival, seconds, call)
                        except UserError as error:
                            yield key, error
                        else:
                            going[key] = sequences
                            self._begin(sequences)
                    self._advance(going.values())
                    for key in [key for key, sequences in going.items() if _ended(sequences)]:
                        sequences = going.pop(key)
                        self.give_up([sequences])  # of a failed request's other answers
                        error = _error_of(sequences)
                        yield key, error or joined([sequence.output() for sequence in sequences])
            finally:
                # After an error or Ctrl-C nothing of this call stays behind, and the engine can go on.
                self.give_up(going.values())

    def _begin(self, sequences: list[Sequence]) -> None:
        with self._turns.lock:
            self.engine.settle()
            for sequence in sequences:
                self.engine.add(sequence)

    def _advance(self, requests: Any) -> None:
        """A step for these requests, and then one of another call."""
        with self._turns.lock:
            self._step_for(requests)
        self._let_others()

    def _let_others(self) -> None:
        self.engine.wait_for_frames()
        self._turns.let_others()

    def _step_for(self, requests: Any) -> None:
        """A step, unless one of these requests has been brought to its end meanwhile, by another call."""
        if not any(_ended(sequences) for sequences in requests):
            self.engine.step()

    def give_up(self, requests: Iterable[list[Sequence]]) -> None:
        """End requests before their time."""
        with self._turns.lock:
            for sequences in requests:
                for sequence in sequences:
                    self.engine.abort(sequence)
            self.engine.settle()

    def prepared(self, prepare: Prepare, pair: tuple[Any, SamplingParams], ahead: bool = False) -> Timed:
        """See :meth:`.Admission.prepared`."""
        return self.engine.admission.prepared(prepare, pair, ahead)


def _ended(sequences: list[Sequence]) -> bool:
    if len(sequences) == 1:  # nearly always, and asked twice a step of every request
        return sequences[0].finished
    return all(sequence.finished for sequence in sequences) or _error_of(sequences) is not None


def _error_of(sequences: list[Sequence]) -> UserError | None:
    return next((sequence.error for sequence in sequences if sequence.error is not None), None)


def first_error_raised(answers: Answers, kind: str, count: int) -> Answers:
    """Answers up to the first error, which is raised and says which of ``count`` requests it is about."""
    with closing(answers):
        for number, answer in answers:
            if isinstance(answer, UserError):
                where = f"{kind} {number}: " if count > 1 else ""
                raise type(answer)(f"{where}{answer}") from answer.__cause__
            yield number, answer
