"""Runs the corpus in a few processes that are watched: what takes too long is killed, and the rest goes on.

``python -m tests.hostile.corpus_run [part of a name ...]`` prints every fault.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Time is counted in seconds of the processor, so that a busy machine makes no hang; what waits is stopped by the clock.
MOST_CPU_S, MOST_WALL_S, MOST_MB = 5.0, 30.0, 500


@dataclass
class Report:
    """What came of the corpus.

    Attributes:
        ran: cases per door.
        seconds: of the clock, per door.
        used: names of the cases that were not refused.
        faults: a line for each case that neither was used nor refused in a line, and for each that cost too much.
        slowest, largest: (seconds of the processor, name) and (MB by which the peak of memory rose, name).
    """

    ran: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    used: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")


class Worker:
    """One process of :mod:`tests.hostile.worker`."""

    def __init__(self, *arguments: str) -> None:
        paths = [str(ROOT / part) for part in ("", "kernels", "scripts", "eval")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.worker", *arguments],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.log: deque[bytes] = deque(maxlen=20)
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        names = self._read(120, 120)
        if not names:
            raise RuntimeError(f"a worker does not start: {self._last_words()}")
        self.cases = json.loads(names)

    def run(self, number: int) -> tuple[str, bool, int, float]:
        """What is wrong with a case, whether it was used, MB, seconds of the processor. It may be dead afterwards."""
        started = self._cpu()
        self.process.stdin.write(b"%d\n" % number)
        self.process.stdin.flush()
        try:
            wrong, used, megabytes = json.loads(self._read(MOST_CPU_S, MOST_WALL_S))
        except TimeoutError as error:
            self.stop()
            return str(error), False, 0, MOST_CPU_S
        except ValueError:
            return f"the process died: {self._last_words()}", False, 0, 0.0
        return wrong, used, megabytes, self._cpu() - started

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _last_words(self) -> str:
        code = self.process.wait()
        time.sleep(0.2)  # for the thread that reads them
        return f"status {code}, {b''.join(self.log).decode(errors='replace')[-300:]!r}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def _read(self, cpu_s: float, wall_s: float) -> bytes:
        started, begun = self._cpu(), time.monotonic()
        while not select.select([self.process.stdout], [], [], 0.25)[0]:
            if self._cpu() - started > cpu_s or time.monotonic() - begun > wall_s:
                raise TimeoutError("it hangs")
        return self.process.stdout.readline()

    def _cpu(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_corpus(only: tuple[str, ...] = (), *, num_workers: int = 2, planted: bool = False) -> Report:
    """Run every case whose name holds one of ``only``, or all.

    Args:
        planted: run a few faults in place of the corpus, to see that they are found.
    """
    report, lock = Report(), threading.Lock()
    arguments = ["planted"] * planted
    todo: deque[int] | None = None

    def work() -> None:
        nonlocal todo
        worker = Worker(*arguments)
        with lock:
            if todo is None:
                names = [f"{door}: {name}" for door, name in worker.cases]
                todo = deque(n for n, name in enumerate(names) if any(part in name for part in only or ("",)))
        while True:
            with lock:
                if not todo:
                    break
                number = todo.popleft()
            if not worker.alive:
                worker = Worker(*arguments)
            (door, name), begun = worker.cases[number], time.monotonic()
            wrong, used, megabytes, seconds = worker.run(number)
            if not wrong and megabytes > MOST_MB:
                wrong = f"it takes {megabytes} MB"
            with lock:
                report.ran[door] += 1
                report.seconds[door] += time.monotonic() - begun
                report.slowest = max(report.slowest, (seconds, f"{door}: {name}"))
                report.largest = max(report.largest, (megabytes, f"{door}: {name}"))
                if used:
                    report.used.add(f"{door}: {name}")
                if wrong:
                    report.faults.append(f"{door}: {name}: {wrong}")
        worker.stop()

    with ThreadPoolExecutor(num_workers) as pool:
        for done in [pool.submit(work) for _ in range(num_workers)]:
            done.result()
    return report


if __name__ == "__main__":
    begun = time.monotonic()
    result = run_corpus(tuple(sys.argv[1:]))
    print(*sorted(result.faults), sep="\n")
    print(f"{len(result.faults)} faults of {sum(result.ran.values())} cases in {time.monotonic() - begun:.0f} s")
    for door, count in result.ran.items():
        print(f"{door}: {count} in {result.seconds[door]:.1f} s")
    print(result.slowest, result.largest, sep="\n")
