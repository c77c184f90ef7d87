"""Work in threads ahead of its reader: in order, bounded, errors where they belong, nothing left behind."""

import threading
import time
from contextlib import closing

import pytest

from qwen3vl_moe.prefetch import prefetch


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_results_come_in_order_however_long_each_takes():
    def work(n):
        time.sleep(0.001 * (n * 7 % 5))
        return n * n

    assert [take() for take in prefetch(work, range(40), ahead=6)] == [n * n for n in range(40)]


def test_work_runs_ahead_and_not_too_far():
    begun = []
    with closing(prefetch(begun.append, range(50), ahead=5)) as calls:
        for number in range(10):
            next(calls)
            wait_for(lambda: len(begun) == number + 6)  # this one and five ahead  # noqa: B023
            time.sleep(0.002)
            assert len(begun) == number + 6


def test_an_error_belongs_to_its_item():
    calls = prefetch(lambda n: 1 // n, [2, 0, 1], ahead=3)
    assert next(calls)() == 0
    with pytest.raises(ZeroDivisionError):
        next(calls)()
    assert next(calls)() == 1
    assert list(calls) == []


def test_closing_drops_what_has_not_begun():
    begun, go_on = [], threading.Event()

    def work(n):
        begun.append(n)
        assert go_on.wait(10)

    calls = prefetch(work, range(100), ahead=60)
    next(calls)
    wait_for(lambda: begun)
    calls.close()
    go_on.set()
    wait_for(lambda: not any(thread.name.startswith("prefetch") for thread in threading.enumerate()))
    assert len(begun) <= 8  # those that a thread had taken up


def test_a_single_item_needs_no_thread():
    (take,) = prefetch(lambda _: threading.current_thread(), ["x"], ahead=4)
    assert take() is threading.current_thread()
    assert list(prefetch(print, [], ahead=4)) == []
