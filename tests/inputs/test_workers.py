"""Work in threads: in order, bounded, errors where they belong, no deadlock, and an end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from qwen3vl_moe.inputs.workers import POOL, Budget, Pool, _Part, side_by_side

THREADS = POOL.size


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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


def test_an_interrupt_ends_the_callers_own_part():
    """Ctrl-C is not an item's error: what has not begun is not begun any more."""
    begun = []

    def work(n):
        begun.append(n)
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.001)  # the others do not do it all before the caller takes its first

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(100 * THREADS))  # more than there are threads: the caller takes part
    at_once = len(begun)
    time.sleep(0.3)  # in which the others could do it all
    assert len(begun) <= at_once + THREADS
    assert len(begun) < 100 * THREADS


class TestPool:
    def test_threads_are_not_waited_for_at_the_end(self):
        pool = Pool(2)
        assert pool.submit(lambda _: threading.current_thread().daemon, None).result(10)

    def test_no_more_threads_than_its_size(self):
        pool, lock, working, most = Pool(3), threading.Lock(), [0], [0]

        def work(_):
            with lock:
                working[0] += 1
                most[0] = max(most[0], working[0])
            time.sleep(0.001)
            with lock:
                working[0] -= 1

        for future in [pool.submit(work, None) for _ in range(60)]:
            future.result(10)
        assert most[0] == 3
        assert pool._threads == 3

    def test_those_that_wait_for_a_server_do_not_count(self):
        """Twice as many late tasks as threads, and one behind them that is done all the same."""
        pool, go_on = Pool(2), threading.Event()

        def late(_):
            with pool.waiting():
                return go_on.wait(10)

        lates = [pool.submit(late, None) for _ in range(4)]
        assert pool.submit(lambda n: n + 1, 1).result(10) == 2
        assert not any(future.done() for future in lates)
        go_on.set()
        assert all(future.result(10) for future in lates)
        wait_for(lambda: pool._threads == 2)  # the others have gone

    def test_waiting_outside_of_the_pool(self):
        pool = Pool(1)
        with pool.waiting():
            assert pool._limit == 1

    def test_all_or_none(self):
        pool, go_on = Pool(3), threading.Event()
        busy = pool.submit(lambda _: go_on.wait(10), None)
        assert pool.submit_all(abs, [-1, -2, -3]) is None
        futures = pool.submit_all(abs, [-1, -2])
        assert futures is not None
        assert [future.result(10) for future in futures] == [1, 2]
        go_on.set()
        assert busy.result(10)

    def test_errors_and_cancelled_tasks(self):
        pool, go_on = Pool(1), threading.Event()
        busy, failing, dropped = (pool.submit(f, 0) for f in (lambda _: go_on.wait(10), lambda n: 1 // n, str))
        assert dropped.cancel()
        go_on.set()
        assert busy.result(10)
        with pytest.raises(ZeroDivisionError):
            failing.result(10)
        assert pool.submit(str, 5).result(10) == "5"

    def test_closing(self):
        """What was not begun is dropped, what computes is waited for, and what waits for a server is left alone."""
        pool, go_on, ended = Pool(2), threading.Event(), []

        def late(_):
            with pool.waiting():
                go_on.wait(10)
            ended.append("late")

        def compute(begun):
            begun.set()
            time.sleep(0.05)
            ended.append("computed")

        begun = [threading.Event(), threading.Event()]
        server = pool.submit(late, None)
        wait_for(lambda: pool._waiting == 1)
        computing = [pool.submit(compute, event) for event in begun]
        assert all(event.wait(10) for event in begun)
        dropped = pool.submit(compute, begun[0])
        pool.close(10)
        assert ended == ["computed"] * 2
        assert all(future.done() for future in computing)
        assert dropped.cancelled()
        assert not server.done()
        go_on.set()
        with pytest.raises(RuntimeError, match="takes no more work"):
            server.result(10)
        with pytest.raises(RuntimeError, match="takes no more work"):
            pool.submit(str, 1)
        assert ended == ["computed"] * 2
        wait_for(lambda: pool._threads == 0)

    @pytest.mark.parametrize(("end", "status"), [("pass", 0), ("raise KeyboardInterrupt", -signal.SIGINT)])
    def test_a_program_ends_as_it_should_while_threads_compute(self, end, status):
        """A thread that comes back from torch after the interpreter's end would abort the process."""
        code = f"""
import threading, torch
from qwen3vl_moe.inputs.workers import POOL
begun = threading.Semaphore(0)
def work(_):
    begun.release()
    for _ in range(100):
        torch.ones(300, 300).cumsum(0).sort()
for n in range(8):
    POOL.submit(work, n)
begun.acquire(); begun.acquire()
{end}
"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
        assert done.returncode == status, done.stderr


class TestBudget:
    def test_parts_are_bounded_together(self):
        budget, lock, held, most = Budget(10), threading.Lock(), [0], []

        def work(amount):
            with budget.hold(amount):
                with lock:
                    held[0] += amount
                    most.append(held[0])
                time.sleep(0.001)
                with lock:
                    held[0] -= amount

        threads = [threading.Thread(target=work, args=(n % 5 + 2,), daemon=True) for n in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(most) == 40
        assert max(most) <= 10

    def test_a_part_above_the_whole_comes_alone_and_in_its_turn(self):
        budget, order = Budget(10), []

        def work(name, amount):
            with budget.hold(amount):
                order.append(name)

        with budget.hold(4):
            large = threading.Thread(target=work, args=("large", 1000), daemon=True)
            large.start()
            wait_for(budget._turn.locked)
            small = threading.Thread(target=work, args=("small", 1), daemon=True)
            small.start()
            time.sleep(0.01)
            assert order == []  # the small one would fit, and does not push in
        large.join(10)
        small.join(10)
        assert order == ["large", "small"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_part_comes_back_after_an_error(self, error):
        budget = Budget(10)
        for _ in range(3):
            with pytest.raises(error), budget.hold(10):
                raise error

    def test_a_part_comes_back_whose_holder_was_stopped_anywhere(self):
        """As when Ctrl-C falls where no ``finally`` sees it."""
        budget = Budget(10)
        budget._parts[_Part()] = 10  # held by nobody any more
        thread = threading.Thread(target=lambda: budget.hold(10).__enter__(), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
