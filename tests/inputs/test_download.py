"""Downloads: whatever a server does, they end at their deadline; they go where they may, and tell nothing they read."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs import access, download, fetch
from qwen3vl_moe.inputs.access import media_access
from qwen3vl_moe.inputs.image_source import open_image
from qwen3vl_moe.inputs.workers import Pool
from tests.inputs.web import PICTURE, Client, serve
from tests.pictures import rgb

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def names(monkeypatch):
    """Names that only this test knows, each with its addresses; and which were asked for."""
    known: dict[str, list[str]] = {}
    asked: list[str] = []

    def look_up(host, port, *_, **options):
        asked.append(host)
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    known["asked"] = asked
    return known


def ordinary(client: Client) -> None:
    path = client.read_head()
    places = {
        "/moved": "/a.png",
        "/to-ftp": "ftp://127.0.0.1/secret",
        "/to-file": "file:///etc/hostname",
        "/to-data": "data:image/png;base64,secret",
        "/to-nowhere": "http://[secret",
        "/round": "/round",
    }
    if path in ("/a.png", "/caf%C3%A9%20au%20lait.png?x=1"):
        client.reply("200 OK", PICTURE)
    elif path == "/chunked":
        client.send(CHUNKED, b"%x\r\n" % len(PICTURE), PICTURE, b"\r\n0\r\nA-Trailer: 1\r\n\r\n")
    elif path == "/until-it-closes":
        client.send(b"HTTP/1.0 200 OK\r\n\r\n", PICTURE)
    elif path == "/after-continue":
        client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.reply("200 OK", PICTURE)
    elif path in places:
        client.reply("302 Found", b"secret", f"Location: {places[path]}")
    elif path == "/short":
        client.reply("200 OK", PICTURE[:100], length=len(PICTURE))
    elif path == "/short-chunk":
        client.send(CHUNKED, b"fff\r\nsecret")
    elif path == "/page":
        client.reply("200 OK", b"<!DOCTYPE html>secret")
    elif path == "/closes":
        return
    elif path == "/no-http":
        client.send(b"SSH-2.0-secret\r\n\r\n")
    elif path == "/odd-length":
        client.send(CHUNKED, b"secret\r\nsecret")
    elif path == "/many-headers":
        client.send(HEAD, b"A: secret\r\n" * 1000, b"\r\n")
    elif path == "/long-header":
        client.send(HEAD, b"A: ", b"secret" * 20_000, b"\r\n\r\n")
    else:
        client.reply("404 secret", b"secret")


@pytest.fixture(scope="module")
def server():
    with serve(ordinary) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    "path", ["/a.png", "/moved", "/café au lait.png?x=1", "/chunked", "/until-it-closes", "/after-continue", "/a.png#x"]
)
def test_image(server, path):
    np.testing.assert_array_equal(np.asarray(rgb(server + path)), np.asarray(rgb(PICTURE)))
    np.testing.assert_array_equal(np.asarray(rgb(f" HTTP{server[4:]}{path}\n")), np.asarray(rgb(PICTURE)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone.png", "cannot be downloaded: HTTP status 404 Not Found"),
        ("/to-ftp", "it is redirected to the scheme 'ftp'; only http and https are followed"),
        ("/to-file", "it is redirected to the scheme 'file'"),
        ("/to-data", "it is redirected to the scheme 'data'"),
        ("/to-nowhere", "cannot be downloaded: the URL or the server's answer is not valid"),
        ("/round", "HTTP status 302, a redirect that leads nowhere or in a circle"),
        ("/short", "the server closed the connection"),
        ("/short-chunk", "the server closed the connection"),
        ("/page", "is not an image that can be read: it begins like an HTML page"),
        ("/closes", "the server closed the connection without an answer"),
        ("/no-http", "the URL or the server's answer is not valid (BadStatusLine)"),
        ("/odd-length", "the server closed the connection"),
        ("/many-headers", "the URL or the server's answer is not valid (HTTPException)"),
        ("/long-header", "the URL or the server's answer is not valid (LineTooLong)"),
    ],
)
def test_refused(server, path, message):
    with pytest.raises(PromptError) as caught:
        open_image(server + path, 2)
    assert str(caught.value).startswith(f"image 2 ('{server}{path}')")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a.png",
        "http://127.0.0.1:port/a.png",
        "http://127.0.0.1:99999/a.png",
        "http://[::1/a.png",
        "http://",
        "http:///a.png",
        "http://user:password@127.0.0.1/a.png",
        "http://a.net%2f.evil.net/a.png",
        "http://a.net\\.evil.net/a.png",
        "http://a..net/a.png",
        "http://a b/a.png",
        "http://\ud800/a.png",
        "http://127.0.0.1/\ud800.png",
        "http://" + "a" * 70_000,
        "https://[::1%25]/",
    ],
)
def test_unreachable(url):
    with pytest.raises(PromptError, match=r"image 0 .*cannot be downloaded"):
        open_image(url, 0)


def late(answer):
    """After the request was read."""

    def work(client):
        client.read_head()
        answer(client)

    return work


def drip_handshake(client):
    """What looks like the beginning of a long TLS record."""
    client.connection.recv(65536)
    client.send(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03")
    client.drip(b"x")


def redirect_slowly(client):
    number = int(client.read_head().strip("/") or 0)
    time.sleep(0.05)
    client.reply("302 Found", b"", f"Location: /{number + 1}")


SLOW = {
    "says nothing": ("http", Client.wait),
    "drips the status line": ("http", late(lambda c: c.drip(b"HTTP/1.1 200 " + b"O" * 1000))),
    "drips headers": ("http", late(lambda c: (c.send(HEAD), c.drip(b"A: b\r\n")))),
    "continues for ever": ("http", late(lambda c: c.flood(b"HTTP/1.1 100 Continue\r\n\r\n"))),
    "continues slowly": ("http", late(lambda c: c.drip(b"HTTP/1.1 100 Continue\r\n\r\n"))),
    "drips the body": ("http", late(lambda c: (c.send(HEAD, b"\r\n"), c.drip(b"x")))),
    "drips chunks": ("http", late(lambda c: (c.send(CHUNKED), c.drip(b"1\r\nx\r\n")))),
    "drips a chunk's length": ("http", late(lambda c: (c.send(CHUNKED), c.drip(b"0")))),
    "drips trailers": ("http", late(lambda c: (c.send(CHUNKED, b"0\r\n"), c.drip(b"A: b\r\n")))),
    "redirects slowly": ("http", redirect_slowly),
    "drips the body of a redirect": (
        "http",
        late(lambda c: (c.send(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n"), c.drip(b"x"))),
    ),
    "never begins TLS": ("https", Client.wait),
    "drips the TLS handshake": ("https", drip_handshake),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("scheme", "answer"), SLOW.values(), ids=SLOW)
def test_every_slow_server_meets_the_deadline(monkeypatch, scheme, answer):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 0.25)
    began = time.monotonic()
    with serve(answer) as port, pytest.raises(PromptError, match=r"cannot be downloaded: not complete after 0.25 sec"):
        open_image(f"{scheme}://127.0.0.1:{port}/", 0)
    assert time.monotonic() - began < 10


def test_a_slow_resolver_meets_the_deadline(monkeypatch):
    monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 0.25)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    with pytest.raises(PromptError, match=r"not complete after 0.25 seconds"):
        open_image("http://pictures.example/a.png", 0)


ENDLESS = {
    "body": (HEAD + b"\r\n", b"x"),
    "a redirect's body": (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", b"x"),
    "status lines": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"A: b\r\n"),
}


@pytest.mark.parametrize(("head", "endless"), ENDLESS.values(), ids=ENDLESS)
def test_size_limit_of_the_whole_exchange(monkeypatch, head, endless):
    monkeypatch.setattr(fetch, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(download, "_OVERHEAD", 1 << 18)
    answer = late(lambda client: (client.send(head), client.flood(endless * 1000)))
    with serve(answer) as port, pytest.raises(PromptError, match="is larger than 0 MiB"):
        open_image(f"http://127.0.0.1:{port}/", 0)


class TestAccess:
    def test_private_addresses(self, server, names):
        names["inside.example"] = ["127.0.0.1"]
        names["both.example"] = ["8.8.8.8", "127.0.0.1"]
        names["127.0.0.1"] = names["127.1"] = ["127.0.0.1"]
        port = server.rpartition(":")[2]
        for host in ("inside.example", "both.example", "127.0.0.1", "127.1"):
            with pytest.raises(PromptError, match=r"has an address of this machine or of a private network") as caught:
                open_image(f"http://{host}:{port}/a.png", 0, media_access(allow_private_hosts=False))
            assert "127.0.0.1" not in str(caught.value).replace(f"http://{host}", "").replace(repr(host), "")
        assert open_image(f"http://inside.example:{port}/a.png", 0).size_text == "31x18"

    def test_the_address_that_was_checked_is_the_one_that_is_reached(self, server, names, monkeypatch):
        """A name that is public when it is asked for once, and inside when it is asked for again."""
        monkeypatch.setattr(access, "_is_public", lambda address: address == "127.0.0.1")
        names["pictures.example"] = ["127.0.0.1"]
        url = f"http://pictures.example:{server.rpartition(':')[2]}/a.png"
        assert open_image(url, 0, media_access(allow_private_hosts=False)).size_text == "31x18"
        assert names["asked"] == ["pictures.example"]

    @pytest.mark.parametrize("limits", [{"allow_private_hosts": False}, {"allow_hosts": [".pictures.example"]}])
    def test_every_hop_is_checked(self, names, monkeypatch, limits):
        monkeypatch.setattr(access, "_is_public", lambda address: address == "127.0.0.1")
        names |= {
            "a.pictures.example": ["127.0.0.1"],
            "pictures.example": ["127.0.0.1"],
            "inside.example": ["127.0.0.2"],
        }
        reached = []

        def inside(client):
            reached.append(client.read_head())
            client.reply("200 OK", PICTURE)

        def outside(client):
            hop = int(client.read_head().strip("/"))
            host = f"a.pictures.example:{port}" if hop < 2 else f"inside.example:{inner}"
            client.reply("302 Found", b"", f"Location: http://{host}/{hop + 1}")

        with serve(inside, "127.0.0.2") as inner, serve(outside) as port:
            assert open_image(f"http://pictures.example:{port}/0", 0).size_text == "31x18"
            assert reached == ["/3"]
            with pytest.raises(
                PromptError, match=r"cannot be downloaded: the host 'inside\.example' (has an|is not one)"
            ):
                open_image(f"http://pictures.example:{port}/0", 0, media_access(**limits))
        assert reached == ["/3"]

    def test_no_host_at_all(self, server):
        for source in (f"{server}/a.png", "https://example.org/a.png"):
            with pytest.raises(PromptError, match="is not one of allow_hosts"):
                open_image(source, 0, media_access(allow_hosts=()))

    def test_a_proxy_is_used_where_addresses_are_not_looked_at(self, names, monkeypatch):
        names["127.0.0.1"] = ["127.0.0.1"]
        asked = []

        def proxy(client):
            asked.append(client.read_head())
            client.reply("200 OK", PICTURE)

        with serve(proxy) as port:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
            assert (
                open_image("http://far.example/a.png", 0, media_access(allow_hosts="far.example")).size_text == "31x18"
            )
            monkeypatch.setattr(access, "_is_public", lambda _: True)  # the proxy's address is not what decides
            for limits, message in (
                ({"allow_private_hosts": False}, "Name or service not known; the environment's proxy is used only"),
                ({"allow_hosts": "near.example"}, "the host 'far.example' is not one of allow_hosts"),
            ):
                with pytest.raises(PromptError, match=f"cannot be downloaded: {message}"):
                    open_image("http://far.example/a.png", 0, media_access(**limits))
        assert asked == ["http://far.example/a.png"]


class TestTLS:
    """Of a certificate for pictures.example alone, until 2126."""

    PEM = """-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIJVPZACtKkX2+N3Qe6cJnlnv2GHIcvKPauBj/gtGbVuvoAoGCCqGSM49
