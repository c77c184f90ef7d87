"""Work done in threads ahead of whoever needs it, in order and bounded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Sequence[Item], ahead: int) -> Iterator[Callable[[], Result]]:
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
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1, max(1, len(items))), thread_name_prefix="prefetch")
    try:
        futures = deque()
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result
        while futures:
            yield futures.popleft().result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
