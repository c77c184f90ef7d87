"""The text of an answer, taken apart while it comes: reasoning, what is said, calls of tools.

Text that could be the beginning of a tag waits until it is known. A block between the tags of a call that is no call
(no JSON, no such form, never closed) is given as the text that it is: nothing of an answer gets lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from qwen3vl_moe.engine.grammar import END_THINK, THINK
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.json_files import parse_json
from qwen3vl_moe.server.tools import CLOSE, OPEN

Kind = Literal["reasoning", "content", "call"]
Reasons = Literal["at once", "tagged", "never"]  # see Parts


def reasons_of(template: str | None, prompt: str | None) -> Reasons:
    """Where the reasoning of an answer is.

    Args:
        template: the checkpoint's chat template.
        prompt: the text that is answered, as the template has made it.
    """
    if (prompt or "").rstrip().endswith(THINK):
        return "at once"
    return "tagged" if template is not None and THINK in template else "never"


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    Attributes:
        kind: what it is a piece of. A call is always whole.
        text: of the piece; of a call, its arguments as JSON.
        name: of the tool that is called.
    """

    kind: Kind
    text: str
    name: str = ""


class Parts:
    """Takes one answer apart.

    Args:
        reasons: "at once": the answer begins within its reasoning, as a template of a Thinking checkpoint has it;
            "tagged": only if it begins with ``<think>``; "never".
        calls: whether there may be calls of tools.
    """

    def __init__(self, reasons: Reasons = "never", calls: bool = False):
        self._calls, self._held = calls, ""
        self._state = {"at once": "reasoning", "tagged": "start", "never": "content"}[reasons]
        self._strips = reasons == "at once"  # whether space at the beginning of what waits belongs to a tag before it
        self._space = ""  # before the last tag
        self.called = False

    def push(self, text: str, last: bool = False) -> list[Part]:
        """The pieces that more text completes; with ``last``, all that is left."""
        self._held += text
        found: list[Part] = []
        while True:
            before = len(found), len(self._held), self._state
            self._step(found, last)
            if (len(found), len(self._held), self._state) == before:
                return _joined(found)

    def _step(self, found: list[Part], last: bool) -> None:
        if self._strips:
            self._held = self._held.lstrip()
            if not self._held:
                return
        if self._state == "start":
            begin = self._held.lstrip()
            if begin.startswith(THINK):
                self._held, self._state, self._strips = begin.removeprefix(THINK), "reasoning", True
            elif last or not THINK.startswith(begin):
                self._state = "content"
        elif self._state == "reasoning":
            if self._upto(END_THINK, "reasoning", found, last):
                self._state, self._strips = "content", True
        elif self._state == "content":
            if not self._calls:
                self._give("content", len(self._held), found)
            elif self._upto(OPEN, "content", found, last):
                self._state, self._strips = "call", False
        else:
            block, closed, rest = self._held.partition(CLOSE)
            if closed or last:
                call = _call(block) if closed else None
                self.called |= call is not None
                found.append(call or Part("content", self._space + OPEN + block + closed))
                self._held, self._state, self._strips = rest, "content", call is not None

    def _upto(self, tag: str, kind: Kind, found: list[Part], last: bool) -> bool:
        """Give what stands before a tag; whether the tag is there, and has been passed."""
        at = self._held.find(tag)
        if at >= 0:
            before, self._space = self._held[:at].rstrip(), self._held[len(self._held[:at].rstrip()) : at]
            self._held = self._held[at + len(tag) :]
            if before:
                found.append(Part(kind, before))
            return True
        self._give(kind, len(self._held) if last else len(self._held) - _waiting(self._held, tag), found)
        return False

    def _give(self, kind: Kind, count: int, found: list[Part]) -> None:
        if count:
            found.append(Part(kind, self._held[:count]))
            self._held, self._strips = self._held[count:], False


def _waiting(text: str, tag: str) -> int:
    """How many characters at the end of a text may belong to a tag that is not there yet, with the space before it."""
    length = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
    before = text[: len(text) - length]
    return length + len(before) - len(before.rstrip())


def _call(block: str) -> Part | None:
    """The call that a block holds, if it is one."""
    try:
        value = parse_json(block.strip())
    except (ValueError, UserError):
        return None
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"} or not isinstance(value["name"], str):
        return None
    if not isinstance(value["arguments"], dict):
        return None
    return Part("call", json.dumps(value["arguments"], ensure_ascii=False), value["name"])


def _joined(parts: list[Part]) -> list[Part]:
    """Neighbours of one kind made one; calls stay apart."""
    found: list[Part] = []
    for part in parts:
        if found and part.kind == found[-1].kind != "call":
            found[-1] = Part(part.kind, found[-1].text + part.text)
        else:
            found.append(part)
    return found
