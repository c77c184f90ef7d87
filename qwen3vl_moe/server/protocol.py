"""Bodies of OpenAI's API -> what the engine takes.

Nothing here knows a web server: files of requests in OpenAI's batch form are read by the same code. Every field is
used, or refused by its name; one whose value is null is a field that is not there. What has no effect by its own
definition (``user``) is checked and left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr  # short, and never fails
from typing import Any

from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.server.tools import Tool, form_of_calls

MOST_LOGPROBS = 20  # of other tokens, OpenAI's bound: each is text in every chunk
_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions

# Named and meant as in SamplingParams; those of OpenAI first.
_SAMPLING = (
    *("temperature", "top_p", "n", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias"),
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "allowed_token_ids"),
    *("bad_words", "include_stop_str_in_output", "skip_special_tokens", "structured_outputs", "truncate_prompt_tokens"),
)
# Fields that only tell who asks, and what for; and those whose one possible value is what is done anyway.
_NOTES = ("user", "safety_identifier", "prompt_cache_key")
_ONLY: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
}
_REFUSED = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "metadata": "nothing is stored",
    "audio": "the model answers in text",
    "prediction": "answers are not predicted",
    "web_search_options": "there is no web search",
    "reasoning_effort": "the checkpoint decides: a Thinking one thinks, an Instruct one does not",
    "verbosity": "say in the prompt how long the answer should be",
    "suffix": "the model does not fill gaps",
    "guided_json": "response_format or structured_outputs",
    "guided_regex": "structured_outputs={'regex': ...}",
    "guided_choice": "structured_outputs={'choice': [...]}",
    "guided_grammar": "structured_outputs={'grammar': ...}",
    "mm_processor_kwargs": "min_pixels and max_pixels stand beside the url of an image, fps and num_frames of a video",
    "chat_template": "the checkpoint's own is used",
    "use_beam_search": "set n and a temperature to draw several answers",
    "priority": "requests begin in their order",
}
_CHAT = ("messages", "max_completion_tokens", "max_tokens", "top_logprobs", "response_format", "tools", "tool_choice")
_CHAT += ("parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
_BOTH = ("model", "stream", "stream_options", "logprobs", *_SAMPLING, *_NOTES, "store", "service_tier")


class RequestError(UserError):
    """A request that cannot be served, as its client is told.

    Attributes:
        status: of HTTP.
        param: the field at fault.
        code: what programs can look at.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What both kinds of requests have.

    Attributes:
        model: as it was asked for; None: whatever is served.
        params: of all answers.
        sampling: those of them that the body gives.
        stream: whether the answer is sent while it is written.
        include_usage: whether a stream ends with a chunk of counts.
    """

    model: str | None
    params: SamplingParams
    sampling: dict[str, Any]
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Request):
    """Of /v1/chat/completions.

    Attributes:
        messages: for :meth:`.Processor.chat`; sources of images are as the client wrote them, and not to be trusted.
        tools: that the model may call.
        template: further arguments of :meth:`.Processor.chat`.
    """

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...] = ()
    template: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Request):
    """Of /v1/completions: prompts for :meth:`.Processor.prompt`, texts or token ids."""

    prompts: list[str | list[int]]


def parse_chat(body: Any) -> ChatRequest:
    """A body of /v1/chat/completions, as JSON values.

    Raises:
        RequestError: a field is unknown, not supported, or has an impossible value; its ``param`` names it.
    """
    given = _checked_fields(body, (*_CHAT, *_BOTH, "modalities"))
    messages = _messages(given)
    most = [given[name] for name in ("max_completion_tokens", "max_tokens") if name in given]
    if len(most) == 2 and most[0] != most[1]:
        raise RequestError("max_tokens and max_completion_tokens are two names of one limit: give one", "max_tokens")
    other: dict[str, Any] = {"max_tokens": most[0]} if most else {}
    logprobs, top = _switch(given, "logprobs"), given.get("top_logprobs")
    if top is not None and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    if logprobs:
        other["logprobs"] = _count(0 if top is None else top, "top_logprobs")
    tools, schema = _tools(given), _schema(given)
    choice = _tool_choice(given, tools)
    parallel = _switch(given, "parallel_tool_calls", True)
    form = None
    if choice == "none":
        tools = ()
    if tools and not (choice == "auto" and schema is None):
        form = form_of_calls(
            tools, None if choice in ("auto", "required") else choice, parallel, _either(choice, schema)
        )
    elif schema is not None:
        form = {"json": schema}
    if tools and not parallel and form is None:
        raise RequestError(
            "parallel_tool_calls: false needs tool_choice 'required' or a named tool: calls that the model is free to "
            "make are not counted",
            "parallel_tool_calls",
        )
    if form is not None:
        if "structured_outputs" in given:
            raise RequestError(
                "structured_outputs does not go with response_format or tool_choice", "structured_outputs"
            )
        other["structured_outputs"] = form
    template = {
        name: given[name]
        for name in ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
        if name in given
    }
    for name in ("add_generation_prompt", "continue_final_message"):
        _switch(given, name)
    if tools:
        template["tools"] = [tool.spec for tool in tools]
    return ChatRequest(messages=messages, tools=tools, template=template, **_common(given, other))


def parse_completion(body: Any) -> CompletionRequest:
    """A body of /v1/completions, as JSON values.

    Raises:
        RequestError: see :func:`parse_chat`.
    """
    given = _checked_fields(body, ("prompt", "max_tokens", "echo", "best_of", *_BOTH))
    prompt = given.get("prompt")
    if prompt is None:
        raise RequestError("prompt is missing: a text, a list of token ids, or a list of these is needed", "prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
    for each in prompts:
        is_ids = isinstance(each, list) and each and all(type(token) is int for token in each)
        if not (isinstance(each, str) or is_ids):
            raise RequestError(
                f"prompt={repr(each)}: a text, a list of token ids, or a list of these is needed", "prompt"
            )
    other = {"max_tokens": given.get("max_tokens", _COMPLETION_TOKENS)}
    if "logprobs" in given:
        other["logprobs"] = _count(given["logprobs"], "logprobs")
    return CompletionRequest(prompts=prompts, **_common(given, other))


def _checked_fields(body: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """The body without what is null or has no effect; raises for what is not known."""
    if not isinstance(body, Mapping):
        raise RequestError(f"the body is a JSON {type(body).__name__}; an object is needed")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            if name in _REFUSED:
                raise RequestError(
                    f"the field {name!r} is not supported: {_REFUSED[name]}", name, "unsupported_parameter"
                )
            raise RequestError(f"the field {name[:100]!r} is unknown here", name[:100], "unknown_parameter")
        if name in _ONLY and value not in _ONLY[name]:
            possible = ", ".join(map(repr, _ONLY[name]))
            raise RequestError(
                f"{name}={repr(value)} is not supported; it may be {possible}", name, "unsupported_value"
            )
        if name in _NOTES and not isinstance(value, str):
            raise RequestError(f"{name}={repr(value)}: a text is needed", name)
    return given


def _common(given: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Request`."""
    model, stream = given.get("model"), _switch(given, "stream")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"model={repr(model)}: a text is needed", "model")
    options = given.get("stream_options", {})
    if "stream_options" in given and not stream:
        raise RequestError("stream_options needs stream: true", "stream_options")
    if not isinstance(options, Mapping) or not options.keys() <= {"include_usage", "include_obfuscation"}:
        raise RequestError(f"stream_options={repr(options)}: only include_usage is known", "stream_options")
    if options.get("include_obfuscation"):
        raise RequestError("stream_options: include_obfuscation is not supported", "stream_options")
    include_usage = _switch(options, "include_usage")
    sampling = {name: given[name] for name in _SAMPLING if name in given} | dict(other)
    try:
        params = SamplingParams(**sampling)
    except UserError as error:
        at_fault = re.match(r"\w+", str(error))
        name = at_fault[0] if at_fault and at_fault[0] in sampling else None
        raise RequestError(str(error), name) from None
    return {"model": model, "params": params, "sampling": sampling, "stream": stream, "include_usage": include_usage}


