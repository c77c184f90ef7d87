"""The clients' side of the engine: streams of answers in an event loop, and the link that they come by."""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.outputs import RequestMetrics
from qwen3vl_moe.server.wire import Ask, Delta, Flush, GiveUp, Load, News, Prepared, Ready, Stop, Told, Wire

_LAST_WORDS = 5.0  # seconds in which clients are told that the engine's process has ended


class EngineEnded(Exception):
    """The engine has ended, or is about to."""


@dataclass(eq=False)
class Stream:
    """The answers to one request, on their way to the one task that reads it.

    Attributes:
        prepared: a prompt, or several.
        params: of all of them.
        live: whether answers are wanted while they are written, or only when they are finished.
        on_change: called with "started" after the first step, and with "ended".
        num_cached: prompt tokens that were found in the cache, once it has ended.
        metrics: of each answer, once it has ended.
    """

    prepared: Sequence[Prepared]
    params: SamplingParams
    live: bool
    on_change: Callable[[str], None] = lambda what: None
    num_cached: int = 0
    metrics: Sequence[RequestMetrics] = ()
    number: int = -1
    started: bool = False
    ended: bool = False
    _deltas: list[Delta] = field(default_factory=list)
    _error: Exception | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

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

    def take(self, news: News) -> None:
        """What a step gave."""
        self._deltas += news.deltas
        if news.started and not self.started:
            self.started = True
            self.on_change("started")
        if news.ended and not self.ended:
            self.ended, self._error = True, news.error
            self.num_cached, self.metrics = news.num_cached, news.metrics
            self.on_change("ended")
        self._changed.set()


class Link:
    """To the engine's process. All of it runs in one event loop, but for two threads that hear and send.

    Args:
        on_stop: called when no more requests should be taken.

    Attributes:
        load: of the engine, as of its last step.
        failed: whether it has ended, or its process has.
    """

    def __init__(self, wire: Wire, on_stop: Callable[[], None]):
        self.load, self.failed = Load(0, 0, 0.0), False
        self._wire, self._on_stop = wire, on_stop
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # so that the loop never waits for the other side

    def start(self) -> None:
        """Begin to hear, in the loop that runs."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._hear, args=(loop,), daemon=True).start()
        threading.Thread(target=self._send, daemon=True).start()

    def ready(self) -> None:
        """Connections are taken."""
        self._outbox.put(Ready())

    def add(self, stream: Stream) -> None:
        """Answer a request from the next step on."""
        if self.failed:
            stream.take(_ended(stream.number))
            return
        stream.number = next(self._numbers)
        self._streams[stream.number] = stream
        self._outbox.put(Ask(stream.number, stream.prepared, stream.params, stream.live))
        stream.prepared = ()  # pixels, which are needed there alone

    def give_up(self, stream: Stream) -> None:
        """Free what a request holds. Harmless on one that has ended."""
        if self._streams.pop(stream.number, None) is not None:
            self._outbox.put(GiveUp(stream.number))
            stream.take(News(stream.number, ended=True))

    def flush_cache(self) -> None:
        """Let no prompt find anything of those before it."""
        self._outbox.put(Flush())

    def _send(self) -> None:
        try:
            while True:
                self._wire.send(self._outbox.get())
        except OSError:  # the other end is gone, which the other thread says
            pass
        except BaseException:  # a message that cannot be sent: all who ask would wait for ever
            traceback.print_exc()
            os._exit(1)

    def _hear(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            while True:
                loop.call_soon_threadsafe(self._heard, self._wire.receive())
        except EOFError:
            print("error: the engine's process has ended", file=sys.stderr, flush=True)
        except BaseException:  # a message that cannot be read
            if loop.is_closed():  # all is over
                return
            traceback.print_exc()
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._heard, Told((), self.load, failed=True))
            loop.call_soon_threadsafe(self._on_stop)
        time.sleep(_LAST_WORDS)
        os._exit(1)

    def _heard(self, message: Told | Stop) -> None:
        if isinstance(message, Stop):
            self._on_stop()
            return
        self.load = message.load
        for news in message.news:
            stream = self._streams.get(news.number)
            if stream is not None:  # else it was given up meanwhile
                if news.ended:
                    del self._streams[news.number]
                stream.take(news)
        if message.failed:
            self.failed = True
            left, self._streams = self._streams, {}
            for number, stream in left.items():
                stream.take(_ended(number))


def _ended(number: int) -> News:
    # What has failed is for whoever runs the server, not for whoever asks it.
    return News(number, ended=True, error=EngineEnded("the engine has failed"))
