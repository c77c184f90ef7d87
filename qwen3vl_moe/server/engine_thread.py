"""The one thread that drives the engine, and what goes between it and the event loop.

Requests and cancellations reach the thread through a queue and are looked at between steps, so a request joins the
running batch with the next step, and one that is given up is gone before it. After each step, all that it gave to all
streams goes to the event loop in one call. The thread waits for nobody: who reads slowly finds more at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.engine import Engine
from qwen3vl_moe.engine.outputs import Logprob, RequestMetrics
from qwen3vl_moe.engine.sequence import Sequence as Answer
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.inputs.processor import Prompt


class Prepared(NamedTuple):
    """A prompt, when work on it began (seconds since the epoch), and how many seconds it took."""

    prompt: Prompt
    arrival: float
    seconds: float


class Delta(NamedTuple):
    """What an answer has gained.

    Attributes:
        choice: which answer of the request.
        text: that was added.
        num_tokens: of the answer so far.
        logprobs: of the tokens that were added, if they were asked for, each with the id of the token.
        finish_reason: "stop" or "length" once it has ended.
    """

    choice: int
    text: str
    num_tokens: int
    logprobs: list[tuple[int, dict[int, Logprob]]]
    finish_reason: str | None


class EngineEnded(Exception):
    """The thread has ended, or is about to."""


@dataclass(eq=False)
class Stream:
    """The answers to one request, on their way to the event loop, which alone reads it.

    Attributes:
        prepared: a prompt, or several.
        params: of all of them.
        live: whether answers are wanted while they are written, or only when they are finished.
        num_cached: prompt tokens that were found in the cache.
        metrics: of each answer.
    """

    loop: asyncio.AbstractEventLoop
    prepared: Sequence[Prepared]
    params: SamplingParams
    live: bool
    on_change: Callable[[str], None] = lambda what: None
    num_cached: int = 0
    metrics: list[RequestMetrics] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = self.ended = False
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def next(self) -> list[Delta]:
        """All that has come since the last call, at least one; an empty list once everything has been taken.

        Raises:
            UserError: the request cannot be answered.
            EngineEnded: nor can any other.
        """
        while not self._deltas and not self.ended:
            self._changed.clear()
            await self._changed.wait()
        if not self._deltas and self._error is not None:
            raise self._error
        deltas, self._deltas = self._deltas, []
        return deltas

    def take(self, deltas: Sequence[Delta], started: bool, ended: bool, error: Exception | None) -> None:
        """In the event loop: what a step gave."""
        self._deltas += deltas
        if started and not self.started:
            self.started = True
            self.on_change("started")
        if ended and not self.ended:
            self.ended, self._error = True, error
            self.on_change("ended")
        self._changed.set()


@dataclass(eq=False)
class _Going:
    """A stream in the engine: its answers, and how much of each has been told."""

    stream: Stream
    answers: list[Answer]

    def __post_init__(self) -> None:
        count = len(self.answers)
        self.shown, self.tokens, self.open = [0] * count, [0] * count, set(range(count))
        self.started = False


Message = tuple[Stream, Sequence[Delta], bool, bool, Exception | None]


class EngineThread:
    """Drives an engine that nobody else uses.

    Attributes:
        failure: why it has ended, if something went wrong.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], None] = lambda: None):
        self.engine, self.failure = engine, None
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._going: dict[Stream, _Going] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()  # of the order of: telling it something, and its end

    def start(self) -> None:
        self._thread.start()

    def add(self, stream: Stream) -> None:
        """Answer a request from the next step on."""
        self._tell("add", stream)

    def abort(self, stream: Stream) -> None:
        """Give a request up and free what it holds. Harmless on one that has ended."""
        if not stream.ended:
            self._tell("abort", stream)

    def flush_cache(self) -> None:
        """Let no prompt find anything of those before it."""
        self._tell("flush", None)

    def stop(self, timeout: float | None = None) -> None:
        """Give everything up, and wait for the thread."""
        self._tell("stop", None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    @property
    def load(self) -> tuple[int, int]:
        """How many answers are being computed, and how many wait. Read while the thread works: only to be shown."""
        scheduler = self.engine.scheduler
        return len(scheduler.running), len(scheduler.waiting)

    def _tell(self, what: str, stream: Stream | None) -> None:
        with self._lock:
            if not self._stopping:
                self._inbox.put((what, stream))
            elif what == "add" and stream is not None:
                stream.take((), False, True, self._end())

    def _end(self) -> EngineEnded:
        # What has failed is for whoever runs the server, not for whoever asks it.
        return EngineEnded("the server is stopping" if self.failure is None else "the engine has failed")

    def _run(self) -> None:
        try:
            while self._heed():
                if self._going:
                    self.engine.step()
                    self._report()
        except BaseException as error:  # of the device, or a mistake in here: no request can be trusted to end well
            if isinstance(error, UserError):  # it says all there is to say, as where a rank has ended
                self.failure = f"the engine has failed: {error}"
            else:
                traceback.print_exc()
                self.failure = f"the engine has failed: {type(error).__name__}: {error}"
        with self._lock:
            self._stopping = True
        for stream in self._left():
            self._send([(stream, (), False, True, self._end())])
        if self.failure is not None:
            self._on_failure()

    def _left(self) -> list[Stream]:
        """Streams that will get nothing more; the engine forgets them, if it still can."""
        left = list(self._going)
        while not self._inbox.empty():
            what, stream = self._inbox.get()
            if what == "add":
                left.append(stream)
        if self.failure is None:
            for going in self._going.values():
                for answer in going.answers:
                    self.engine.abort(answer)
        self._going.clear()
        return left

    def _heed(self) -> bool:
        """Do what was asked for meanwhile; wait if there is nothing else to do. False: it was to stop."""
        while not self._going or not self._inbox.empty():
            what, stream = self._inbox.get()
            if what == "stop":
                return False
            if what == "flush":
                self.engine.cache.forget_all()
            elif what == "add":
                self._begin(stream)
            elif (going := self._going.pop(stream, None)) is not None:
                for answer in going.answers:
                    self.engine.abort(answer)
        return True

    def _begin(self, stream: Stream) -> None:
        try:
            answers = [
                answer
                for prompt, arrival, seconds in stream.prepared
                for answer in self.engine.requests(prompt, stream.params, arrival, seconds)
            ]
        except UserError as error:
            self._send([(stream, (), False, True, error)])
            return
        stream.metrics = [answer.metrics for answer in answers]
        self._going[stream] = _Going(stream, answers)
        for answer in answers:
            self.engine.add(answer)

    def _report(self) -> None:
        """What the last step gave, to all whom it concerns."""
        messages, over = [], []
        for stream, going in self._going.items():
            started = not going.started and going.answers[0].metrics.first_scheduled_time is not None
            going.started |= started
            error = next((answer.error for answer in going.answers if answer.error is not None), None)
            if error is not None:
                over.append(stream)
                messages.append((stream, (), True, True, error))
                continue
            deltas = _deltas(going)
            if not going.open:
                over.append(stream)
                stream.num_cached = sum(
                    answer.metrics.num_cached_tokens for answer in going.answers if answer.index == 0
                )
            if deltas or started:
                messages.append((stream, deltas, started, not going.open, None))
        for stream in over:
            for answer in self._going.pop(stream).answers:
                self.engine.abort(answer)  # of a failed request's other answers
        if messages:
            self._send(messages)

    def _send(self, messages: list[Message]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            messages[0][0].loop.call_soon_threadsafe(_deliver, messages)


def _deltas(going: _Going) -> list[Delta]:
    """What each answer has gained, if its stream wants to know."""
    found = []
    for choice in list(going.open):
        answer = going.answers[choice]
        finish_reason = answer.finish_reason
        if finish_reason is None and (not going.stream.live or answer.num_output_tokens == going.tokens[choice]):
            continue
        answer.spell()
        text, before = answer.text.text, going.tokens[choice]
        new, count = text[going.shown[choice] :], answer.num_output_tokens
        logprobs: list[tuple[int, dict[int, Logprob]]] = []
        if answer.params.logprobs is not None:
            logprobs = list(zip(answer.output_ids[before:count], answer.logprobs[before:count], strict=True))
        if new or logprobs or finish_reason is not None:
            going.shown[choice], going.tokens[choice] = len(text), count
            found.append(Delta(choice, new, count, logprobs, finish_reason))
            if finish_reason is not None:
                going.open.discard(choice)
    return found


def _deliver(messages: list[Message]) -> None:
    for stream, deltas, started, ended, error in messages:
        stream.take(deltas, started, ended, error)