def _switch(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = default if given.get(name) is None else given[name]
    if not isinstance(value, bool):
        raise RequestError(f"{name}={repr(value)}: true or false is needed", name)
    return value


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value <= MOST_LOGPROBS:
        raise RequestError(f"{name}={repr(value)}: an integer from 0 to {MOST_LOGPROBS} is needed", name)
    return value


def _schema(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that ``response_format`` asks for; None: any text will do."""
    asked = given.get("response_format", {"type": "text"})
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if kind == "text" and len(asked) == 1:
        return None
    if kind == "json_object" and len(asked) == 1:
        return {"type": "object"}
    if kind == "json_schema" and asked.keys() == {"type", "json_schema"}:
        inner = asked["json_schema"]
        known = {"name", "description", "schema", "strict"}  # an answer always has the schema, strict or not
        if isinstance(inner, Mapping) and inner.keys() <= known and isinstance(inner.get("schema"), dict):
            return inner["schema"]
    raise RequestError(
        f"response_format={repr(asked)}: {{'type': 'text'}}, {{'type': 'json_object'}} or "
        "{'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}} is needed",
        "response_format",
    )


def _either(choice: str, schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """The schema of answers beside calls, where the model may choose between them."""
    if schema is not None and choice != "auto":
        raise RequestError("response_format and a tool_choice that forces a call contradict each other", "tool_choice")
    return schema


def _tools(given: Mapping[str, Any]) -> tuple[Tool, ...]:
    asked = given.get("tools", [])
    if not isinstance(asked, list):
        raise RequestError(f"tools={repr(asked)}: a list is needed", "tools")
    try:
        tools = tuple(Tool.of(spec, f"tools[{number}]") for number, spec in enumerate(asked))
    except UserError as error:
        raise RequestError(str(error), "tools") from None
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("tools: a name stands twice", "tools")
    return tools


def _tool_choice(given: Mapping[str, Any], tools: tuple[Tool, ...]) -> str:
    """auto, none, required, or the name of the tool that has to be called."""
    asked = given.get("tool_choice", "auto")
    if "tool_choice" in given and asked != "none" and not tools:
        raise RequestError("tool_choice needs tools", "tool_choice")
    if isinstance(asked, str) and asked in ("auto", "none", "required"):
        return asked
    if isinstance(asked, Mapping) and asked.get("type") == "function" and isinstance(asked.get("function"), Mapping):
        name = asked["function"].get("name")
        if any(tool.name == name for tool in tools):
            return name
        raise RequestError(f"tool_choice names {repr(name)}, which is none of the tools", "tool_choice")
    raise RequestError(
        f"tool_choice={repr(asked)}: auto, none, required or {{'type': 'function', 'function': {{'name': ...}}}} is "
        "needed",
        "tool_choice",
    )


def _messages(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages, in the form that chat templates know."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is missing: a list of at least one message is needed", "messages")
    found, calls, results = [], {}, {}
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise RequestError(f"messages[{number}] is no object with role and content", "messages")
        message = dict(message)
        if message.get("role") == "developer":  # OpenAI's later name
            message["role"] = "system"
        if message.get("role") == "tool":
            results[_place_of_result(message, number, calls)] = message
            continue
        found += [results[place] for place in sorted(results)]
        calls, results = _calls_of(message, number), {}
        found.append(message)
    return found + [results[place] for place in sorted(results)]


def _calls_of(message: Mapping[str, Any], number: int) -> dict[str, tuple[int, str]]:
    """Of each call in a message, by its id: its place among them, and the name of the tool."""
    calls = message.get("tool_calls")
    found: dict[str, tuple[int, str]] = {}
    for place, call in enumerate(calls if isinstance(calls, list) else []):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"messages[{number}].tool_calls[{place}] has no function with a name", "messages")
        if not isinstance(call.get("id"), str) or call["id"] in found:
            raise RequestError(f"messages[{number}].tool_calls[{place}] has no id of its own", "messages")
        found[call["id"]] = place, function["name"]
    return found


def _place_of_result(message: dict[str, Any], number: int, calls: Mapping[str, tuple[int, str]]) -> int:
    """Which call a tool's message answers. Templates know results by their order alone: so the id is taken out."""
    name = message.pop("tool_call_id", None)
    if not isinstance(name, str) or name not in calls:
        raise RequestError(f"messages[{number}] answers no tool call before it: tool_call_id={repr(name)}", "messages")
    place, tool = calls[name]
    if message.pop("name", tool) != tool:
        raise RequestError(f"messages[{number}] has another name than the tool that was called, {tool!r}", "messages")
    return place
