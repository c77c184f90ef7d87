"""OpenAI's batch format: what a line of it asks, and the lines that answer.

A request, as hosted services and vLLM's ``run_batch`` read it::

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "...", "messages": [...]}}

The body is read as the server reads it: a field that means nothing, or that a file of answers has no place for, is
refused by its name in the error of its own line. The answer to a line, or what was wrong with it::

    {"id": "batch_req_0_7d1c...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...",
     "body": {"object": "chat.completion", "choices": [...], "usage": {...}, ...}}, "error": null}
    {"id": "batch_req_1_03fa...", "custom_id": "b", "response": {"status_code": 400, "request_id": "...",
     "body": {"error": {"message": "...", ...}}}, "error": {"code": "invalid_request", "message": "..."}}

``id`` holds the number of the request and its fingerprint, by which a job is taken up again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from qwen3vl_moe.engine.outputs import RequestOutput
from qwen3vl_moe.errors import PromptError, one_line
from qwen3vl_moe.server.parts import Parts, Reasons
from qwen3vl_moe.server.protocol import RequestError, parse_chat  # needs no web server

URL = "/v1/chat/completions"
_ID = re.compile(r"batch_req_([0-9]+)_([0-9a-f]{16})")


def is_openai_line(content: Mapping[str, Any]) -> bool:
    return "custom_id" in content and "body" in content


def chat_request(content: Mapping[str, Any], model_names: tuple[str, ...]) -> tuple[list[dict], dict[str, Any]]:
    """The conversation that a line asks to be answered, and the sampling parameters that it gives.

    Args:
        content: the line, without keys whose value is null.
        model_names: what ``body.model`` may be; empty: anything.

    Raises:
        PromptError: the line is not of this format, or asks for something that is not built.
    """
    unknown = sorted(content.keys() - {"custom_id", "method", "url", "body"})
    if unknown:
        raise PromptError(f"the key {unknown[0]!r} is unknown; a line has custom_id, method, url and body")
    if not isinstance(content.get("custom_id"), str):
        raise PromptError("custom_id is missing; it is a text that names the request")
    if content.get("method") != "POST":
        raise PromptError(f"the method is {content.get('method')!r}; POST is needed")
    if content.get("url") != URL:
        raise PromptError(f"the url is {content.get('url')!r}; only {URL} is answered here")
    body = content.get("body")
    if not isinstance(body, Mapping):
        raise PromptError("body is missing; it is the object that a chat completion is asked with")
    return _chat_body({key: value for key, value in body.items() if value is not None}, model_names)


def _chat_body(body: dict[str, Any], model_names: tuple[str, ...]) -> tuple[list[dict], dict[str, Any]]:
    model = body.get("model")
    if not isinstance(model, str):
        raise PromptError("body.model is missing; it is the name of the model")
    if model_names and model not in model_names:
        raise PromptError(
            f"body.model is {model!r}, and the model that answers is {model_names[0]!r}; "
            f"--served-model-name {model} lets it answer under that name"
        )
    body.pop("metadata", None)  # for whoever runs a service that stores answers
    if body.get("service_tier") == "flex":  # how soon, which nobody promises here
        del body["service_tier"]
    try:
        asked = parse_chat(body)
    except RequestError as error:
        raise PromptError(f"body: {error}") from None
    idle = {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}}
    more = [name for name, value in asked.template.items() if name not in idle or value != idle[name]]
    more += ["stream"] * asked.stream + ["logprobs"] * (asked.params.logprobs is not None)
    if more:
        raise PromptError(f"body.{more[0]} is not supported in a file; leave it out")
    return asked.messages, asked.sampling


def answer_record(
    index: int, name: Any, fingerprint: str, model: str, result: RequestOutput, reasons: Reasons = "never"
) -> dict[str, Any]:
    """The line that answers a request; ``reasons``: where the reasoning of its answers is."""
    prompt, answer = len(result.prompt_token_ids), sum(len(output.token_ids) for output in result.outputs)
    choices = [
        {
            "index": number,
            "message": _message(output.text, reasons),
            "logprobs": None,
            "finish_reason": output.finish_reason,
        }
        for number, output in enumerate(result.outputs)
    ]
    body = {
        "id": f"chatcmpl-{index}-{fingerprint}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
    }
    return _record(index, name, fingerprint, 200, body, None)


def _message(text: str, reasons: Reasons) -> dict[str, Any]:
    """As the server gives it."""
    said = {part.kind: part.text for part in Parts(reasons).push(text, last=True)}  # neighbours of a kind are one
    message = {"role": "assistant", "content": said.get("content", "")}
    return message | ({"reasoning_content": said["reasoning"]} if "reasoning" in said else {})


def error_record(index: int, name: Any, fingerprint: str, message: str) -> dict[str, Any]:
    """The line that says what is wrong with a request: for readers of the response as for readers of the error."""
    message = one_line(message)
    inner = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return _record(index, name, fingerprint, 400, {"error": inner}, {"code": "invalid_request", "message": message})


def identity(record: Mapping[str, Any]) -> tuple[int, str, bool]:
    """Number and fingerprint of the request that a record answers, and whether the answer is an error.

    Raises:
        ValueError, KeyError, TypeError: it is no such record.
    """
    found = _ID.fullmatch(record["id"])
    if found is None or "response" not in record:
        raise ValueError
    return int(found[1]), found[2], record["error"] is not None


def _record(index: int, name: Any, fingerprint: str, status: int, body: dict, error: dict | None) -> dict[str, Any]:
    request = f"batch_req_{index}_{fingerprint}"
    response = {"status_code": status, "request_id": f"req_{index}_{fingerprint}", "body": body}
    return {"id": request, "custom_id": name, "response": response, "error": error}
