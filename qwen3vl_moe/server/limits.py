"""How much a server takes, and how much of it is inside."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3vl_moe.server.media import MediaLimits
from qwen3vl_moe.server.protocol import RequestError

_BODIES = 4 << 30  # bytes of all bodies that wait to be prepared


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        waiting: answers beyond those that are computed at a time.
        body_bytes: of one request.
        media: of its pictures and videos.
        origins: hosts, with their ports, of pages that may ask beside the server's own.
    """

    waiting: int = 1024
    body_bytes: int = 64 << 20
    media: MediaLimits = field(default_factory=MediaLimits)
    origins: tuple[str, ...] = ()


class Gate:
    """How much is inside, and how much may be."""

    def __init__(self, most: int, most_bytes: int = _BODIES):
        self.most, self._most_bytes = most, most_bytes
        self.inside = self._bytes = 0

    def enter(self) -> Ticket:
        """Let a request in, as one answer.

        Raises:
            RequestError: with status 429, if there is no room.
        """
        ticket = Ticket(self)
        ticket.widen(1)
        return ticket


class Ticket:
    """The part of a gate that a request takes."""

    def __init__(self, gate: Gate):
        self._gate, self._count, self._bytes, self._left = gate, 0, 0, False

    def widen(self, count: int) -> None:
        """Take room for more answers; see :meth:`Gate.enter`."""
        gate = self._gate
        if self._count + count > gate.most:
            raise RequestError(f"{self._count + count} answers were asked for; at most {gate.most} can wait", "n")
        if gate.inside + count > gate.most:
            raise RequestError(
                f"the server is full: {gate.inside} answers are being computed or wait; try again", None, "full", 429
            )
        gate.inside += count
        self._count += count

    def hold_bytes(self, count: int) -> None:
        """Take so much memory in all for a body, until :meth:`leave` or 0 bytes are held."""
        gate, more = self._gate, count - self._bytes
        if more > 0 and gate._bytes + more > gate._most_bytes:
            raise RequestError("the server holds too many large requests; try again", None, "full", 429)
        gate._bytes += more
        self._bytes = count

    def leave(self) -> None:
        """Give all of it back; harmless a second time."""
        self._gate.inside -= self._count
        self._gate._bytes -= self._bytes
        self._count = self._bytes = 0
