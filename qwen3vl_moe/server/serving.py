"""From the body of a request to a stream of answers: admission, preparation, the engine. Knows nothing of HTTP's wire.

All of it runs in one event loop, but for prompts, which the library's pool of threads makes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from qwen3vl_moe.engine.detokenizer import TokenBytes
from qwen3vl_moe.errors import NumbersError, OptionError, PromptError, RankError, UserError
from qwen3vl_moe.inputs.processor import Prompt
from qwen3vl_moe.inputs.workers import POOL
from qwen3vl_moe.json_files import parse_json
from qwen3vl_moe.server.limits import Gate, Ticket
from qwen3vl_moe.server.media import with_bytes
from qwen3vl_moe.server.metrics import Metrics
from qwen3vl_moe.server.parts import Parts, Reasons, reasons_of
from qwen3vl_moe.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Request,
    RequestError,
    parse_chat,
    parse_completion,
)
from qwen3vl_moe.server.replies import ChatReply, CompletionReply, Reply
from qwen3vl_moe.server.streams import EngineEnded, Link, Stream
from qwen3vl_moe.server.wire import Prepared, Start

_AHEAD = 128  # prompts that are ready and wait for their first step: pictures take more memory as pixels than as files


class Serving:
    """One model and all that is asked of it.

    Args:
        start: the model, as far as it is known here.
        link: to its engine.
    """

    def __init__(self, start: Start, link: Link):
        self.name, self.limits, self.link = start.name, start.limits, link
        self.created, self.max_model_len = int(time.time()), start.admission.max_model_len
        self.gate = Gate(start.seats + start.limits.waiting)
        self.metrics = Metrics(self._gauges)
        self._processor, self._admission = start.processor, start.admission
        self._token_bytes = TokenBytes(start.processor.tokenizer)
        self._ahead = asyncio.Semaphore(min(start.seats, _AHEAD))
        self._num_ahead = 0

    async def begin(self, kind: str, raw: bytes, arrival: float, ticket: Ticket) -> tuple[Request, Stream, Reply]:
        """A request, once it is in the engine.

        Args:
            kind: "chat" or "completion".
            raw: its body.
            arrival: when that was there, in seconds since the epoch.
            ticket: left when its answers have ended.

        Raises:
            UserError: it cannot be served.
            EngineEnded: the engine has failed.
        """
        await self._ahead.acquire()
        self._num_ahead += 1
        holds = True

        def on_change(what: str) -> None:
            nonlocal holds
            if holds:
                holds = False
                self._num_ahead -= 1
                self._ahead.release()
            if what == "ended":
                ticket.leave()

        work, held, loop = self._chat if kind == "chat" else self._completion, [raw], asyncio.get_running_loop()
        del raw
        making = POOL.submit(lambda held: work(held.pop(), arrival), held)
        try:
            request, prepared = await asyncio.wrap_future(making)
            ticket.widen(len(prepared) * request.params.n - 1)
            ticket.hold_bytes(0)
        except BaseException:
            if making.cancel() or making.done():
                held.clear()  # the pool still has the list
                on_change("ended")
            else:  # its client went away; a thread is at it all the same, and has its memory until it is done
                making.add_done_callback(lambda _: _tell(loop, on_change))
            raise
        reply = self._reply(request, prepared)
        stream = Stream(prepared, request.params, request.stream, on_change)
        self.link.add(stream)
        return request, stream, reply

    def end(self, stream: Stream) -> None:
        """Give a request up, if its answers have not ended."""
        self.link.give_up(stream)

    def _chat(self, raw: bytes, arrival: float) -> tuple[Request, list[Prepared]]:
        request = parse_chat(self._json(raw))
        template, tools = dict(request.template), request.template.get("tools")
        if request.template.get("continue_final_message"):
            template.setdefault("add_generation_prompt", False)

        def make(messages: Any, **how: Any) -> Prompt:
            images = with_bytes(messages, self.limits.media)
            return self._processor.chat(images, **{**template, "tools": tools}, **how)

        return request, self._prepared(request, [request.messages], make, arrival)

    def _completion(self, raw: bytes, arrival: float) -> tuple[Request, list[Prepared]]:
        request = parse_completion(self._json(raw))

        def make(prompt: Any, **how: Any) -> Prompt:
            return self._processor.prompt(prompt, **how)

        return request, self._prepared(request, request.prompts, make, arrival)

    def _json(self, raw: bytes) -> Any:
        try:
            return parse_json(raw)
        except UnicodeDecodeError as error:
            raise RequestError(f"the body is no UTF-8 text ({error.reason} at byte {error.start})") from None
        except json.JSONDecodeError as error:
            raise RequestError(f"the body is no JSON ({error.msg} at character {error.pos})") from None
        except ValueError as error:
            raise RequestError(f"the body is no JSON ({error})") from None

    def _prepared(self, request: Request, items: list, make: Callable, arrival: float) -> list[Prepared]:
        if request.model not in (None, self.name):
            raise RequestError(
                f"the model {request.model!r} is not served here; {self.name!r} is", "model", "model_not_found", 404
            )
        if len(items) * request.params.n > self.gate.most:
            raise RequestError(f"{len(items) * request.params.n} answers are too many: {self.gate.most} can wait", "n")
        self._admission.check(request.params)  # before any picture is fetched
        found = []
        for item in items:
            prompt, _, seconds = self._admission.prepared(make, (item, request.params))
            if (formed := self._admission.formed(request.params, prompt)) is not request.params:
                self._admission.check(formed)  # it is refused here rather than by the engine, in the midst of others
            found.append(Prepared(prompt, arrival, seconds))
        return found

    def _reply(self, request: Request, prepared: list[Prepared]) -> Reply:
        count = len(prepared) * request.params.n
        num_prompt = sum(len(each.prompt.token_ids) for each in prepared)
        if isinstance(request, CompletionRequest):
            return CompletionReply(self.name, num_prompt, count, request.params.logprobs)
        assert isinstance(request, ChatRequest)
        num_image = sum(image.num_tokens for each in prepared for image in each.prompt.images)
        parts, num_top = partial(Parts, self._reasons(prepared), bool(request.tools)), request.params.logprobs or 0
        return ChatReply(self.name, num_prompt, num_image, count, parts, self._token_bytes, num_top)

    def _reasons(self, prepared: list[Prepared]) -> Reasons:
        """Where the reasoning of a chat's answers is."""
        return reasons_of(self._processor.chat_template, prepared[0].prompt.text)

    def _gauges(self) -> dict[str, tuple[str, float]]:
        load = self.link.load
        return {
            "answers_running": ("Answers that are being computed.", load.running),
            "answers_waiting": ("Answers whose prompt is ready and that wait for room.", load.waiting),
            "answers_inside": ("All answers that were let in and have not ended.", self.gate.inside),
            "requests_ahead": ("Requests whose prompts are made, or wait for their first step.", self._num_ahead),
            "kv_cache_usage_ratio": ("Part of the cache's blocks that is held.", load.cache),
        }


def _tell(loop: asyncio.AbstractEventLoop, on_change: Callable[[str], None]) -> None:
    with suppress(RuntimeError):  # it is closed: all is over
        loop.call_soon_threadsafe(on_change, "ended")


def request_error(error: Exception) -> RequestError:
    """What a client is told of an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineEnded):
        return RequestError(str(error), None, "engine_ended", 503)
    if isinstance(error, NumbersError | RankError):
        return RequestError(str(error), None, "numbers" if isinstance(error, NumbersError) else "ranks", 500)
    if isinstance(error, PromptError | OptionError | UserError):
        text = str(error)
        return RequestError(text, None, "context_length_exceeded" if "max_model_len" in text else None)
    return RequestError(f"the server has a fault: {type(error).__name__}", None, "fault", 500)