AwEHoUQDQgAEisaAvvyCoeTmIKA88wRfe3IH+uYnQL77E3hDBDC3atC/kEdjrWGB
Qy6UUAYa2JM7dUMyTpJSJ1YIRwzkNSZxUw==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBqjCCAVCgAwIBAgIUMZwlXJwmPi/HrzW/kmP+lPJBpdIwCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQcGljdHVyZXMuZXhhbXBsZTAgFw0yNjExMjgwMjUwMjdaGA8y
MTI2MTEwNDAyNTAyN1owGzEZMBcGA1UEAwwQcGljdHVyZXMuZXhhbXBsZTBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABIrGgL78gqHk5iCgPPMEX3tyB/rmJ0C++xN4
QwQwt2rQv5BHY61hgUMulFAGGtiTO3VDMk6SUidWCEcM5DUmcVOjcDBuMB0GA1Ud
DgQWBBS6JrP66MaGyTnNaknUV4n/LsCqEDAfBgNVHSMEGDAWgBS6JrP66MaGyTnN
aknUV4n/LsCqEDAPBgNVHRMBAf8EBTADAQH/MBsGA1UdEQQUMBKCEHBpY3R1cmVz
LmV4YW1wbGUwCgYIKoZIzj0EAwIDSAAwRQIgYLb483rgHx5JtWLv6jzSDUBF/5DL
HVf0yRXcrx0sWKUCIQDCIYyrAGGP5ReCQWBvRY8HzduBlQf4vP9Zcrcr4QM4nw==
-----END CERTIFICATE-----
"""

    @pytest.fixture
    def context(self, tmp_path, monkeypatch):
        (tmp_path / "pem").write_text(self.PEM)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "pem")
        ours = ssl.create_default_context(cafile=tmp_path / "pem")
        ours.sslsocket_class = download._TLSSocket
        monkeypatch.setattr(download, "_tls", lambda: ours)
        return context

    @pytest.fixture
    def port(self, context):
        def answer(client):
            with context.wrap_socket(client.connection, server_side=True) as secure:
                client = Client(secure, client.stopping)
                if client.read_head() == "/slow":
                    client.send(HEAD, b"\r\n")
                    client.drip(b"x")
                client.reply("200 OK", PICTURE)

        with serve(answer) as port:
            yield port

    def test_the_name_is_verified_at_a_pinned_address(self, port, names):
        names["pictures.example"] = names["other.example"] = ["127.0.0.1"]
        assert open_image(f"https://pictures.example:{port}/a.png", 0).size_text == "31x18"
        with pytest.raises(PromptError, match="the server's certificate is not valid: Hostname mismatch"):
            open_image(f"https://other.example:{port}/a.png", 0)

    def test_deadline(self, port, names, monkeypatch):
        monkeypatch.setattr(download, "DOWNLOAD_TIMEOUT_S", 0.5)
        names["pictures.example"] = ["127.0.0.1"]
        with pytest.raises(PromptError, match=r"not complete after 0.5 seconds"):
            open_image(f"https://pictures.example:{port}/slow", 0)

    def test_through_a_proxy(self, context, names, monkeypatch):
        """Whose tunnel is asked for by name, and in which the server's name is verified."""
        names["127.0.0.1"] = ["127.0.0.1"]
        asked = []

        def proxy(client):
            asked.append(client.read_head())
            client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            client.connection = context.wrap_socket(client.connection, server_side=True)
            client.head = b""
            client.read_head()
            client.reply("200 OK", PICTURE)

        with serve(proxy) as proxy_port:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy_port}")
            assert open_image("https://pictures.example/a.png", 0).size_text == "31x18"
            with pytest.raises(PromptError, match="Hostname mismatch"):
                open_image("https://other.example/a.png", 0)
        assert asked == ["pictures.example:443", "other.example:443"]

    def test_no_tls(self):
        plain = serve(lambda client: client.reply("400 Bad Request"))
        with plain as port, pytest.raises(PromptError, match="cannot be downloaded: TLS fails: "):
            open_image(f"https://127.0.0.1:{port}/a.png", 0)


