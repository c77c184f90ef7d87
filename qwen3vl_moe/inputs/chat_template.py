"""A checkpoint's chat template: a conversation -> the text that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.errors import CheckpointError, ConfigError, OptionError, PromptError
from qwen3vl_moe.json_files import read_json_object


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    template: str | None,
    messages: list[dict],
    *,
    tools: Sequence[Any] | None,
    variables: Mapping[str, Any] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> str:
    """The text of a conversation, with one placeholder an image."""
    if template is None:
        raise PromptError(
            "the checkpoint has no chat template (chat_template.jinja, chat_template.json or chat_template in "
            "tokenizer_config.json); give a text prompt instead"
        )
    if continue_final_message and add_generation_prompt:
        raise OptionError(
            "continue_final_message goes on with the last message and add_generation_prompt begins another one; "
            "set add_generation_prompt=False"
        )
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise OptionError(
            f"continue_final_message needs a last message of the assistant's, this one has the role "
            f"{messages[-1]['role']!r}"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=None if tools is None else list(tools),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **(variables or {}),
        )
        assert isinstance(text, str)
        return text
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the checkpoint's chat template is damaged, line {error.lineno}: {error}") from None
    except Exception as error:
        raise PromptError(f"the chat template refuses the conversation: {error}") from None


def load_chat_template(directory: Path) -> str | None:
    """The first of the three places where checkpoints keep it; None if there is none."""
    plain = directory / "chat_template.jinja"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
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
