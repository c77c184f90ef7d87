"""An engine around real or random weights, for the programs in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3vl_moe import LLM, Qwen3VLMoe, Qwen3VLMoeConfig
from qwen3vl_moe.checkpoint import resolve
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.params import GenerationDefaults
from qwen3vl_moe.placement import parse_dtype
from qwen3vl_moe.processor import Processor


def load(
    model: str,
    *,
    load_format: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    moe: str = "auto",
    **options: Any,
) -> LLM:
    """Load a checkpoint, or its sizes with random weights.

    Args:
        model: a checkpoint directory, a hub id, or "demo".
        load_format: "auto", or (as in vLLM) "dummy": N(0, 0.02) weights for the config and the tokenizer of ``model``;
            a directory needs no weights then. The work per token is the same, the text is noise.
        device, dtype, moe, options: as in :class:`LLM`.

    Raises:
        UserError: one of them cannot be used.
    """
    if load_format == "auto":
        return LLM(model, device=device, dtype=dtype, moe=moe, **options)
    if load_format != "dummy":
        raise OptionError(f"--load-format {load_format}: choose auto or dummy")
    directory = resolve(model, weights=False)
    config = Qwen3VLMoeConfig.from_pretrained(directory)
    processor = Processor.from_pretrained(directory, config)
    defaults = GenerationDefaults.from_pretrained(directory, processor.tokenizer.eos_token_id)
    weights = Qwen3VLMoe.random(config, device, parse_dtype(dtype, config.dtype), moe=moe)
    llm = LLM.from_parts(weights, processor, defaults, **options)
    llm.name, llm.random_weights = f"{Path(model).name}-dummy", True
    return llm
