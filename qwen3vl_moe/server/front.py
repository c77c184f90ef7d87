"""The process that clients talk to: HTTP, bodies, prompts and their pictures, the text of answers.

It has an interpreter of its own, so that none of this work ever keeps the engine's thread from its next step. It holds
no weights and touches no GPU. It ends when all is answered after it was told to, and with the engine's process.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from qwen3vl_moe.server.app import make_app
from qwen3vl_moe.server.connection import Connection
from qwen3vl_moe.server.serving import Serving
from qwen3vl_moe.server.streams import Link
from qwen3vl_moe.server.wire import Start, Wire

_BACKLOG = 2048  # connections that may wait to be accepted
_FILES = 1 << 16  # that are open at a time
_KEEP_ALIVE = 75  # seconds; longer than clients keep a connection that they may use again
# Seconds for which a thread that makes prompts may keep the interpreter from the one that reads and writes for all
# clients: a tenth of Python's own.
_SWITCH_INTERVAL = 0.0005


def main(wire: int, listening: int) -> None:
    """Serve until told to end.

    Args:
        wire: descriptor of the connection to the engine's process.
        listening: that of the socket that clients connect to.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    _allow_files()
    engine = Wire(socket.socket(fileno=wire))
    try:
        start = engine.receive()
    except EOFError:  # it was stopped before it had begun
        return
    gc.collect()
    gc.freeze()  # what is there now stays: Python need not look through all of it again and again
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(start, engine, socket.socket(fileno=listening)))


async def _serve(start: Start, wire: Wire, listening: socket.socket) -> None:
    link = Link(wire, lambda: setattr(server, "should_exit", True))
    serving = Serving(start, link)
    config = uvicorn.Config(
        make_app(serving, start.api_key),
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        http=Connection,
        server_header=False,
        ws="none",
    )
    server = _Uvicorn(config, link.ready)
    link.start()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # see bind
    await server.serve(sockets=[listening])


class _Uvicorn(uvicorn.Server):
    """Tells when it takes connections, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _allow_files() -> None:
    """As many open files as the system lets a process have: each connection is one, and a shell's usual 1024 are fewer
    than the answers that may be computed and wait."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        from uvloop import new_event_loop
    except ImportError:
        return None
    return new_event_loop
