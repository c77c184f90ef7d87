"""http(s) URL -> bytes, within one deadline, from hosts and addresses that may be reached.

urllib speaks the protocol: redirects, proxies, status lines. What it lacks lies in the sockets that it is given here.
Each wait of theirs ends at the deadline of the whole exchange, however many redirects, lines or bytes a server spreads
it over, and they are connected to the very address that was checked, so that a name which resolves to another one a
moment later changes nothing.

An error never carries what a server sent: whoever wrote the request may read the answers to it, and the server may be
one that only this machine can reach.
"""

from __future__ import annotations

import functools
import http
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future
from typing import Any

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.access import MediaAccess, host_name

DOWNLOAD_TIMEOUT_S = 30.0  # for all of one download, from its name to its last byte

_MAX_URL = 2**16  # characters
_OVERHEAD = 2**20  # bytes of headers and redirects, beside the image
# What urllib takes for host and port, as far as it has one meaning: no user, no escapes.
_HOST_AND_PORT = re.compile(r"(\[[^\]/?#@\\\s]+\]|[^:/?#@\\%\[\]\s]+)(:[0-9]{1,5})?")


def download(url: str, where: str, access: MediaAccess, max_bytes: int) -> bytes:
    """The body that ``url`` is answered with.

    Args:
        url: http:// or https://; spaces and accents are escaped as a browser does it.
        where: what messages call the image.

    Raises:
        PromptError: it cannot be had, or not within :data:`DOWNLOAD_TIMEOUT_S` and ``max_bytes``, or ``access`` does
            not allow it, nor one of the places that it is redirected to.
    """
    exchange = _Exchange(where, access, max_bytes)
    try:
        if len(url) > _MAX_URL:
            raise PromptError(f"{where} cannot be downloaded: a URL of {len(url)} characters, the limit is {_MAX_URL}")
        # People paste URLs with spaces and accents, which HTTP does not carry as they are.
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(quoted, headers={"User-Agent": "qwen3vl-moe"})
        with exchange.opener().open(request) as response:
            data = bytearray()
            # read1 returns what has arrived: read(n) would keep megabytes of buffers for a server that drips.
            while chunk := response.read1(1 << 20):
                data += chunk
                if len(data) > max_bytes:
                    raise too_large(where, max_bytes)
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return bytes(data)
    except PromptError:
        raise
    except Exception as error:  # urllib and http.client raise many types on what a server may send
        proxy = "; the environment's proxy is used only with allow_private_hosts" if exchange.misses_proxy else ""
        raise PromptError(f"{where} cannot be downloaded: {_reason(error)}{proxy}") from None


def too_large(where: str, max_bytes: int) -> PromptError:
    return PromptError(f"{where} is larger than {max_bytes // 2**20} MiB, the limit of one file")


class _Exchange:
    """One download over all the connections that it takes: what is left of its time and bytes, and its limits."""

    def __init__(self, where: str, access: MediaAccess, max_bytes: int):
        self.where, self.access, self.max_bytes = where, access, max_bytes
        self._deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
        self._room = max_bytes + _OVERHEAD
        self.misses_proxy = False  # there is one, which is not used

    def left(self) -> float:
        """Seconds until the deadline.

        Raises:
            TimeoutError: it has passed.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def received(self, count: int) -> int:
        self._room -= count
        if self._room < 0:
            raise too_large(self.where, self.max_bytes)
        return count

    def opener(self) -> urllib.request.OpenerDirector:
        opener = urllib.request.OpenerDirector()
        # A proxy looks names up itself, where no address can be checked or pinned.
        proxies = urllib.request.getproxies()
        if not self.access.private_hosts:
            self.misses_proxy = bool(proxies.keys() & {"http", "https"})
            proxies = {}
        for handler in (
            urllib.request.ProxyHandler(proxies),
            _Web(self),
            _Redirects(self),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            opener.add_handler(handler)
        return opener

    def check_host(self, request: urllib.request.Request) -> None:
        """Give the request's host its one spelling, and refuse it where it is not allowed."""
        match = _HOST_AND_PORT.fullmatch(request.host or "")
        name = host_name(match[1]) if match else None
        if match is None or name is None:
            raise PromptError(
                f"{self.where} cannot be downloaded: the URL does not have the form http://host/ or http://host:port/"
            )
        self.access.check_host(name, self.where)
        request.host = (f"[{name}]" if ":" in name else name) + (match[2] or "")

    def connect(self, address: tuple[str, int], *_: Any) -> _PlainSocket:
        """In place of ``socket.create_connection``."""
        host, port = address
        found = self._look_up(host, port)
        for entry in found:
            self.access.check_address(str(entry[4][0]), host, self.where)
        error: Exception = OSError("the host has no address")
        for number, (family, kind, protocol, _, target) in enumerate(found):
            sock = _PlainSocket(family, kind, protocol)
            sock.exchange = self
            try:
                sock.settimeout(self.left() / (len(found) - number))  # an address that does not answer leaves time
                sock.connect(target)
                return sock
            except OSError as failed:
                sock.close()
                error = failed
            except BaseException:
                sock.close()
                raise
        raise error

    def _look_up(self, host: str, port: int) -> list[tuple]:
        # The resolver takes no timeout, and nothing can interrupt it: it is left behind in a thread of its own.
        answer: Future[list[tuple]] = Future()

        def work() -> None:
            try:
                answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except Exception as error:
                answer.set_exception(error)

        threading.Thread(target=work, name="resolver", daemon=True).start()
        return answer.result(self.left())


