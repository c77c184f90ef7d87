"""Where chat templates run: jinja's sandbox, with a budget of time and of text.

Jinja's own sandbox keeps a template from Python, but not from computing for ever: a loop within a loop, or a text that
doubles itself, is a program like any other, and a thread that runs it cannot be stopped from outside. So every step
asks whether it may go on: each turn of a loop, each call and filter, and everything of any size that the template
makes, before it is made where it may be far larger than its parts. What no chat template needs and what could grow in
other ways (``%`` on texts, ``str.format``, ``center``, ...) is not there.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 1.0  # of this thread on a core: a busy machine takes nothing away
MOST_CHARACTERS = 2**24  # of all that is made on the way; each value that is no text counts as 16
MOST_BITS = 4096  # of a product or power of integers

# fmt: off
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "sort",
    "string", "title", "trim", "unique", "upper",
)
_TEXT_METHODS = (
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
)
# fmt: on
_CONTAINERS = (list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView)
_CLOCK_EVERY = 64  # steps: reading the clock takes longer than a step


class _Budget:
    """What is left to one template."""

    __slots__ = ("characters", "steps", "until")

    def __init__(self) -> None:
        self.characters, self.steps, self.until = MOST_CHARACTERS, 0, time.thread_time() + MOST_SECONDS


_THREAD = threading.local()  # .left: the budget of the template that this thread is busy with


@contextmanager
def budget() -> Iterator[None]:
    """A budget for what this thread compiles or renders within."""
    _THREAD.left = _Budget()
    try:
        yield
    finally:
        del _THREAD.left


def _charge(characters: int) -> None:
    """Take one step that makes so many characters."""
    left: _Budget = _THREAD.left
    left.characters -= characters
    if left.characters < 0:
        raise jinja2.TemplateRuntimeError(f"it makes more than {MOST_CHARACTERS} characters")
    left.steps += 1
    if left.steps % _CLOCK_EVERY == 0 and time.thread_time() > left.until:
        raise jinja2.TemplateRuntimeError(f"it takes longer than {MOST_SECONDS:g} seconds")


def _charge_for(value: Any) -> Any:
    """Charge for a value with all that is in it: a list that holds another twice counts that one twice."""
    if isinstance(value, str):
        _charge(len(value))
        return value
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            _charge(len(part))
        elif isinstance(part, _CONTAINERS):
            _charge(16)
            pending.extend(part)
            if isinstance(part, Mapping):
                pending.extend(part.values())
        else:
            _charge(16)
    return value


def _metered(function: Callable) -> Callable:
    @functools.wraps(function)  # keeps jinja's mark of what is passed first
    def metered(*args: Any, **kwargs: Any) -> Any:
        return _charge_for(function(*args, **kwargs))

    return metered


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    s, old, new = str(s), str(old), str(new)
    _charge(len(s) + s.count(old) * len(new))
    return s.replace(old, new, -1 if count is None else count)


def _join(value: Any, d: Any = "") -> str:
    texts = list(map(str, _charge_for(list(value))))
    _charge(sum(map(len, texts)) + len(texts) * len(str(d)))
    return str(d).join(texts)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: jinja's own escapes what HTML would misunderstand."""
    widest = max(indent if isinstance(indent, int) else len(str(indent or "")), *map(len, separators or ("",)))
    if widest > 16:
        raise jinja2.TemplateRuntimeError("tojson: indent and separators have at most 16 characters here")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _charge_for(text)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@jinja2.pass_context  # so that it is not computed when the template is compiled
def _tick(_: Any, characters: int) -> str:
    _charge(16 + characters)
    return ""


class _Meters(NodeTransformer):
    """Puts the steps of a template that jinja has no hook for into calls of filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        characters = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        tick = nodes.Filter(nodes.Const(characters), "_tick", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None, lineno=node.lineno)

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return nodes.Filter(node, "_charge", [], [], None, None, lineno=node.lineno)

    visit_Dict = visit_Compare = visit_Test = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self.visit_List(node) if node.ctx == "load" else node  # else it is what a loop or set assigns to

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        if isinstance(node.arg, nodes.Slice):
            return self.visit_List(node)
        self.generic_visit(node)
        return node


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's tokens for training; here its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 -- as jinja declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_charge_for,
        )
        self.filters = {name: _metered(self.filters[name]) for name in _FILTERS}
        self.filters |= {"replace": _replace, "join": _join, "tojson": _to_json}
        self.filters |= {"_tick": _tick, "_charge": _charge_for}
        self.globals = {name: self.globals[name] for name in ("range", "namespace")} | {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Meters().visit(super()._parse(source, name, filename)).set_environment(self)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _TEXT_METHODS:
            return False
        return not isinstance(obj, int | float | bytes) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        return None  # format is no method of a text here

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            if function.__name__ == "join":
                function = functools.partial(_join, d=text)
            elif function.__name__ == "replace":
                function = functools.partial(_replace, text)
        return _charge_for(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise jinja2.TemplateRuntimeError("% with a text is not supported; use ~")
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        if operator == "+" and len(sizes) == 2:
            _charge(sum(sizes))
        elif operator == "*" and len(sizes) == 1:
            times = right if isinstance(right, int) else left
            _charge(sizes[0] * max(0, times if isinstance(times, int) else 0))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MOST_BITS:
                raise jinja2.TemplateRuntimeError(f"it makes a number of more than {MOST_BITS} bits")
        return super().call_binop(context, operator, left, right)


SANDBOX = _Sandbox()
