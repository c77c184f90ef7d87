"""Answers in OpenAI's form: whole, or as the events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from qwen3vl_moe.engine.detokenizer import TokenBytes
from qwen3vl_moe.engine.outputs import Logprob
from qwen3vl_moe.server.parts import Part, Parts
from qwen3vl_moe.server.wire import Delta

DONE = b"data: [DONE]\n\n"
Entries = list[tuple[int, dict[int, Logprob]]]  # of tokens: the id of each, and its log-probabilities


encode = json.JSONEncoder(separators=(",", ":")).encode  # escapes keep it ASCII on one line, whatever texts hold


class Reply:
    """What answers to one request have in common.

    Args:
        model: the name under which it is served.
        num_prompt: tokens of all prompts.
        num_image: how many of these are of images and videos.
        count: of the answers.
    """

    prefix = object_name = chunk_name = ""

    def __init__(self, model: str, num_prompt: int, num_image: int, count: int):
        self._model, self._num_prompt, self._num_image = model, num_prompt, num_image
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._tokens, self._unfinished = [0] * count, count
        self.num_cached = 0
        # Of hundreds of streams each has an event a step: what they have in common is written once.
        self._head = "data: " + encode(self._envelope(self.chunk_name))[:-1] + ',"choices":['

    @property
    def usage(self) -> dict[str, Any]:
        """Counts of tokens; right once all answers have ended."""
        written = sum(self._tokens)
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": written,
            "total_tokens": self._num_prompt + written,
            "prompt_tokens_details": {"cached_tokens": self.num_cached, "image_tokens": self._num_image},
        }

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _event(self, choice: dict[str, Any] | None, with_usage: bool = False) -> bytes:
        choices = "" if choice is None else encode(choice)
        usage = f',"usage":{encode(self.usage)}' if with_usage else ""
        return f"{self._head}{choices}]{usage}}}\n\n".encode()

    def whole(self, deltas: Iterable[Delta]) -> dict[str, Any]:
        """All answers, of which each is one delta."""
        choices = []
        for delta in sorted(deltas, key=lambda each: each.choice):
            self._tokens[delta.choice] = delta.num_tokens
            choices.append(self._choice(delta))
        return {**self._envelope(self.object_name), "choices": choices, "usage": self.usage}

    def events(self, deltas: Iterable[Delta], include_usage: bool) -> Iterable[bytes]:
        """Those of a stream. The last chunk of the last answer has the counts, or else one after it."""
        for delta in deltas:
            self._tokens[delta.choice] = delta.num_tokens
            chunks = self._chunks(delta)
            self._unfinished -= delta.finish_reason is not None
            *others, last = chunks or [None]
            yield from map(self._event, others)
            if last is not None:
                ends = delta.finish_reason is not None and not self._unfinished
                yield self._event(last, with_usage=ends and not include_usage)
        if not self._unfinished:
            if include_usage:
                yield self._event(None, with_usage=True)
            yield DONE

    def _choice(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _chunks(self, delta: Delta) -> list[dict[str, Any]]:
        raise NotImplementedError


class ChatReply(Reply):
    """Of /v1/chat/completions.

    Args:
        parts: makes what takes an answer apart, for each answer.
        token_bytes: of the vocabulary.
        num_top: how many of the most likely tokens are told with each token.
    """

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        num_prompt: int,
        num_image: int,
        count: int,
        parts: Callable[[], Parts],
        token_bytes: TokenBytes,
        num_top: int,
    ):
        super().__init__(model, num_prompt, num_image, count)
        self._parts, self._token_bytes, self._num_top = [parts() for _ in range(count)], token_bytes, num_top
        self._begun, self._calls = [False] * count, [0] * count

    def _choice(self, delta: Delta) -> dict[str, Any]:
        parts = self._parts[delta.choice]
        found = parts.push(delta.text, last=True)
        texts = {kind: "".join(part.text for part in found if part.kind == kind) for kind in ("content", "reasoning")}
        calls = [self._call(delta.choice, part) for part in found if part.kind == "call"]
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"] if not calls else None}
        if calls:
            message |= {"content": texts["content"] or None, "tool_calls": calls}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        return {
            "index": delta.choice,
            "message": message,
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": self._reason(delta),
        }

    def _chunks(self, delta: Delta) -> list[dict[str, Any]]:
        number, ends, found = delta.choice, delta.finish_reason is not None, []
        if not self._begun[number]:
            self._begun[number] = True
            found.append({"role": "assistant", "content": ""})
        for part in self._parts[number].push(delta.text, last=ends):
            if part.kind == "call":
                place = self._calls[number]
                found.append({"tool_calls": [{"index": place, **self._call(number, part)}]})
            else:
                found.append({"content" if part.kind == "content" else "reasoning_content": part.text})
        if ends or (delta.logprobs and not found):
            found.append({})
        chunks = [{"index": number, "delta": each, "logprobs": None, "finish_reason": None} for each in found]
        if chunks:
            # The tokens are told with the last piece of what they are known to have made.
            chunks[-1] |= {"logprobs": self._logprobs(delta.logprobs), "finish_reason": self._reason(delta)}
        return chunks

    def _call(self, number: int, part: Part) -> dict[str, Any]:
        self._calls[number] += 1
        name = f"call_{uuid.uuid4().hex[:24]}"
        return {"id": name, "type": "function", "function": {"name": part.name, "arguments": part.text}}

    def _reason(self, delta: Delta) -> str | None:
        calls = delta.finish_reason == "stop" and self._parts[delta.choice].called
        return "tool_calls" if calls else delta.finish_reason

    def _logprobs(self, entries: Entries) -> dict[str, Any] | None:
        def shown(token: int, logprob: Logprob) -> dict[str, Any]:
            raw = self._token_bytes.special.get(token, "").encode() or self._token_bytes(token)
            return {"token": logprob.decoded_token, "logprob": _number(logprob.logprob), "bytes": list(raw)}

        if not entries:
            return None
        content = []
        for token, known in entries:
            others = [shown(other, known[other]) for other in _best(known, self._num_top)]
            content.append({**shown(token, known[token]), "top_logprobs": others})
        return {"content": content, "refusal": None}


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, num_prompt: int, count: int, num_top: int | None):
        super().__init__(model, num_prompt, 0, count)
        self._num_top, self._offsets = num_top, [0] * count

    def _choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.choice,
            "text": delta.text,
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def _chunks(self, delta: Delta) -> list[dict[str, Any]]:
        return [self._choice(delta)]

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        tokens, own, top, offsets = [], [], [], []
        for token, known in delta.logprobs:
            text = known[token].decoded_token or ""
            tokens.append(text)
            own.append(_number(known[token].logprob))
            best = _best(known, self._num_top)
            top.append({known[each].decoded_token or "": _number(known[each].logprob) for each in best})
            offsets.append(self._offsets[delta.choice])
            self._offsets[delta.choice] += len(text)
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def _best(known: dict[int, Logprob], most: int) -> list[int]:
    """The most likely tokens, the best one first."""
    ranked = sorted(known, key=lambda token: known[token].rank)
    return [token for token in ranked if known[token].rank <= most][:most]


def _number(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity
