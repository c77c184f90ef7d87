"""Prompts, made in threads ahead of the engine, in the order in which it takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Any, Generic, TypeVar

from qwen3vl_moe.inputs.workers import POOL

Item = TypeVar("Item")
Result = TypeVar("Result")


class Intake(Generic[Item, Result]):
    """``prepare(item)`` of many items, worked on by threads ahead of whoever takes them.

    Items are taken in their order, and each is waited for: so the same requests make the same steps. Only one that
    needs a server lets those behind it pass until it is ready, which the server decides.

    Args:
        prepare: safe to run in several threads at once.
        items: a single one is not worth a thread: taking it does the work.
        ahead: at most so many are prepared beside the one that is taken next, so that results do not pile up in memory;
            at least 1.

    Attributes:
        left: how many have not been taken.
    """

    def __init__(self, prepare: Callable[[Item], Result], items: Sequence[Item], ahead: int):
        self.left = len(items)
        self._prepare, self._items, self._ahead = prepare, items, ahead
        self._begun = 0
        self._next: deque[tuple[int, Future[Result]]] = deque()
        self._late: dict[int, Future[Result]] = {}  # those that were passed

    def take(self, may_wait: bool) -> tuple[int, Callable[[], Result]] | None:
        """The number of the next item and a call that gives its result, or raises what ``prepare`` did.

        Args:
            may_wait: for a server. If not, and all that are left need one, there is None.
        """
        if len(self._items) == 1:
            self.left = 0
            return 0, partial(self._prepare, self._items[0])
        self._begin()
        while True:
            ready = next((number for number, future in self._late.items() if future.done()), None)
            if ready is not None:
                return self._taken(ready, self._late.pop(ready))
            if self._next:
                number, future = self._next.popleft()
                if future.done() or not needs_server(self._items[number]):
                    return self._taken(number, future)
                self._late[number] = future
                self._begin()
            elif may_wait and self._late:
                wait(self._late.values(), return_when=FIRST_COMPLETED)
            else:
                return None

    def _taken(self, number: int, future: Future[Result]) -> tuple[int, Callable[[], Result]]:
        self.left -= 1
        return number, future.result

    def close(self) -> None:
        """Drop what no thread has begun; a thread that is at work ends its item, whose result is thrown away."""
        for future in [*self._late.values(), *(future for _, future in self._next)]:
            future.cancel()

    def _begin(self) -> None:
        while self._begun < len(self._items) and len(self._next) + len(self._late) <= self._ahead:
            self._next.append((self._begun, POOL.submit(self._prepare, self._items[self._begun])))
            self._begun += 1


def needs_server(item: Any) -> bool:
    """Whether a request holds the address of something to download: known from the request, not from the clock.

    One that a function will make may hold anything.
    """
    if callable(item):
        return True
    if isinstance(item, Mapping):
        return any(
            needs_server(value) or (_is_address(value) and key not in ("text", "content", "prompt"))
            for key, value in item.items()
        )
    if not isinstance(item, list | tuple) or (item and isinstance(item[0], int)):  # token ids may be many
        return False
    return any(_is_address(part) or needs_server(part) for part in item)


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value[:32].lstrip().lower().startswith(("http://", "https://"))
