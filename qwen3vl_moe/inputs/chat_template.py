"""A checkpoint's chat template: a conversation -> the text that the model reads.

A template is a program that somebody else wrote. It runs in jinja's sandbox, with the names that transformers gives it,
and within a budget (:mod:`.template_sandbox`); whatever it raises becomes one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from transformers.utils.chat_template_utils import get_json_schema

from qwen3vl_moe.errors import CheckpointError, ConfigError, OptionError, PromptError
from qwen3vl_moe.inputs.messages import plain_json
from qwen3vl_moe.inputs.template_sandbox import SANDBOX, budget
from qwen3vl_moe.json_files import read_json_object

MAX_TEMPLATE_BYTES = 2**16  # published ones have less than 20,000

# Variables of a template that are arguments of chat() themselves, or not for a caller to set.
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # its space tells whether the template strips the ends of messages


class ChatTemplate:
    """A template, compiled when it is first needed: a damaged one does not stop prompts that do without.

    Args:
        source: of the template, in jinja's language.
        constants: the tokenizer's special tokens by role, such as ``eos_token``, which a template may name.
    """

    def __init__(self, source: str, constants: Mapping[str, Any]):
        self.source, self._constants = source, constants

    def __reduce__(self) -> tuple[Any, ...]:  # for another process; what jinja has compiled cannot be sent
        return ChatTemplate, (self.source, self._constants)

    @cached_property
    def _parts(self) -> tuple[jinja2.Template, frozenset[str], frozenset[str]]:
        """The compiled template, the variables that it reads, and every name that it looks up or compares with."""
        if len(self.source) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"the checkpoint's chat template has more than {MAX_TEMPLATE_BYTES} characters")
        try:
            with budget():
                tree, template = SANDBOX.parse(self.source), SANDBOX.from_string(self.source)
                variables = jinja2.meta.find_undeclared_variables(tree) - SANDBOX.globals.keys()
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the checkpoint's chat template is damaged, line {error.lineno}: {error}") from None
        except Exception as error:
            raise CheckpointError(f"the checkpoint's chat template cannot be compiled: {_reason(error)}") from None
        names = {node.attr for node in tree.find_all(nodes.Getattr)}
        names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return template, frozenset(variables), frozenset(names)

    @property
    def names(self) -> frozenset[str]:
        """Keys of messages that the template may read."""
        return self._parts[2]

    def render(
        self,
        messages: list[dict],
        vision_tokens: Sequence[str],
        *,
        tools: Sequence[Any] | None,
        variables: Mapping[str, Any] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> str:
        """The text of a conversation, with one placeholder an image; for the arguments see :meth:`.Processor.chat`.

        Args:
            messages: as :func:`.messages.split_media` returns them.
            vision_tokens: tokens that tools and variables must not spell.
        """
        template, known, _ = self._parts
        given = _checked_variables(tools, variables, known, vision_tokens)
        if continue_final_message:
            messages = _marked(messages, add_generation_prompt)
        try:
            with budget():
                text = template.render(
                    **{**self._constants, **given}, messages=messages, add_generation_prompt=add_generation_prompt
                )
        except Exception as error:
            raise PromptError(f"the chat template refuses the conversation: {_reason(error)}") from None
        return _cut(text) if continue_final_message else text


def load_chat_template(directory: Path) -> str | None:
    """The first of the three places where checkpoints keep it; None if there is none.

    Raises:
        ConfigError: its file cannot be read, is no text, or is larger than ``MAX_TEMPLATE_BYTES``.
    """
    plain = directory / "chat_template.jinja"
    if plain.is_file():
        try:
            if plain.stat().st_size <= MAX_TEMPLATE_BYTES:
                return plain.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{plain} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{plain} is not UTF-8 text: {error.reason} at byte {error.start}") from None
        raise ConfigError(f"{plain} has {plain.stat().st_size} bytes; a template has at most {MAX_TEMPLATE_BYTES}")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        template = read_json_object(path, ConfigError).get("chat_template") if path.is_file() else None
        if isinstance(template, str):
            return template
        if template is not None:
            raise ConfigError(
                f"{path}: chat_template is a {type(template).__name__}; only a single template is supported"
            )
    return None


def _checked_variables(
    tools: Any, variables: Any, known: frozenset[str], vision_tokens: Sequence[str]
) -> dict[str, Any]:
    """Tools and variables as JSON; one that the template never reads would be dropped in silence."""
    if variables is not None and not isinstance(variables, Mapping):
        raise OptionError(f"chat_template_kwargs is a {type(variables).__name__}; a dict is needed")
    given = {name: value for name, value in (variables or {}).items() if value is not None}
    for name in given:
        if name in _OWN_VARIABLES:
            raise OptionError(f"chat_template_kwargs has {name!r}, which is an argument of its own")
    if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
        raise OptionError(f"tools is a {type(tools).__name__}; a list of JSON schemas or functions is needed")
    if tools:
        given["tools"] = [_tool_schema(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    for name in given:
        if name not in known:
            readable = sorted(known - {"messages", "add_generation_prompt"})
            raise OptionError(
                f"the chat template does not read {name!r}; it reads {', '.join(readable) or 'nothing but messages'}"
            )
    # Templates ask `if tools`, and `is none`, so both names exist as in transformers.
    return {"tools": None, "documents": None, **{n: plain_json(v, str(n), vision_tokens) for n, v in given.items()}}


def _tool_schema(tool: Any, where: str) -> Any:
    if isinstance(tool, Mapping):
        return tool
    if not callable(tool):
        raise OptionError(f"{where} is a {type(tool).__name__}; a JSON schema (a dict) or a function is needed")
    try:
        return get_json_schema(tool)
    except Exception as error:  # it has no docstring, or a type without a schema
        raise OptionError(f"{where} does not become a JSON schema: {error}") from None


def _marked(messages: list[dict], add_generation_prompt: bool) -> list[dict]:
    """The conversation with a tag at the end of its last text, where the rendered text will be cut."""
    if add_generation_prompt:
        raise OptionError(
            "continue_final_message goes on with the last message and add_generation_prompt begins another one; "
            "set add_generation_prompt=False"
        )
    *before, last = messages
    if last["role"] != "assistant":
        raise OptionError(
            f"continue_final_message needs a last message of the assistant's; this one has the role {last['role']!r}"
        )
    content = last["content"]
    if isinstance(content, str):
        return [*before, {**last, "content": content + _TAG}]
    if not content or content[-1]["type"] != "text":
        raise OptionError("continue_final_message needs a last message that ends with text")
    *items, text = content
    return [*before, {**last, "content": [*items, {**text, "text": text["text"] + _TAG}]}]


def _cut(text: str) -> str:
    """``text`` up to the tag. A template that strips messages has taken its space: then it strips the text too."""
    before, found, after = text.rpartition(_TAG.strip())
    if not found:
        raise PromptError("continue_final_message: the chat template leaves out the end of the last message")
    return before if after.startswith(_TAG[-1]) else before.rstrip()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
