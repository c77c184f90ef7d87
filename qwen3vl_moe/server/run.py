"""A server from its socket to its last answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from qwen3vl_moe.engine import LLM
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.server.app import make_app
from qwen3vl_moe.server.serving import Limits, Serving

_BACKLOG = 2048  # connections that may wait to be accepted
_KEEP_ALIVE = 75  # seconds; longer than clients keep a connection that they may use again
# Seconds for which a thread may keep the interpreter from the engine's, which lets go of it with every launch. A tenth
# of Python's own: docs/serving.md has what it gained.
_SWITCH_INTERVAL = 0.0005


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


class _Uvicorn(uvicorn.Server):
    """Tells when it takes connections, and what a signal came to."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], say: Callable[[str], None]):
        super().__init__(config)
        self._ready, self._say = ready, say

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit  # of any two signals
        self.should_exit = True
        # Not from the handler itself, which may have struck in the middle of a write.
        said = "stopping now" if self.force_exit else "finishing what was asked for; once more to stop now"
        asyncio.get_running_loop().call_soon_threadsafe(self._say, said)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own raises each signal once more at its end: here it is an order that has been carried out."""
        if threading.current_thread() is not threading.main_thread():  # no signal ever strikes here
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Server:
    """Serves one model at one address.

    Args:
        llm: used by nobody else while the server runs.
        bound: where (:func:`bind`).
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
        self.address, self._bound, self._say = address_of(bound), bound, say
        self.serving = Serving(llm, name, limits or Limits(), self.stop)
        config = uvicorn.Config(
            make_app(self.serving, api_key),
            log_config=None,
            access_log=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,
            server_header=False,
            ws="none",
        )
        self._uvicorn = _Uvicorn(config, lambda: say(f"serving {name} at {self.address}"), say)

    def run(self) -> int:
        """Serve until :meth:`stop` or a signal asks for an end, and then until all answers are finished.

        Returns:
            the exit status: 0, 130 if a second signal gave answers up, 1 if the engine has failed.
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._uvicorn.serve(sockets=[self._bound]))
        finally:
            self.serving.close()
            sys.setswitchinterval(interval)
        if self.serving.thread.failure is not None:
            self._say(f"error: {self.serving.thread.failure}")
            return 1
        return 130 if self._uvicorn.force_exit else 0

    def stop(self) -> None:
        """Take no more requests, and end once all answers are finished. Any thread may ask for it."""
        self._uvicorn.should_exit = True


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop
