"""One pool of threads for the host's work on prompts: done ahead of whoever needs it, or side by side.

Pillow, NumPy and sockets release the interpreter lock where they work or wait. Tasks may start tasks: a pool thread
that waits for subtasks works on them itself, so the pool cannot deadlock.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_CLOSING_S = 10.0
_CLOSED = "the interpreter is about to end, and takes no more work"
_MAX_WAITING = 64  # threads that wait for a server and do not count; each may hold a file in memory

_THIS_THREAD = threading.local()


class Pool:
    """Threads that start when first needed.

    Unlike those of concurrent.futures they are daemons: the interpreter does not join them when it ends, so Ctrl-C does
    not wait for a server that a download hangs on. It waits for those that compute (:meth:`close`).
    """

    def __init__(self, size: int):
        self.size = size
        self._tasks: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = self._idle = self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()

    def submit(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        """``function(item)``, by the next thread that is free."""
        with self._changed:
            return self._append(function, item)

    def submit_all(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Future[Result]] | None:
        """One task an item, if a thread is free for each of them; None if not.

        Tasks are taken up in their order, so these begin whatever comes after them, and may be waited for.
        """
        with self._changed:
            free = self._idle + max(0, self._limit - self._threads) - len(self._tasks)
            return [self._append(function, item) for item in items] if free >= len(items) else None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block runs, this thread does not count as one of the pool: it waits for a server or a resolver."""
        if not is_pool_thread():
            yield
            return
        with self._changed:
            if self._closed:
                raise RuntimeError(_CLOSED)
            self._waiting += 1
            self._hire()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                if self._closed:
                    raise RuntimeError(_CLOSED)

    def close(self, timeout: float = _MAX_CLOSING_S) -> None:
        """Drop the tasks that no thread has begun, and wait, at most ``timeout`` seconds, for threads that compute.

        For the end of the interpreter, which unwinds the stack of whatever thread comes back to Python after it: of
        tokenizers or torch, that is C++, which aborts the process. One that waits for a server is only C, and is left.
        """
        with self._changed:
            self._closed = True
            while self._tasks:
                self._tasks.popleft()[0].cancel()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._threads - self._idle <= self._waiting, timeout)

    @property
    def _limit(self) -> int:
        return self.size + min(self._waiting, _MAX_WAITING)

    def _append(self, function: Callable[[Item], Result], item: Item) -> Future[Result]:
        if self._closed:
            raise RuntimeError(_CLOSED)
        future: Future[Result] = Future()
        self._tasks.append((future, partial(function, item)))
        self._hire()
        return future

    def _hire(self) -> None:
        self._changed.notify()
        if len(self._tasks) > self._idle and self._threads < self._limit:
            threading.Thread(target=self._work, name="inputs", daemon=True).start()
            self._threads += 1
            self._idle += 1

    def _work(self) -> None:
        _THIS_THREAD.is_of_pool = True
        while (task := self._next()) is not None:
            future, call = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del task, future, call  # a thread with nothing to do keeps no picture in memory
            with self._changed:
                self._idle += 1
                if self._closed:
                    self._changed.notify_all()

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The next task, waited for; None if there is none and there are more threads than the pool may have."""
        with self._changed:
            while not self._tasks and self._threads <= self._limit and not self._closed:
                self._changed.wait()
            self._idle -= 1  # from its start, or from the end of its last task, it was there for a task
            if self._tasks:
                return self._tasks.popleft()
            self._threads -= 1
            return None


# At least four threads even on few cores: some wait for a disk.
POOL = Pool(min(32, max(4, os.cpu_count() or 1)))
atexit.register(POOL.close)


def is_pool_thread() -> bool:
    return getattr(_THIS_THREAD, "is_of_pool", False)


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], abreast: int | None = None) -> list[Result]:
    """``function`` of every item, worked on by whatever threads are free, begun in their order.

    Args:
        function: safe to run in several threads at once.
        abreast: on how many items at a time at most; None: on all.

    Raises:
        Whatever ``function`` raises; of several errors, that of the first item.
    """
    if len(items) < 2:
        return list(map(function, items))
    # A caller from outside only waits if it can: sharing the work made a picture's channels a tenth slower.
    if abreast is None and not is_pool_thread() and (futures := POOL.submit_all(function, items)):
        return [future.result() for future in futures]
    outcomes: dict[int, Future[Result]] = {}
    numbers, wanted = itertools.count(), True

    def work(_: Any = None) -> None:
        while wanted and (number := next(numbers)) < len(items):
            outcomes[number] = outcome = Future()
            try:
                outcome.set_result(function(items[number]))
            except BaseException as error:
                outcome.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    helpers = [POOL.submit(work, None) for _ in items[1:abreast]]
    try:
        work()
    except BaseException:  # Ctrl-C
        wanted = False
        for helper in helpers:
            helper.cancel()
        raise
    for helper in helpers:
        if not helper.cancel():  # one that has not begun would find nothing left to do
            helper.result()
    return [outcomes[number].result() for number in range(len(items))]


class Budget:
    """An amount that the holders of parts of it share: how much memory may be taken at one time.

    Those who wait are served in their order, so that a large part is not passed over for ever. A part that is larger
    than the whole is given when nobody else holds one.
    """

    def __init__(self, total: int):
        self.total = total
        # Weak, so that a holder whom Ctrl-C met at the worst place still gives its part back: with its frame.
        self._parts: WeakKeyDictionary[_Part, int] = WeakKeyDictionary()
        self._changed = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Take ``amount``, waiting until it is free, for as long as the block runs."""
        amount = min(amount, self.total)
        part = _Part()
        try:
            with self._turn, self._changed:
                while sum(self._parts.values()) + amount > self.total:
                    self._changed.wait(1.0)  # seconds; nobody tells of a part that was collected
                self._parts[part] = amount
            yield
        finally:
            with self._changed:
                self._parts.pop(part, None)
                self._changed.notify_all()


class _Part:
    """A holder of a budget."""
