"""Who waits for an answer, and whose turn it is at the engine."""

from __future__ import annotations

import threading
import weakref
from types import GeneratorType, TracebackType
from typing import TypeVar

Body = TypeVar("Body")


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
    """A lock that is handed round: whoever gives it back and wants it again comes after those who waited meanwhile.

    The thread that holds it may take it again, as when the collector closes a generator in the middle of a step.
    """

    def __init__(self) -> None:
        self._door = threading.RLock()  # held by the thread that is next
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            self._lock.acquire()
        else:
            with self._door:
                self._lock.acquire()
            self._holder = threading.get_ident()
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
        self._lock.release()
