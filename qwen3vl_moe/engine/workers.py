"""The processes of the other ranks: started, watched and ended by the first one.

Each is a Python of its own that runs :mod:`.follower`. It ignores Ctrl-C, and ends when the pipe to its standard input
does, so none outlives the first rank, however that ends. In the other direction, a thread here waits for each: the end
of one is an error in the first rank, and if that is stuck by then, in a wait that nothing can interrupt, the end of its
process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from qwen3vl_moe.engine import announced
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.errors import OptionError, RankError, one_line
from qwen3vl_moe.ops import Ranks

LOADER = "qwen3vl_moe.weights:load_model"
_MAIN = "import json, sys; spec = json.loads(sys.stdin.readline()); sys.path[:] = spec['sys_path']; "
_MAIN += "from qwen3vl_moe.engine.follower import main; main(spec)"
_STUCK = 5.0  # seconds after the end of a worker, in which the first rank should have noticed by itself
_FOREVER = timedelta(days=1000)  # workers wait for calls as long as nobody asks for anything


def join(rank: int, size: int, device: torch.device, store: Store | None = None) -> Ranks:
    """Make this process a rank. On GPUs the ranks talk through NCCL, on CPUs and about calls through gloo.

    Args:
        store: where they meet; None: as the environment says (torchrun).
    """
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    given = {} if store is None else {"store": store, "rank": rank, "world_size": size}
    dist.init_process_group(backend, timeout=_FOREVER, **given)
    return Ranks(rank, size)


@dataclass
class _State:
    """What the threads that watch have to know, and nothing that keeps :class:`Workers` alive."""

    failure: str | None = None
    inside: bool = False
    ending: bool = False
    told: threading.Event = field(default_factory=threading.Event)
    before_end: list[Callable[[], object]] = field(default_factory=list)


class Workers:
    """Processes of ranks 1 to ``size - 1``; they end with this object.

    Args:
        size: of ranks, this process included.
        device: of the first rank; those of the others follow it.
        arguments: of the loader, beside ``device`` and ``ranks``; JSON.
        options: of the engine.
        loader: "module:function" that makes the model of a rank.

    Attributes:
        ranks: this process among them.

    Raises:
        OptionError: there are not as many GPUs, or this process is in a process group already.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        arguments: Mapping[str, Any],
        options: EngineOptions,
        loader: str = LOADER,
    ):
        if dist.is_initialized():
            raise OptionError(
                f"tensor_parallel_size={size}: this process is in a torch.distributed group already; close the LLM "
                "that was made before, or start a process for each"
            )
        self._state, self._processes = _State(), []
        self._end = weakref.finalize(self, _end, self._processes, self._state, os.getpid())
        common = {"size": size, "loader": loader, "arguments": arguments, "options": asdict(options)}
        try:
            devices = devices_of(device, size)
            with self.together(hold=False):
                if started_by_torchrun(size):
                    self.ranks = join(0, size, device)
                    return
                store = TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
                common |= {"port": store.port, "sys_path": sys.path, "threads": max(1, torch.get_num_threads() // size)}
                for rank in range(1, size):
                    process = _started({**common, "rank": rank, "device": str(devices[rank])})
                    self._processes.append(process)
                    watched = rank, process, self._processes, self._state
                    threading.Thread(target=_watch, args=watched, name=f"rank {rank}", daemon=True).start()
                self.ranks = join(0, size, device, store)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def together(self, hold: bool = True) -> Iterator[None]:
        """What ranks do together: the end of one of them is that of all.

        Args:
            hold: keep an interrupt back to the end, as the others could not follow it. (A second one is not.)

        Raises:
            RankError: a rank has ended, or ends meanwhile.
        """
        state = self._state
        if state.ending and state.failure is None:
            raise RankError("this LLM was closed: load it again")
        if state.failure is not None:
            raise RankError(f"{state.failure}; this LLM cannot go on, load it again")
        with interrupts_held() if hold else nullcontext():
            state.inside = True
            try:
                yield
            except BaseException as error:
                # Nobody knows how far the others have come: what was begun together ends together.
                if isinstance(error, RuntimeError):  # as torch says it where another rank is gone
                    state.told.wait(2.0)
                failure, state.failure = state.failure, state.failure or "a step was broken off in the middle"
                self.close()
                if failure is not None and isinstance(error, RuntimeError):
                    raise RankError(failure) from None
                raise
            finally:
                state.inside = False

    def before_end(self, forget: Callable[[], object]) -> None:
        """Have ``forget()`` called when the ranks end; it must not hold this object.

        NCCL does not leave its group while a CUDA graph that it is part of is alive: it would wait for ever.
        """
        self._state.before_end.append(forget)

    def close(self) -> None:
        """End all of them. Their memory is free afterwards."""
        self._end()


def devices_of(first: torch.device, size: int) -> list[torch.device]:
    """The device of each rank: GPUs from ``first`` on.

    Raises:
        OptionError: there are not as many.
    """
    if first.type == "cpu":
        return [first] * size
    begin, there = first.index or 0, torch.cuda.device_count()
    if begin + size > there:
        raise OptionError(
            f"tensor_parallel_size={size} needs as many GPUs from {first} on, but there are {there} in all"
        )
    return [torch.device("cuda", begin + rank) for rank in range(size)]


def started_by_torchrun(size: int) -> bool:
    """Whether the processes of all ranks were started from outside, and this is one of them.

    Raises:
        OptionError: torchrun has started another number of them.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    there = int(os.environ["WORLD_SIZE"])
    if there != size:
        raise OptionError(
            f"tensor_parallel_size={size}, but torchrun has started {there} processes: give both one number"
        )
    return True


def _watch(rank: int, process: subprocess.Popen, processes: list[subprocess.Popen], state: _State) -> None:
    said = process.stdout.read().decode(errors="replace").strip() if process.stdout is not None else ""
    code = process.wait()
    if state.ending:
        return
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
    state.failure = state.failure or f"rank {rank} " + (f"ended: {one_line(said)}" if said else how)
    state.told.set()
    deadline = time.monotonic() + _STUCK
    while state.inside and time.monotonic() < deadline:
        time.sleep(0.05)
    if state.inside and not state.ending:
        print(f"error: {state.failure}, and this process waits for it in vain", file=sys.stderr, flush=True)
        state.ending = True  # the others that watch need not say so, too
        end(processes)
        os._exit(1)


def _started(spec: Mapping[str, Any]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": str(spec["threads"])},
    )
    write_line(process, spec)
    return process


def write_line(process: subprocess.Popen, spec: Mapping[str, Any]) -> None:
    """Tell a process what to do, on its standard input. If it has ended already, whoever waits for it says so."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.write(json.dumps(spec).encode() + b"\n")
        process.stdin.flush()


def _end(processes: list[subprocess.Popen], state: _State, owner: int) -> None:
    """End the processes, and leave the process group."""
    if os.getpid() != owner:  # a fork, which has no part in them
        return
    state.ending = True
    end(processes)
    while state.before_end:
        state.before_end.pop()()
    if not dist.is_initialized():
        return
    if not processes and state.failure is None:  # torchrun started them
        announced.tell(announced.END)
        Ranks(0, dist.get_world_size()).least(0)  # none leaves while another still reads
    # Where another rank has failed, a kernel may wait for it for ever, and NCCL for the kernel.
    leave = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leave.start()
    leave.join(None if state.failure is None else _STUCK)


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Close their standard inputs, at which they end; kill what does not."""
    for process in processes:
        if process.stdin is not None:
            with suppress(OSError):  # it has ended before it had read all
                process.stdin.close()
    deadline = time.monotonic() + 2
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end; a second one strikes at once. Only the main thread is ever struck."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if len(held) == 1:
        before(*held[0])
