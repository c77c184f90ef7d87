"""Who waits for an answer, and whose turn it is at the engine."""

from __future__ import annotations

import threading
import time
import weakref
from functools import partial
from types import GeneratorType
from typing import TypeVar

Body = TypeVar("Body")
_PAUSE = 5e-5  # seconds: a waiting thread needs less to wake up and take the lock


class Call:
    """A call of :class:`.llm.LLM` that is a generator, known to the sequences that belong to it.

    An interrupt may strike anywhere, in the middle of tidying up too. So nothing depends on the call's last lines:
    whether it is over can be asked at any time.
    """

    def __init__(self) -> None:
        self._body: weakref.ref[GeneratorType] | None = None

    def runs(self, body: Body) -> Body:
        """Say which generator the call is; returns it."""
        assert isinstance(body, GeneratorType)
        self._body = weakref.ref(body)
        return body

    @property
    def over(self) -> bool:
        """Whether the generator has ended, by its end, by an error or by being closed, or is gone."""
        body = None if self._body is None else self._body()
        return body is None or body.gi_frame is None


class Turns:
    """A lock, and a pause after each turn for those who wait for theirs.

    The lock is only ever taken by ``with turns.lock``: there, unlike in lines of Python, an interrupt cannot strike
    between taking it and being bound to give it back, which would leave all other threads waiting for ever. The thread
    that holds it may take it again, as when the collector closes a generator in the middle of a step.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # Changed and copied in single operations of a dict, which no other thread can come between, and left without a
        # line of Python, in which an interrupt would be lost. (A WeakSet is gone through in Python, and must not grow
        # meanwhile; a lock for it might stay taken after an interrupt.)
        self._calls: dict[int, weakref.ref[Call]] = {}

    def joined_by(self, call: Call) -> Call:
        """Know of a call that takes turns until it is over; returns it."""
        self._calls[id(call)] = weakref.ref(call, partial(self._calls.pop, id(call)))
        return call

    def let_others(self) -> None:
        """To be called after a turn. A lock does not care who asked first: without a pause its last holder gets it."""
        if len(self._calls) < 2:
            return
        calls = [reference() for reference in self._calls.copy().values()]
        if sum(call is not None and not call.over for call in calls) > 1:
            time.sleep(_PAUSE)
