"""Several engines of one model behind one :class:`.LLM` (data parallel): which of them answers a request.

The first one is this process's own. Each of the others runs in a process of its own (:mod:`.replica`), which makes its
prompts, too: one process could not feed eight cards. A request goes to the engine with the most room, unless another
has had one of the same beginning and has hardly less: what they have in common is then in its cache.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from qwen3vl_moe.engine.service import Service
from qwen3vl_moe.engine.workers import end, interrupts_held, write_line
from qwen3vl_moe.errors import OptionError, RankError

_MAIN = "import json, sys; spec = json.loads(sys.stdin.readline()); sys.path[:] = spec['sys_path']; "
_MAIN += "from qwen3vl_moe.engine.replica import main; main(spec['descriptor'])"
_MOST_HOMES = 1 << 14
Key = tuple[int, int]  # of a call, and of a request in it


@dataclass(frozen=True)
class Unsent:
    """A request that no other process can have."""

    item: Any


@dataclass
class _State:
    """What is known of the other engines; shared with the threads that read their answers.

    Attributes:
        load: requests that each has.
        room: how many it should have at most; 0: it is not ready.
        stats: the latest of each.
        going: which engine has a request.
        mail: of each call, its answers.
        failure: why one has ended.
    """

    load: list[int]
    room: list[int]
    stats: list[dict[str, int]]
    going: dict[Key, int] = field(default_factory=dict)
    mail: dict[int, queue.SimpleQueue] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: str | None = None
    ending: bool = False

    def done(self, key: Key) -> bool:
        """Forget a request; whether it was still waited for."""
        with self.lock:
            engine = self.going.pop(key, None)
            if engine is not None:
                self.load[engine] -= 1
            return engine is not None

    def fail(self, failure: str) -> None:
        self.failure = self.failure or failure
        self.wake()

    def wake(self) -> None:
        """Have every call look whether the engines are still there."""
        for mail in list(self.mail.values()):
            mail.put(None)


class Replicas:
    """The other engines; their processes end with this object.

    Args:
        maker: "module:function" that makes an LLM.
        arguments: of it, for each of the others.
    """

    def __init__(self, maker: str, arguments: Iterable[Mapping[str, Any]]):
        arguments = list(arguments)
        self.size = 1 + len(arguments)
        zeros = [0] * self.size
        self._state = _State(zeros, list(zeros), [{} for _ in zeros])
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[tuple[Connection, threading.Lock]] = []
        self._homes: dict[str, int] = {}
        self._calls = itertools.count()
        self._end = weakref.finalize(self, _end, self._processes, self._state, os.getpid())
        self._ready = self._state.mail[next(self._calls)] = queue.SimpleQueue()
        try:
            for engine, each in enumerate(arguments, 1):
                process, pipe = _started(self.size)
                self._processes.append(process)
                self._pipes.append((pipe, threading.Lock()))
                with contextlib.suppress(OSError):  # it has ended: the thread will say so
                    pipe.send((maker, dict(each)))
                of = engine, process, pipe, self._state, self._ready
                threading.Thread(target=_read, args=of, name=f"replica {engine}", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Until all of them are ready.

        Raises:
            RankError: one of them has ended.
        """
        for _ in self._processes:
            self._ready.get()
            self.check()
        self._state.mail.clear()

    def close(self) -> None:
        """End them."""
        self._end()

    @property
    def stats(self) -> dict[str, int]:
        """Of all others together."""
        names = {name for stats in self._state.stats for name in stats}
        return {name: sum(stats.get(name, 0) for stats in self._state.stats) for name in names}

    def free(self, own_load: int, own_room: int) -> list[int]:
        """Which engines have fewer requests than they should have at most."""
        load, room = [own_load, *self._state.load[1:]], [own_room, *self._state.room[1:]]
        return [engine for engine in range(self.size) if load[engine] < room[engine]]

    def choose(self, beginning: str, free: list[int], own_load: int, own_room: int) -> int:
        """Which of the free engines a request goes to that begins so."""
        load, room = [own_load, *self._state.load[1:]], [own_room, *self._state.room[1:]]
        best = min(free, key=load.__getitem__)
        home = self._homes.get(beginning)
        if home in free and load[home] <= load[best] + max(1, room[best] // 16):
            return home
        if len(self._homes) >= _MOST_HOMES:
            self._homes.clear()
        self._homes[beginning] = best
        return best

    def new_call(self) -> tuple[int, queue.SimpleQueue]:
        """A number for a call, and where its answers will be.

        Raises:
            RankError: see :meth:`check`.
        """
        number, mail = next(self._calls), queue.SimpleQueue()
        self._state.mail[number] = mail
        self.check()  # now: one that ends later puts something into the mail
        return number, mail

    def assign(self, engine: int, key: Key) -> None:
        """Count a request among those of an engine, which is yet to be sent there."""
        with self._state.lock:
            self._state.going[key] = engine
            self._state.load[engine] += 1

    def send(self, key: Key, message: bytes) -> None:
        """Give a request to its engine, unless its call is over. From a thread that no interrupt strikes."""
        engine = self._state.going.get(key)
        if engine is None:
            return
        pipe, lock = self._pipes[engine - 1]
        with lock, contextlib.suppress(OSError):  # it has ended, which the thread that reads says better
            if key in self._state.going:  # else its call has given it up, and told the engine so before this
                pipe.send(("add", key, message))

    def give_back(self, key: Key, item: Any) -> None:
        """A request that cannot be sent goes into the mail of its call."""
        mail = self._state.mail.get(key[0])
        if self._state.done(key) and mail is not None:
            mail.put((key, Unsent(item)))

    def over(self, call: int) -> None:
        """A call has ended: what it still has anywhere is given up."""
        self._state.mail.pop(call, None)
        left: dict[int, list[Key]] = {}
        for key, engine in list(self._state.going.items()):
            if key[0] == call and self._state.done(key):
                left.setdefault(engine, []).append(key)
        for engine, keys in left.items():
            pipe, lock = self._pipes[engine - 1]
            # Half a message would be the end of all that follow.
            with interrupts_held(), lock, contextlib.suppress(OSError):
                pipe.send(("drop", keys))

    def check(self) -> None:
        """Whether all of them are there.

        Raises:
            RankError: one has ended, or all were closed.
        """
        if self._state.ending:
            raise RankError("this LLM was closed: load it again")
        if self._state.failure is not None:
            raise RankError(f"{self._state.failure}; this LLM cannot go on, load it again")


def start_replicas(maker: str, arguments: Mapping[str, Any]) -> Replicas | None:
    """The engines besides the first one, on the GPUs after its own; None if it is the only one.

    Args:
        maker: see :class:`Replicas`.
        arguments: those of the first one, with ``data_parallel_size``, ``tensor_parallel_size`` and ``device``. Each
            engine draws tokens by a seed of its own.

    Raises:
        OptionError: that is no number of engines; there are not as many GPUs.
    """
    size, ranks = arguments["data_parallel_size"], arguments["tensor_parallel_size"]
    if type(size) is not int or size < 1:
        raise OptionError(f"data_parallel_size={size!r}: a whole number from 1 on is needed")
    if size == 1:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise OptionError(f"data_parallel_size={size} starts processes by itself: run the program without torchrun")
    device, seed = torch.device(arguments["device"]), arguments.get("seed", 0)
    first, there = device.index or 0, torch.cuda.device_count()
    if device.type == "cuda" and first + size * ranks > there:
        each = "" if ranks == 1 else f" of tensor_parallel_size={ranks}"
        raise OptionError(
            f"data_parallel_size={size}{each} needs {size * ranks} GPUs from {device} on, but there are {there} in all"
        )
    same = {**arguments, "data_parallel_size": 1}
    places = [device if device.type == "cpu" else torch.device("cuda", first + n * ranks) for n in range(size)]
    return Replicas(maker, [same | {"device": str(places[n]), "seed": seed + n} for n in range(1, size)])


def room_of(service: Service) -> int:
    """How many requests an engine should have at most: those in its steps, and those prepared ahead."""
    return service.engine.scheduler.max_num_seqs + service.ahead


def _started(size: int) -> tuple[subprocess.Popen, Connection]:
    """A process, and the pipe to it."""
    ours, theirs = socket.socketpair()
    threads = max(1, torch.get_num_threads() // size)
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN],
        stdin=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    write_line(process, {"sys_path": sys.path, "descriptor": theirs.fileno()})
    theirs.close()
    return process, Connection(ours.detach())


def _read(engine: int, process: subprocess.Popen, pipe: Connection, state: _State, ready: queue.SimpleQueue) -> None:
    said = None
    try:
        while True:
            kind, *message = pipe.recv()
            if kind == "done":
                key, answer, state.stats[engine] = message
                mail = state.mail.get(key[0])
                if state.done(key) and mail is not None:
                    mail.put((key, answer))
            elif kind == "ready":
                [state.room[engine]] = message
                ready.put(engine)
            else:
                [said] = message
    except (EOFError, OSError):
        pass
    code = process.wait()
    if state.ending:
        return
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
    state.fail(f"replica {engine} " + (f"ended: {said}" if said else how))


def _end(processes: list[subprocess.Popen], state: _State, owner: int) -> None:
    if os.getpid() != owner:  # a fork, which has no part in them
        return
    state.ending = True
    state.wake()
    end(processes)
