"""The engine's side of a server: one thread that drives the engine, and one that hears what is asked.

What is asked is looked at between steps, so a request joins the running batch with the next step, and one that is given
up is gone before it. After each step, all that it gave to all requests goes out in one message. The thread waits for no
client: who reads slowly finds more at once.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qwen3vl_moe.engine.engine import Engine
from qwen3vl_moe.engine.outputs import Logprob
from qwen3vl_moe.engine.sequence import Sequence as Answer
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.inputs.workers import POOL
from qwen3vl_moe.server.wire import Ask, Delta, Flush, GiveUp, Load, News, Ready, Told, Wire


@dataclass(eq=False)
class _Going:
    """A request in the engine: its answers, and how much of each has been told."""

    live: bool
    answers: list[Answer]

    def __post_init__(self) -> None:
        count = len(self.answers)
        self.shown, self.tokens, self.open = [0] * count, [0] * count, set(range(count))
        self.started = False


class EngineThread:
    """Drives an engine that nobody else uses.

    Args:
        wire: to where requests come from; once that has ended, they are given up and the thread ends.
        on_ready: called, in another thread, when it is ready there.
        on_failure: called, in the engine's thread, when the engine has failed.

    Attributes:
        failure: why it has ended, if something went wrong.
    """

    def __init__(
        self,
        engine: Engine,
        wire: Wire,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self.engine, self.failure = engine, None
        self._wire, self._on_ready, self._on_failure = wire, on_ready, on_failure
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._going: dict[int, _Going] = {}
        self._compiling: dict[int, Ask] = {}  # requests whose grammar is not known yet
        self._load: Load | None = None  # as it was told last
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._run, self._hear)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for its end, which is that of the wire."""
        for thread in self._threads:
            if thread.ident is not None:  # else it was never started
                thread.join()

    def _hear(self) -> None:
        try:
            while True:
                message = self._wire.receive()
                if isinstance(message, Ready):
                    self._on_ready()
                else:
                    self._inbox.put(message)
        except EOFError:
            self._inbox.put(None)
        except BaseException as error:  # a message that cannot be read: whoever sent it would wait for ever
            self._inbox.put(error)

    def _run(self) -> None:
        try:
            while self._heed():
                if self._going:
                    self.engine.step()
                    self._tell(self._news())
            for going in self._going.values():
                self._abort(going)
        except BaseException as error:  # of the device, or a mistake in here: no request can be trusted to end well
            if isinstance(error, UserError):  # it says all there is to say, as where a rank has ended
                self.failure = f"the engine has failed: {error}"
            else:
                traceback.print_exc()
                self.failure = f"the engine has failed: {type(error).__name__}: {error}"
            self._on_failure()
            self._tell((), failed=True)
        self._going.clear()

    def _heed(self) -> bool:
        """Do what was asked for meanwhile; wait if there is nothing else to do. False: nobody asks any more."""
        while not self._going or not self._inbox.empty():
            if self._inbox.empty():
                self._tell(())
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, Flush):
                self.engine.cache.forget_all()
            elif isinstance(message, Ask):
                if message.params.structured_outputs is None:
                    self._begin(message)
                else:  # to compile its grammar may take longer than many steps
                    self._compiling[message.number] = message
                    POOL.submit(self._compile, message)
            elif isinstance(message, GiveUp):
                self._compiling.pop(message.number, None)
                if (going := self._going.pop(message.number, None)) is not None:
                    self._abort(going)
            elif (ask := self._compiling.pop(message, None)) is not None:
                self._begin(ask)
        return True

    def _compile(self, ask: Ask) -> None:
        try:
            for prompt, *_ in ask.prepared:
                self.engine.check(self.engine.admission.formed(ask.params, prompt))
        finally:  # whatever went wrong is raised again when the request begins
            self._inbox.put(ask.number)

    def _begin(self, ask: Ask) -> None:
        try:
            answers = [
                answer
                for prompt, arrival, seconds in ask.prepared
                for answer in self.engine.requests(prompt, ask.params, arrival, seconds)
            ]
        except UserError as error:
            self._tell([News(ask.number, ended=True, error=error)])
            return
        self._going[ask.number] = _Going(ask.live, answers)
        for answer in answers:
            self.engine.add(answer)

    def _abort(self, going: _Going) -> None:
        for answer in going.answers:
            self.engine.abort(answer)

    def _news(self) -> list[News]:
        """What the last step gave."""
        found = []
        for number, going in list(self._going.items()):
            answers = going.answers
            started = not going.started and answers[0].metrics.first_scheduled_time is not None
            going.started |= started
            error = next((answer.error for answer in answers if answer.error is not None), None)
            deltas = [] if error is not None else _deltas(going)
            if error is None and going.open:
                if deltas or started:
                    found.append(News(number, deltas, started))
                continue
            cached = sum(answer.metrics.num_cached_tokens for answer in answers if answer.index == 0)
            metrics = [answer.metrics for answer in answers]
            found.append(News(number, deltas, started, True, error, cached, metrics))
            self._abort(self._going.pop(number))  # of a failed request's other answers
        return found

    def _tell(self, news: Sequence[News], failed: bool = False) -> None:
        scheduler, cache = self.engine.scheduler, self.engine.cache
        load = Load(len(scheduler.running), len(scheduler.waiting), 1 - cache.num_free / cache.num_blocks)
        if news or failed or load != self._load:
            self._load = load
            with suppress(OSError):  # nobody listens any more, and the thread that hears will say so
                self._wire.send(Told(news, load, failed))


def _deltas(going: _Going) -> list[Delta]:
    """What each answer has gained, if its stream wants to know."""
    found = []
    for choice in list(going.open):
        answer = going.answers[choice]
        finish_reason = answer.finish_reason
        if finish_reason is None and (not going.live or answer.num_output_tokens == going.tokens[choice]):
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
