"""One pool of threads for the host's work on prompts: done ahead of whoever needs it, or side by side.

Pillow, NumPy and sockets release the interpreter lock where they work or wait. Tasks may start tasks: a pool thread
that waits for subtasks works on them itself, so the pool cannot deadlock.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_THIS_THREAD = threading.local()


def _join_pool() -> None:
    _THIS_THREAD.is_of_pool = True


# At least four threads even on few cores: some wait for a server or a disk. They start when first needed.
_POOL = ThreadPoolExecutor(min(32, max(4, os.cpu_count() or 1)), "inputs", _join_pool)


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``function`` of every item, worked on by whatever threads are free.

    Args:
        function: safe to run in several threads at once.

    Raises:
        Whatever ``function`` raises; of several errors, that of the first item.
    """
    if len(items) < 2:
        return list(map(function, items))
    if not getattr(_THIS_THREAD, "is_of_pool", False):
        # The caller only waits: sharing the work made a picture's channels a tenth slower.
        return list(_POOL.map(function, items))
    outcomes: dict[int, Future[Result]] = {}
    numbers = itertools.count()

    def work() -> None:
        while (number := next(numbers)) < len(items):
            outcomes[number] = outcome = Future()
            try:
                outcome.set_result(function(items[number]))
            except BaseException as error:
                outcome.set_exception(error)

    helpers = [_POOL.submit(work) for _ in items[1:]]
    work()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun would find nothing left to do
            helper.result()
    return [outcomes[number].result() for number in range(len(items))]


def prefetch(
    function: Callable[[Item], Result], items: Sequence[Item], ahead: int
) -> Generator[Callable[[], Result], None, None]:
    """For every item in turn, a call that gives ``function(item)``, waiting for it where it is not ready yet.

    Threads work on the next ``ahead`` items meanwhile, never on more, so that results do not pile up in memory. What
    ``function`` raises is raised by the call of that item alone. Closing the iterator drops everything that no thread
    has begun; a thread that is at work ends its item, whose result is then thrown away.

    Args:
        function: safe to run in several threads at once.
        items: a single one is not worth a thread: its call does the work itself.
        ahead: at least 1.
    """
    if len(items) == 1:
        yield partial(function, items[0])
        return
    futures: deque[Future[Result]] = deque()
    try:
        for item in items:
            futures.append(_POOL.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result
        while futures:
            yield futures.popleft().result
    finally:
        for future in futures:
            future.cancel()
