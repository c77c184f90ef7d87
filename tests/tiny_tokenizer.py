"""A tiny processor directory for tests: see :mod:`qwen3vl_moe.tiny`, which also serves the program's first run."""

from qwen3vl_moe.tiny import SPECIAL_TOKENS, TokenIds, write_processor_dir

__all__ = ["SPECIAL_TOKENS", "TokenIds", "write_processor_dir"]
