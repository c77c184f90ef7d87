"""The engine: prompts in, answers out. Start at :mod:`qwen3vl_moe.engine.llm`.

The names below are imported when they are first used, as a process of another rank needs none of them, and so neither
tokenizers nor what reads pictures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3vl_moe.engine.llm import LLM
    from qwen3vl_moe.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from qwen3vl_moe.engine.params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "llm",
    "SamplingParams": "params",
    **dict.fromkeys(["CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"], "outputs"),
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
