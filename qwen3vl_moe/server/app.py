"""The HTTP side: routes, bodies, keys, the wire of an answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
import time
import traceback
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_moe.errors import UserError
from qwen3vl_moe.server.limits import Ticket
from qwen3vl_moe.server.protocol import RequestError
from qwen3vl_moe.server.replies import Reply, encode
from qwen3vl_moe.server.serving import Serving, request_error
from qwen3vl_moe.server.streams import EngineEnded, Stream

_BODY_SECONDS = 60.0  # for a body to come
_DISCARDED = 256 << 20  # bytes of a body that is too large, which are read so that its client hears the reply
_OPEN = ("/", "/health")  # paths that need no key
_READ = ["GET", "HEAD"]
_PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_EVENTS.append((b"x-accel-buffering", b"no"))  # or nginx would hold a stream back


def make_app(serving: Serving, api_key: str | None = None) -> FastAPI:
    """The application of a server."""
    # No pages about the API: they would load scripts from elsewhere, and know nothing of bodies that are read by hand.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, serving=serving, api_key=api_key)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path[:100]!r}: {error.detail}"
        return _error(RequestError(said, None, None, error.status_code), dict(error.headers or {}))

    page = files("qwen3vl_moe.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = {"content-security-policy": _policy(page), "referrer-policy": "no-referrer"}

    @app.api_route("/", methods=_READ)
    async def index() -> Response:
        return HTMLResponse(page, headers=policy)

    @app.api_route("/health", methods=_READ)
    async def health() -> Response:
        if serving.link.failed:
            raise RequestError("the engine has failed", None, "engine_ended", 503)
        return _Json({"status": "ok"})

    @app.api_route("/metrics", methods=_READ)
    async def metrics() -> Response:
        return PlainTextResponse(serving.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.api_route("/v1/models", methods=_READ)
    async def models() -> Response:
        return _Json({"object": "list", "data": [_model(serving)]})

    @app.api_route("/v1/models/{name:path}", methods=_READ)
    async def model(name: str) -> Response:
        if name != serving.name:
            raise RequestError(f"the model {name!r} is not served here", "model", "model_not_found", 404)
        return _Json(_model(serving))

    @app.post("/flush_cache")
    async def flush_cache() -> Response:
        serving.link.flush_cache()
        return PlainTextResponse("The cache is forgotten.\n")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(serving, request)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(serving, request)

    return app


class Guard:
    """Around all else: keys, pages of other origins, counts of requests."""

    def __init__(self, app: ASGIApp, serving: Serving, api_key: str | None):
        self._app, self._serving, self._key = app, serving, None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client went away before anything was sent

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        error = self._refusal(scope)
        try:
            await (self._app if error is None else _error(error))(scope, receive, counted)
        finally:
            if (name := _PATHS.get(scope["path"])) is not None:
                self._serving.metrics.answered(name, status)

    def _refusal(self, scope: Scope) -> RequestError | None:
        headers = dict(scope["headers"])
        if b"origin" in headers and (refused := self._of_page(scope, headers)) is not None:
            return RequestError(refused, None, "origin", 403)
        if self._key is None or scope["path"] in _OPEN:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return None
        return RequestError("the key is missing or wrong: Authorization: Bearer KEY", None, "invalid_api_key", 401)

    def _of_page(self, scope: Scope, headers: dict[bytes, bytes]) -> str | None:
        """Why a page in a browser may not ask, if so: else any page could make the model of this machine work."""
        host = headers[b"origin"].partition(b"://")[2].decode("latin-1").lower()
        if host in self._serving.limits.origins:
            return None
        if host != headers.get(b"host", b"").decode("latin-1").lower():
            return "pages of other origins may not use this server"
        # A page may also give the name of its own host the address of this machine, once a browser has loaded it.
        if self._key is None and _is_loopback(scope["server"][0]) and not _is_here(host):
            return "pages under this name may not use this server: give it an --api-key, or name them in --origins"
        return None


class _Json(Response):
    """ASCII, whatever texts hold: of half a surrogate pair UTF-8 could not be made."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content).encode()


