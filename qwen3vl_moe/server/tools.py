"""Calls of tools: which a client offers, and the grammars of answers that have to be one.

The form is Qwen's: ``<tool_call>``, a line of JSON with name and arguments, ``</tool_call>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr  # short, and never fails
from typing import Any

from qwen3vl_moe.engine.grammar import BEGINS
from qwen3vl_moe.errors import OptionError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: of the function.
        parameters: the JSON schema of its arguments.
        spec: all of it, as the chat template gets it.
    """

    name: str
    parameters: dict[str, Any]
    spec: dict[str, Any]

    @classmethod
    def of(cls, spec: Any, where: str) -> Tool:
        """From ``{"type": "function", "function": {"name", "description", "parameters"}}``.

        Raises:
            OptionError: it is no such thing.
        """
        function = spec.get("function") if isinstance(spec, Mapping) and spec.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise OptionError(f"{where}={repr(spec)}: {{'type': 'function', 'function': {{...}}}} is needed")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OptionError(f"{where} has the name {repr(name)}; up to 64 letters, digits, _, - and . are needed")
        if not isinstance(parameters, dict | None):
            raise OptionError(f"{where} has parameters of type {type(parameters).__name__}; a JSON schema is needed")
        unknown = function.keys() - {"name", "description", "parameters", "strict"}
        if unknown or not isinstance(function.get("strict"), bool | None):
            raise OptionError(
                f"{where} has {sorted(unknown) or 'strict'}; name, description, parameters are understood"
            )
        # "strict" asks for arguments that fit the schema, which forced calls do; templates show the whole of it.
        shown = {key: value for key, value in function.items() if key != "strict" and value is not None}
        return cls(name, parameters or {"type": "object"}, {"type": "function", "function": shown})


def form_of_calls(
    tools: Sequence[Tool], only: str | None, several: bool, or_json: dict[str, Any] | None
) -> dict[str, Any]:
    """``structured_outputs`` of an answer that calls tools.

    Args:
        tools: that may be called.
        only: the name of the one that has to be; None: any.
        several: whether there may be more than one call.
        or_json: the schema of an answer that calls none; None: it has to call one.
    """
    rules, chosen = [], [tool for tool in tools if only in (None, tool.name)]
    for number, tool in enumerate(chosen):
        head, tail = f'{OPEN}\n{{"name": {json.dumps(tool.name)}, "arguments": ', f"}}\n{CLOSE}"
        rules += [
            f"call{number}: {json.dumps(head)} arguments{number} {json.dumps(tail)}",
            f"arguments{number}: %json {json.dumps({'x-guidance': _COMPACT, **tool.parameters})}",
        ]
    call = "(" + " | ".join(f"call{number}" for number in range(len(chosen))) + ")"
    start = f'{call} ("\\n" {call})*' if several else call
    if or_json is not None:
        rules.append(f"said: %json {json.dumps({'x-guidance': _COMPACT, **or_json})}")
        start = f"said | {start}"
    return {"grammar": "\n".join([f"{BEGINS}answer: {start}", *rules])}
