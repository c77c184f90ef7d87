"""A client's connection: uvicorn's, with an end to what a client may send before it is heard, and may leave unread."""

from __future__ import annotations

import asyncio
import json
import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qwen3vl_moe.server.protocol import RequestError

_MOST_HEAD = 1 << 16  # bytes of a request before its body, or between two pieces of that; the parser keeps all of them
_HEAD_SECONDS, _UNREAD_SECONDS = 60.0, 300.0  # for a request to begin; in which a client takes nothing of its reply
_UPGRADE = re.compile(rb"\r\nupgrade:", re.I)


class Connection(HttpToolsProtocol):
    """One connection.

    A request that has not begun in time, or has too long a head, ends it. So does a client that takes nothing of what
    was written, be the reply whole or not: else its memory would be held, and a server that ends would wait, for ever.
    """

    _head: asyncio.TimerHandle | None = None  # until when a request has to have begun
    _unread: asyncio.TimerHandle | None = None  # until when something of what was written has to be taken
    _silent = 0  # bytes that came since the parser last had something to tell
    _heard = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(_HEAD_SECONDS, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._asked:
            data = _without_upgrade(data)
        self._heard = False
        super().data_received(data)
        self._silent = 0 if self._heard else self._silent + len(data)
        self._watch_if_closing()
        if self.transport.is_closing():
            return
        if self._silent > _MOST_HEAD:
            self._refuse()
        elif self._head is None and not self._asked and self.timeout_keep_alive_task is None:
            self._head = self.loop.call_later(_HEAD_SECONDS, self._close)

    def on_headers_complete(self) -> None:
        self._heard = True
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._heard = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._heard = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_if_closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_if_closing()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_if_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None and not self.transport.is_closing():
            self._unread.cancel()
            self._unread = None

    @property
    def _asked(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self) -> None:
        if self._asked:  # in the midst of its body
            self.transport.abort()
            return
        error = RequestError(f"the head of the request has more than {_MOST_HEAD} bytes", None, None, 431)
        body = json.dumps(error.body).encode()
        head = "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        self._close()

    def _close(self) -> None:
        self.transport.close()
        self._watch()

    def _watch_if_closing(self) -> None:
        if self.transport.is_closing():  # which waits until all is taken
            self._watch()

    def _watch(self) -> None:
        if self._unread is None:
            self._again(self.transport.get_write_buffer_size())

    def _again(self, left: int) -> None:
        self._unread = self.loop.call_later(_UNREAD_SECONDS, self._look, left)

    def _look(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < before:
            self._again(left)
        else:
            self.transport.abort()


def _without_upgrade(data: bytes) -> bytes:
    """The head of a request without its wish for another protocol (h2c, as Java's client has it): the parser would take
    what follows for that, though a server that does not change goes on with the body."""
    end = data.find(b"\r\n\r\n")
    end = len(data) if end < 0 else end
    return _UPGRADE.sub(b"\r\nx-upgrade:", data[:end]) + data[end:] if _UPGRADE.search(data, 0, end) else data
