"""Requests that come one by one while others are answered: what :class:`.Intake` is for a list of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Generic, TypeVar

from qwen3vl_moe.engine.intake import needs_server
from qwen3vl_moe.inputs.workers import POOL

Item = TypeVar("Item")
Result = TypeVar("Result")


class Feed(Generic[Item, Result]):
    """Items under any keys, worked on by threads ahead of whoever takes them.

    Taken in their order, but that those which need a server let others pass.

    Args:
        prepare: safe to run in several threads at once.
        ahead: at most so many are prepared beside the one that is taken next, so that results do not pile up in memory;
            at least 1.

    Attributes:
        open: whether more may come.
    """

    def __init__(self, prepare: Callable[[Item], Result], ahead: int):
        self.open, self._prepare, self._ahead = True, prepare, ahead
        self._waiting: dict[Hashable, Item] = {}
        self._begun: dict[Hashable, tuple[Item, Future[Result]]] = {}

    def __len__(self) -> int:
        """How many have not been taken."""
        return len(self._waiting) + len(self._begun)

    @property
    def left(self) -> bool:
        """Whether there is, or may be, anything to take."""
        return self.open or len(self) > 0

    def add(self, key: Hashable, item: Item) -> None:
        self._waiting[key] = item
        self._begin()

    def take(self, may_wait: bool) -> tuple[Hashable, Callable[[], Result]] | None:
        """A key and a call that gives its result, or raises what ``prepare`` did; None if nothing is there.

        Args:
            may_wait: for a server, too.
        """
        self._begin()
        if may_wait and self._begun and all(self._late(*entry) for entry in self._begun.values()):
            wait([future for _, future in self._begun.values()], return_when=FIRST_COMPLETED)
        for key, (item, future) in self._begun.items():
            if not self._late(item, future):
                del self._begun[key]
                return key, future.result
        return None

    def drop(self, keys: Iterable[Hashable]) -> None:
        """Forget items that nobody waits for any more, if they are here."""
        for key in keys:
            self._waiting.pop(key, None)
            if key in self._begun:
                self._begun.pop(key)[1].cancel()

    def close(self) -> None:
        self.drop([*self._waiting, *self._begun])

    def _begin(self) -> None:
        while self._waiting and len(self._begun) <= self._ahead:
            key = next(iter(self._waiting))
            item = self._waiting.pop(key)
            self._begun[key] = item, POOL.submit(self._prepare, item)

    @staticmethod
    def _late(item: Any, future: Future) -> bool:
        return not future.done() and needs_server(item)
