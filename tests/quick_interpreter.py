"""A plugin of pytest for the interpreter's process: Triton prepares its language once a launch, not once a call.

The interpreter replaces the functions of `triton.language` by its own when a kernel is launched, and again whenever the
kernel calls another function, of which there are fifty thousand calls in these tests. Each time it looks through all
members of five modules and classes, and finds nothing that is left to replace: a quarter of all its time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


class Launch:
    """What is prepared while a launch runs; `restore` ends that, as the interpreter expects of its own scope."""

    def __init__(self, prepare: Callable[[FunctionType], Any]):
        self.prepare = prepare
        self.scope: Any = None
        self.modules: frozenset[str] = frozenset()

    def enter(self, function: FunctionType) -> Launch:
        modules = modules_of(function)
        if self.scope is None:
            self.scope, self.modules = self.prepare(function), modules
        elif not modules <= self.modules:
            self.prepare(function)  # which the interpreter leaves to the launch to restore
            self.modules |= modules
        return self

    def restore(self) -> None:
        self.scope.restore()
        self.scope, self.modules = None, frozenset()


@functools.cache
def modules_of(function: FunctionType) -> frozenset[str]:
    """Those that the interpreter prepares for a function, by name."""
    return frozenset(module.__name__ for module in function.__globals__.values() if module is tl or module is tl.core)


def numpy_dtypes(ask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What the interpreter makes of a type, which it finds out anew for every operation, by the type of an element."""
    known: dict[str, Any] = {}

    def numpy_dtype(type_: Any) -> Any:
        element = type_.scalar
        if element.name not in known:
            known[element.name] = ask(element)
        return known[element.name]

    return numpy_dtype


def pytest_configure(config: pytest.Config) -> None:
    interpreter._patch_lang = Launch(interpreter._patch_lang).enter
    interpreter._get_np_dtype = numpy_dtypes(interpreter._get_np_dtype)
