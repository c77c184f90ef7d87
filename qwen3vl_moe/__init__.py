"""Qwen3-VL-MoE: the model and its engine.

The names below are imported when they are first used, as torch and transformers take seconds to import: a program has
answered ``--help`` by then.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3vl_moe.config import Qwen3VLMoeConfig
    from qwen3vl_moe.engine import LLM, SamplingParams
    from qwen3vl_moe.weights import Qwen3VLMoe

__version__ = "0.1.0"  # the one place where it stands: pyproject.toml reads it here

__all__ = ["LLM", "Qwen3VLMoe", "Qwen3VLMoeConfig", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "qwen3vl_moe.engine",
    "Qwen3VLMoe": "qwen3vl_moe.weights",  # which gives it its ``from_pretrained``
    "Qwen3VLMoeConfig": "qwen3vl_moe.config",
    "SamplingParams": "qwen3vl_moe.engine",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
