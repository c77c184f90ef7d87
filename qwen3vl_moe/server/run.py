"""A server from its socket to its last answer."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qwen3vl_moe.engine import LLM
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.server.engine_thread import EngineThread
from qwen3vl_moe.server.limits import Limits
from qwen3vl_moe.server.wire import Start, Stop, Wire

# A terminal sends its signals to all processes, and so do others; this one decides what they mean.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MAIN = "import json, signal, sys; both = signal.SIGINT, signal.SIGTERM; "
_MAIN += (
    "[signal.signal(number, signal.SIG_IGN) for number in both]; signal.pthread_sigmask(signal.SIG_UNBLOCK, both); "
)
_MAIN += "sys.path[:], *given = json.loads(sys.argv[1]); from qwen3vl_moe.server.front import main; main(*given)"


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which takes no connections yet: a mistake in it shows before weights are loaded.

    Args:
        port: 0: any that is free.

    Raises:
        OptionError: the address cannot be had.
    """
    if not 0 <= port < 1 << 16:  # some resolvers take the rest of a division
        raise OptionError(f"--port {port}: a number from 0 (any) to 65535 is needed")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
    except (OSError, OverflowError, UnicodeError) as error:
        raise OptionError(f"--host {host} --port {port}: {getattr(error, 'strerror', None) or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # For this socket's own sake, after an earlier server; the next one has to hear at once that the port is taken,
        # rather than when both have loaded their weights.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except (OSError, OverflowError) as error:
        bound.close()
        said = getattr(error, "strerror", None) or error
        raise OptionError(f"--host {host} --port {port}: {said}; choose another port (0: any)") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


class Server:
    """Serves one model at one address.

    Args:
        llm: used by nobody else while the server runs.
        bound: where (:func:`bind`); it is this object's own from then on.
        name: of the model.
        api_key: that clients have to give; None: none.
        say: takes lines for whoever looks after it.

    Raises:
        OptionError: the model has several engines, of which only the first one would work.
    """

    def __init__(
        self,
        llm: LLM,
        bound: socket.socket,
        name: str,
        limits: Limits | None = None,
        api_key: str | None = None,
        say: Callable[[str], None] = print,
    ):
        if (engines := llm.settings["data_parallel_size"]) > 1:
            raise OptionError(f"data_parallel_size={engines}: a server drives one engine; start one for each")
        self.address, self._name, self._say = address_of(bound), name, say
        self._orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        self._process = _started(theirs, bound)
        theirs.close()
        bound.close()  # or connections would be taken that nobody serves, once that process has ended
        engine, self._wire = llm.engine, Wire(ours)
        order = self._orders.put
        self.thread = EngineThread(engine, self._wire, lambda: order("ready"), lambda: order("failed"))
        limits, seats = limits or Limits(), engine.scheduler.max_num_seqs
        self._start = Start(name, llm.processor, engine.admission, seats, limits, api_key)

    def run(self) -> int:
        """Serve until :meth:`stop` or a signal asks for an end, and then until all answers are finished.

        Returns:
            the exit status: 0, 130 if a second signal gave answers up, 1 if one of the processes has failed.
        """
        stopping = killed = False
        with _signals_to(self._orders.put):
            try:
                with suppress(OSError):  # it has ended, which the thread says that waits for it
                    self._wire.send(self._start)
                self.thread.start()
                threading.Thread(target=self._wait, daemon=True).start()
                while not killed and (order := self._orders.get()) != "ended":
                    if order == "ready":
                        self._say(f"serving {self._name} at {self.address}")
                        continue
                    if order == "signal":
                        killed = stopping
                        said = "stopping now" if killed else "finishing what was asked for; once more to stop now"
                        self._say(said)
                    stopping = True
                    with suppress(OSError):
                        self._wire.send(Stop())
            finally:
                self.close()
        if self.thread.failure is not None:
            self._say(f"error: {self.thread.failure}")
            return 1
        if killed:
            return 130
        code = self._process.returncode
        if code != 0 or not stopping:
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
            self._say(f"error: the process that serves HTTP {how}")
            return 1
        return 0

    def stop(self) -> None:
        """Take no more requests, and end once all answers are finished. Any thread may ask for it."""
        self._orders.put("stop")

    def close(self) -> None:
        """End at once; what is being done is given up, and the model may serve somebody else."""
        self._process.kill()
        self._process.wait()
        self._wire.close()
        self.thread.join()

    def _wait(self) -> None:
        self._process.wait()
        self._orders.put("ended")


def _started(wire: socket.socket, listening: socket.socket) -> subprocess.Popen:
    """The process that clients talk to (:mod:`.front`)."""
    given = wire.fileno(), listening.fileno()
    arguments = json.dumps([sys.path, *given])
    # Its tensors are small, and none of them is on a GPU.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _MAIN, arguments]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # in it, too, until it can ignore them
    try:
        return subprocess.Popen(command, pass_fds=given, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _signals_to(give: Callable[[str], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no signal ever strikes here
        yield
        return
    before = {number: signal.signal(number, lambda *_: give("signal")) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