def test_a_late_server_does_not_hold_up_the_images_behind_it(monkeypatch):
    """In a pool of one thread."""
    pool = Pool(1)
    monkeypatch.setattr(fetch, "POOL", pool)

    def answer(client):
        client.read_head()
        assert done.wait(20)
        client.reply("200 OK", PICTURE)

    done = threading.Event()
    with serve(answer) as port:
        late = pool.submit(lambda url: open_image(url, 0), f"http://127.0.0.1:{port}/")
        assert pool.submit(lambda data: open_image(data, 1), PICTURE).result(20).size_text == "31x18"
        assert not late.done()
        done.set()
        assert late.result(20).size_text == "31x18"


@pytest.mark.timeout(60)
def test_interrupt_ends_a_program_at_once_while_downloads_hang():
    code = """
import sys
from qwen3vl_moe.inputs.image_source import open_image
from qwen3vl_moe.inputs.workers import POOL
print("begins", flush=True)
for late in [POOL.submit(lambda number: open_image(sys.argv[1], number), number) for number in range(9)]:
    late.result()
"""
    with serve(Client.wait) as port:
        program = subprocess.Popen(
            [sys.executable, "-c", code, f"http://127.0.0.1:{port}/"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        assert program.stdout is not None
        assert program.stdout.readline() == "begins\n"
        time.sleep(0.3)  # the downloads begin; if they have not yet, the test asks for less
        program.send_signal(signal.SIGINT)
        _, words = program.communicate(timeout=15)  # a download alone would take 30 s
    assert "KeyboardInterrupt" in words
