"""What the two processes of a server tell each other, and how it gets across.

The one that clients talk to sends :class:`Ask`, :class:`GiveUp`, :class:`Flush`, and :class:`Ready` when it serves; the
engine's sends :class:`Start` first, then a :class:`Told` after each step, and :class:`Stop`.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.admission import Admission
from qwen3vl_moe.engine.outputs import Logprob, RequestMetrics
from qwen3vl_moe.inputs.processor import Processor, Prompt
from qwen3vl_moe.server.limits import Limits


class Prepared(NamedTuple):
    """A prompt, when work on it began (seconds since the epoch), and how many seconds it took."""

    prompt: Prompt
    arrival: float
    seconds: float


class Delta(NamedTuple):
    """What an answer has gained.

    Attributes:
        choice: which answer of the request.
        text: that was added.
        num_tokens: of the answer so far.
        logprobs: of the tokens that were added, if they were asked for, each with the id of the token.
        finish_reason: "stop" or "length" once it has ended.
    """

    choice: int
    text: str
    num_tokens: int
    logprobs: list[tuple[int, dict[int, Logprob]]]
    finish_reason: str | None


@dataclass(frozen=True)
class Start:
    """All that the process has to know that clients talk to.

    Attributes:
        name: of the model.
        processor: of its prompts.
        admission: what requests have to be like.
        seats: how many answers are computed at a time.
        limits: of what is taken from clients.
        api_key: that they have to give; None: none.
    """

    name: str
    processor: Processor
    admission: Admission
    seats: int
    limits: Limits
    api_key: str | None


class Ask(NamedTuple):
    """Answer a request from the next step on.

    Attributes:
        number: of the request.
        prepared: a prompt, or several.
        params: of all of them.
        live: whether answers are wanted while they are written, or only when they are finished.
    """

    number: int
    prepared: Sequence[Prepared]
    params: SamplingParams
    live: bool


class GiveUp(NamedTuple):
    """Free what a request holds. Harmless on one that has ended."""

    number: int


class Flush(NamedTuple):
    """Let no prompt find anything of those before it."""


class Ready(NamedTuple):
    """Connections are taken."""


class Stop(NamedTuple):
    """Take no more requests, and end once all are answered."""


class Load(NamedTuple):
    """How many answers are computed and wait, and the part of the cache's blocks that is held."""

    running: int
    waiting: int
    cache: float


class News(NamedTuple):
    """Of one request.

    Attributes:
        number: of the request.
        deltas: what its answers have gained.
        started: whether it has had its first step.
        ended: whether nothing more will come.
        error: why, if it went wrong.
        num_cached: prompt tokens that were found in the cache, once it has ended.
        metrics: of each answer, once it has ended.
    """

    number: int
    deltas: Sequence[Delta] = ()
    started: bool = False
    ended: bool = False
    error: Exception | None = None
    num_cached: int = 0
    metrics: Sequence[RequestMetrics] = ()


class Told(NamedTuple):
    """What a step gave to all whom it concerns.

    Attributes:
        news: of requests.
        load: after it.
        failed: whether it was the last one, as something went wrong.
    """

    news: Sequence[News]
    load: Load
    failed: bool = False


class Wire:
    """One end of the connection. Any thread may send; one receives.

    A message is a pickle, and after it the memory of its arrays, as it is: neither side holds its interpreter while
    pixels go across.
    """

    def __init__(self, end: socket.socket):
        self._socket, self._sending = end, threading.Lock()

    def send(self, message: Any) -> None:
        """Raises OSError if the other process has ended."""
        pickled, arrays = io.BytesIO(), []
        pickler = pickle.Pickler(pickled, 5, buffer_callback=lambda array: arrays.append(array.raw()))
        pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: _as_array}  # torch's own way is slow
        pickler.dump(message)
        parts = [pickled.getbuffer(), *arrays]
        head = struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts))
        with self._sending:
            self._socket.sendall(head if arrays else b"".join((head, parts[0])))
            for part in parts if arrays else ():
                self._socket.sendall(part)

    def receive(self) -> Any:
        """The next message, waited for; raises EOFError if the other process has ended."""
        [count] = struct.unpack("<Q", self._read(8))
        sizes = struct.unpack(f"<{count}Q", self._read(8 * count))
        pickled, *arrays = map(self._read, sizes)
        return pickle.loads(pickled, buffers=arrays)

    def close(self) -> None:
        """The other end notices, and whoever waits in :meth:`receive`."""
        with suppress(OSError):  # it has gone already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        found, done = bytearray(size), 0
        with memoryview(found) as view:
            while done < size:
                try:
                    count = self._socket.recv_into(view[done:], size - done, socket.MSG_WAITALL)
                except OSError:
                    count = 0
                if not count:
                    raise EOFError
                done += count
        return found


def _as_array(x: torch.Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (x.numpy(),)
