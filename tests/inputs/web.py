"""A web server whose answers are written byte by byte, as slow and as wrong as a test wants them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.pictures import encoded, noise

PICTURE = encoded(noise(31, 18))


class Client:
    """A connection to answer on."""

    def __init__(self, connection: socket.socket, stopping: threading.Event):
        self.connection, self.stopping = connection, stopping
        self.head = b""

    def read_head(self) -> str:
        """The request up to its empty line; its path."""
        while b"\r\n\r\n" not in self.head and (more := self.connection.recv(65536)):
            self.head += more
        return self.head.split(b" ")[1].decode() if b" " in self.head else ""

    def send(self, *parts: bytes) -> None:
        self.connection.sendall(b"".join(parts))

    def reply(self, status: str, body: bytes = b"", *headers: str, length: int | None = None) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers, "", ""]
        self.send("\r\n".join(lines).encode("latin-1"), body)

    def drip(self, text: bytes) -> None:
        """``text`` again and again, a byte now and then, until the client hangs up."""
        while True:
            for byte in text:
                self.send(bytes([byte]))
                if self.stopping.wait(0.01):
                    return

    def flood(self, text: bytes) -> None:
        """``text`` again and again, as fast as it goes."""
        while not self.stopping.is_set():
            self.send(text)

    def wait(self) -> None:
        self.stopping.wait(60)


@contextmanager
def serve(answer: Callable[[Client], None], host: str = "127.0.0.1") -> Iterator[int]:
    """A server on ``host``; every connection is given to ``answer`` in a thread of its own. Gives its port."""
    stopping = threading.Event()
    with socket.create_server((host, 0)) as listening:

        def work(connection: socket.socket) -> None:
            with connection, suppress(OSError):  # the client hangs up, as it should
                answer(Client(connection, stopping))

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=work, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listening.getsockname()[1]
        finally:
            stopping.set()
            listening.shutdown(socket.SHUT_RDWR)
