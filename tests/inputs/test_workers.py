"""Work in threads, side by side or ahead of its reader: in order, bounded, errors where they belong, no deadlock."""

import threading
import time
from contextlib import closing

import pytest

from qwen3vl_moe.inputs.workers import _POOL, prefetch, side_by_side

THREADS = _POOL._max_workers


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
    begun, ended, go_on = [], [], threading.Event()

    def work(n):
        begun.append(n)
        assert go_on.wait(10)
        ended.append(n)

    calls = prefetch(work, range(100), ahead=60)
    next(calls)
    wait_for(lambda: begun)
    calls.close()
    go_on.set()
    side_by_side(lambda _: None, range(2))  # what was left in the queue would stand before these
    wait_for(lambda: len(ended) == len(begun))
    assert len(begun) <= THREADS  # those that a thread had taken up


def test_a_single_item_needs_no_thread():
    (take,) = prefetch(lambda _: threading.current_thread(), ["x"], ahead=4)
    assert take() is threading.current_thread()
    assert list(prefetch(print, [], ahead=4)) == []


def test_side_by_side_is_in_order_and_in_several_threads():
    meet = threading.Barrier(3)

    def work(n):
        meet.wait(10)
        return n, threading.get_ident()

    found = side_by_side(work, [3, 1, 2])
    assert [n for n, _ in found] == [3, 1, 2]
    assert len({thread for _, thread in found} - {threading.get_ident()}) == 3


def test_side_by_side_raises_the_first_items_error():
    def work(n):
        time.sleep(0.002 * (3 - n))
        raise ValueError(f"item {n}")

    for run in (side_by_side, lambda *given: side_by_side(lambda _: side_by_side(*given), [0, 1])):
        with pytest.raises(ValueError, match="item 0"):
            run(work, range(3))


def test_tasks_may_wait_for_tasks_of_their_own():
    """More of them than there are threads, three deep."""
    count = 2 * THREADS

    def leaf(n):
        return n

    def middle(n):
        return sum(side_by_side(leaf, range(n, n + 3)))

    def top(n):
        return sum(side_by_side(middle, range(n, n + 4)))

    expected = [sum(3 * m + 3 for m in range(n, n + 4)) for n in range(count)]
    found = []
    thread = threading.Thread(target=lambda: found.extend(side_by_side(top, range(count))), daemon=True)
    thread.start()
    thread.join(30)
    assert found == expected
