"""What :class:`.LLM` is called with: told apart, counted, and refused by name where it is not built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.errors import OptionError, PromptError

# vLLM's arguments of chat and generate that are not built, with the way out.
_NOT_BUILT = {
    "lora_request": "merge the adapter into the checkpoint",
    "prompt_adapter_request": "merge the adapter into the checkpoint",
    "priority": "requests begin in their order",
    "guided_options_request": "check the answer, or allow tokens by allowed_token_ids",
    "tokenization_kwargs": "truncate_prompt_tokens is a sampling parameter, or give token ids",
    "mm_processor_kwargs": "a prompt's dict may hold it; in a message min_pixels and max_pixels stand beside the image",
    "chat_template": "chat_template.jinja lies in the checkpoint's directory",
    "chat_template_content_format": "messages are given to the template as it is written for them",
    "request_id": "outputs come in the order of the requests",
    "prompt_token_ids": "give them as prompts",
}


def only_given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def refuse_arguments(given: dict[str, Any]) -> None:
    for name in only_given(**given):
        reason = _NOT_BUILT.get(name)
        raise OptionError(f"unknown argument {name!r}" if reason is None else f"{name} is not supported: {reason}")


def listed(items: Any, kind: str) -> list:
    try:
        if not isinstance(items, str | bytes | Mapping):
            return list(items)
    except TypeError:  # nothing that can be gone through
        pass
    raise PromptError(f"a {kind} or a list of them is needed, got {type(items).__name__}")


def parse_options(given: dict[str, Any]) -> EngineOptions:
    unknown = sorted(set(given) - set(EngineOptions.__dataclass_fields__))
    if unknown:
        raise OptionError(
            f"unknown option {unknown[0]!r}; the engine has {', '.join(sorted(EngineOptions.__dataclass_fields__))}"
        )
    return EngineOptions(**given)


def one_params(params: Any, needed: str = "SamplingParams") -> SamplingParams:
    if params is None or isinstance(params, SamplingParams):
        return params or SamplingParams()
    raise OptionError(f"sampling_params: {needed} are needed, got {type(params).__name__}")


def params_per_item(params: Any, count: int, kind: str) -> list[SamplingParams]:
    if not isinstance(params, Iterable) or isinstance(params, str | bytes | Mapping):
        return [one_params(params, "SamplingParams or a list of them")] * count
    params = [one_params(each) for each in params]
    if len(params) != count:
        raise OptionError(f"{len(params)} sampling_params for {count} {kind}s: give one for all, or one for each")
    return params


def is_conversation(value: Any) -> bool:
    return _is_list_of(value, Mapping) and all("role" in message for message in value)


def is_prompt(value: Any) -> bool:
    return isinstance(value, str | Mapping) or _is_list_of(value, int)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, kind) for item in value)
