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
    """Items under any keys, worked on by threads from when they are added until they are taken.

    Taken in their order, but that those which need a server let others pass. Whoever adds them sees to it that they are
    not too many: their results pile up in memory.

    Args:
        prepare: safe to run in several threads at once.

    Attributes:
        open: whether more may come.
    """

    def __init__(self, prepare: Callable[[Item], Result]):
        self.open, self._prepare = True, prepare
        self._items: dict[Hashable, tuple[Item, Future[Result]]] = {}

    @property
    def left(self) -> bool:
        """Whether there is, or may be, anything to take."""
        return self.open or bool(self._items)

    def add(self, key: Hashable, item: Item) -> None:
        self._items[key] = item, POOL.submit(self._prepare, item)

    def take(self, may_wait: bool) -> tuple[Hashable, Callable[[], Result]] | None:
        """A key and a call that gives its result, or raises what ``prepare`` did; None if nothing is there.

        Args:
            may_wait: for a server, too.
        """
        if may_wait and self._items and all(self._late(*entry) for entry in self._items.values()):
            wait([future for _, future in self._items.values()], return_when=FIRST_COMPLETED)
        for key, (item, future) in self._items.items():
            if not self._late(item, future):
                del self._items[key]
                return key, future.result
        return None

    def drop(self, keys: Iterable[Hashable]) -> None:
        """Forget items that nobody waits for any more, if they are here."""
        for key in keys:
            if key in self._items:
                self._items.pop(key)[1].cancel()

    def close(self) -> None:
        self.drop(list(self._items))

    @staticmethod
    def _late(item: Any, future: Future) -> bool:
        return not future.done() and needs_server(item)