class _PlainSocket(socket.socket):
    exchange: _Exchange

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(self.exchange.left())
        return self.exchange.received(super().recv_into(buffer, nbytes, flags))

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.settimeout(self.exchange.left())
        super().sendall(data, flags)


class _TLSSocket(ssl.SSLSocket):
    exchange: _Exchange

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(self.exchange.left())
        return self.exchange.received(super().recv_into(buffer, nbytes, flags))

    def send(self, data: Any, flags: int = 0) -> int:  # sendall is a loop over it
        self.settimeout(self.exchange.left())
        return super().send(data, flags)


class _PlainConnection(http.client.HTTPConnection):
    def __init__(self, host: str, exchange: _Exchange, **options: Any):
        super().__init__(host, **options)
        self._create_connection = exchange.connect


class _TLSConnection(_PlainConnection):
    default_port = http.client.HTTPS_PORT

    def __init__(self, host: str, exchange: _Exchange, **options: Any):
        super().__init__(host, exchange, **options)
        self._exchange = exchange

    def connect(self) -> None:
        super().connect()  # through the tunnel of a proxy too
        name = getattr(self, "_tunnel_host", None) or self.host
        self.sock.settimeout(self._exchange.left())  # of the whole handshake
        sock = _tls().wrap_socket(self.sock, server_hostname=name)
        assert isinstance(sock, _TLSSocket)
        sock.exchange = self._exchange
        self.sock = sock


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TLSSocket
    return context


class _Web(urllib.request.AbstractHTTPHandler):
    """urllib's http and https over the exchange's own connections. Its methods' names are their registration."""

    def __init__(self, exchange: _Exchange):
        super().__init__()
        self._exchange = exchange

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        self._exchange.check_host(request)
        return self.do_request_(request)

    https_request = http_request

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._to(_PlainConnection), request)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(self._to(_TLSConnection), request)

    def _to(self, connection: type[_PlainConnection]) -> Any:
        return functools.partial(connection, exchange=self._exchange)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, exchange: _Exchange):
        self._exchange = exchange

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        scheme = urllib.parse.urlsplit(headers.get("location") or headers.get("uri") or "").scheme
        if scheme not in ("http", "https", ""):
            raise PromptError(
                f"{self._exchange.where} cannot be downloaded: it is redirected to the scheme {scheme[:10]!r}; "
                "only http and https are followed"
            )
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _reason(error: BaseException) -> str:
    """Why, in words of this package and of the system."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (301, 302, 303, 307, 308):
            return f"HTTP status {error.code}, a redirect that leads nowhere or in a circle"
        known = error.code in http.HTTPStatus._value2member_map_
        return f"HTTP status {error.code}" + (f" {http.HTTPStatus(error.code).phrase}" if known else "")
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    if isinstance(error, TimeoutError):
        return f"not complete after {DOWNLOAD_TIMEOUT_S:g} seconds"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {error.reason or type(error).__name__}"
    if isinstance(error, http.client.IncompleteRead):
        return f"the server closed the connection {error.expected or 0} bytes early"
    if isinstance(error, ConnectionError) and not error.strerror:
        return "the server closed the connection without an answer"
    if isinstance(error, OSError):
        return error.strerror or "the connection failed"
    return f"the URL or the server's answer is not valid ({type(error).__name__})"