class Answer(Response):
    """The response to a request whose body is there. It ends at once when its client goes away."""

    def __init__(self, serving: Serving, kind: str, raw: bytes, ticket: Ticket):
        super().__init__()
        self._serving, self._kind, self._raw, self._ticket = serving, kind, raw, ticket
        self._arrival, self._begun = time.time(), False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(scope, receive, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait((work, gone))
            self._ticket.leave()
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = None
        try:
            raw, self._raw = self._raw, b""
            request, stream, reply = await self._serving.begin(self._kind, raw, self._arrival, self._ticket)
            del raw
            if request.stream:
                await self._write(stream, reply, request.include_usage, send)
            else:
                deltas = []
                while new := await stream.next():
                    deltas += new
                reply.num_cached = stream.num_cached
                await _Json(reply.whole(deltas))(scope, receive, send)
            self._serving.metrics.ended(stream, reply.usage)
        except Exception as error:
            told = request_error(error)
            if told.status >= 500 and not isinstance(error, EngineEnded | UserError):  # those are told elsewhere
                traceback.print_exc()
            if self._begun:
                event = encode(told.body).encode()
                await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": False})
            else:
                await _error(told)(scope, receive, send)
        finally:
            if stream is not None:
                self._serving.end(stream)

    async def _write(self, stream: Stream, reply: Reply, include_usage: bool, send: Send) -> None:
        """A stream. Its status is sent with the first token, so that an error before it has a status of its own."""
        while deltas := await stream.next():
            if not self._begun:
                await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                self._begun = True
            reply.num_cached = stream.num_cached
            body = b"".join(reply.events(deltas, include_usage))
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _answer(serving: Serving, request: Request) -> Response:
    ticket = serving.gate.enter()
    try:
        raw = await _body(request, serving.limits.body_bytes, ticket)
    except ClientDisconnect:
        ticket.leave()
        return Response(status_code=499)  # to nobody
    except BaseException:
        ticket.leave()
        raise
    return Answer(serving, _PATHS[request.url.path], raw, ticket)


async def _body(request: Request, most: int, ticket: Ticket) -> bytes:
    """The body of a request.

    Raises:
        RequestError: it is larger than ``most`` bytes, comes too slowly, or is packed.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError("content-encoding is not supported: send the body as it is", None, None, 415)
    parts, size, said = [], 0, request.headers.get("content-length", "")
    too_large = said.isdigit() and int(said) > most
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    too_large = True
                if too_large:
                    parts = []
                    if size > most + _DISCARDED:
                        break
                else:
                    parts.append(part)
                    ticket.hold_bytes(size)
    except TimeoutError:
        raise RequestError(f"the body did not come within {_BODY_SECONDS:.0f} seconds", None, None, 408) from None
    if too_large:
        raise RequestError(f"the body has more than {most} bytes, which is this server's most", None, None, 413)
    return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _error(error: RequestError, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.status == 429:
        headers["retry-after"] = "1"
    if error.status == 408:
        headers["connection"] = "close"  # the rest of its body is not waited for
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _Json(error.body, error.status, headers)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback


def _is_here(host: str) -> bool:
    """Whether a host, with its port or not, is an address or this machine's own name: no page's host can be one."""
    name = re.sub(r":\d*$", "", host) if host.startswith("[") or host.count(":") == 1 else host
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _model(serving: Serving) -> dict[str, Any]:
    about = {"id": serving.name, "object": "model", "created": serving.created, "owned_by": "qwen3vl-moe"}
    return {**about, "root": serving.name, "max_model_len": serving.max_model_len}


def _policy(page: str) -> str:
    """What the page may do: run its own script, show pictures that were dropped on it, ask this server."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data: blob:; "
        "media-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
