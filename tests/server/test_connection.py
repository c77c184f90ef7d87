"""What a client may do with a connection beside sending requests: begin none, begin without an end, read nothing."""

import asyncio
import resource
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
import uvicorn

from qwen3vl_moe.server import connection
from qwen3vl_moe.server.connection import Connection
from qwen3vl_moe.server.front import _allow_files
from tests.server.conftest import HELLO
from tests.server.test_streams import raw_request, until

BIG = b"x" * (1 << 24)  # more than what systems keep for a socket


async def application(scope, receive, send):
    """Its body comes back, or something large."""
    body, more = b"", True
    while more and scope["method"] == "POST":
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    reply = BIG if scope["path"] == "/big" else body
    length = str(len(reply)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": reply})


@pytest.fixture(params=["uvloop", "asyncio"])
def small(request, monkeypatch):
    """``small(head seconds, unread seconds)``: a server of such connections, its address, and a way to end it."""
    loops = pytest.importorskip(request.param)

    @contextmanager
    def make(head: float = 60, unread: float = 60):
        monkeypatch.setattr(connection, "_HEAD_SECONDS", head)
        monkeypatch.setattr(connection, "_UNREAD_SECONDS", unread)
        config = uvicorn.Config(application, http=Connection, log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

            def run() -> None:
                with asyncio.Runner(loop_factory=loops.new_event_loop) as runner:
                    runner.run(server._serve(sockets=[listening]))

            thread = threading.Thread(target=run)
            thread.start()
            until(lambda: server.started, "it never began")
            try:
                yield server, listening.getsockname()
            finally:
                server.should_exit = True
                thread.join(10)
                ended, server.force_exit = not thread.is_alive(), True
                thread.join()
            assert ended

    return make


def closed(client: socket.socket) -> bytes:
    """What comes until the other side ends the connection."""
    client.settimeout(20)
    found = b""
    try:
        while piece := client.recv(1 << 20):
            found += piece
    except ConnectionError:
        pass
    return found


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX: "], ids=["nothing", "half a head"])
def test_a_request_has_to_begin(small, begun):
    with small(head=0.2) as (server, address), socket.create_connection(address) as client:
        client.sendall(begun)
        assert closed(client) == b""
        assert not server.server_state.connections


def test_a_second_request_has_to_begin_too(small):
    with small(head=0.3) as (_, address), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in client.recv(1 << 16)
        client.sendall(b"GET / HT")
        assert closed(client) == b""


@pytest.mark.parametrize("line", [b"a" * 4096, b"\r\nX: a" * 512], ids=["long", "many"])
def test_a_head_without_an_end_is_refused(small, line):
    with small() as (server, address), socket.create_connection(address) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
        with suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(line)
        until(lambda: not server.server_state.connections, "its memory is held")


def test_nor_has_what_follows_a_body_no_end(small):
    with small() as (server, address), socket.create_connection(address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        with suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(b"X: a\r\n" * 1000)
        until(lambda: not server.server_state.connections, "its memory is held")


def test_a_large_body_is_no_head(small):
    with small() as (_, address), socket.create_connection(address) as client:
        body = b"\r\nupgrade: " * 50_000
        head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert closed(client).endswith(b"\r\n\r\n" + body)


def test_who_takes_nothing_of_a_reply_is_let_go(small):
    """Also when the server is to end, which waits for it until then."""
    with small(unread=0.3) as (server, address), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        until(lambda: server.server_state.total_requests, "it never answered")
        until(lambda: not server.server_state.connections, "it is waited for")
        assert len(closed(client)) < len(BIG)


def test_who_reads_slowly_gets_all(small):
    with small(unread=0.5) as (_, address), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.connect(address)
        client.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        count, began = 0, time.monotonic()
        while time.monotonic() - began < 1.5:  # longer than the limit, and never so long without reading
            count += len(client.recv(1 << 16))
            time.sleep(0.02)
        assert count + len(closed(client)) > len(BIG)


def test_a_client_may_wish_for_http_2(server):
    """As Java's does with every first request; its body is the same."""
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    request = raw_request({"messages": HELLO, "max_tokens": 2, "temperature": 0})
    with socket.create_connection(server.address, timeout=30) as client:
        for _ in range(2):  # and the connection can be used again
            client.sendall(request.replace(b"Content-Type", wish + b"Content-Type"))
            found = b""
            while b'"usage"' not in found:
                found += client.recv(1 << 16)
            assert found.startswith(b"HTTP/1.1 200")


def test_the_shells_limit_of_open_files_is_not_the_servers():
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        _allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard % 2**64, 1 << 16), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
