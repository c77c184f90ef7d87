"""An engine around real or random weights, for the programs in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3vl_moe import LLM, Qwen3VLMoe, Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import resolve_moe
from qwen3vl_moe.params import GenerationDefaults
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
        load_format: "auto", or (as in vLLM) "dummy": N(0, 0.02) weights for the config and the tokenizer in the
            directory ``model``, which needs no weights. The work per token is the same, the text is noise.
        device, dtype, moe, options: as in :class:`LLM`.

    Raises:
        UserError: one of them cannot be used.
    """
    if load_format == "auto":
        return LLM(model, device=device, dtype=dtype, moe=moe, **options)
    if load_format != "dummy":
        raise OptionError(f"--load-format {load_format}: choose auto or dummy")
    import torch

    config = Qwen3VLMoeConfig.from_pretrained(model)
    processor = Processor.from_pretrained(model, config)
    defaults = GenerationDefaults.from_pretrained(model, processor.tokenizer.eos_token_id)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    working = config.dtype if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(working, torch.dtype):
        raise OptionError(f"--dtype {dtype}: choose auto, bfloat16, float16 or float32")
    weights = Qwen3VLMoe.random(config, torch.device(device), working, moe=resolve_moe(moe, device, working))
    llm = LLM.from_parts(weights, processor, defaults, **options)
    llm.name, llm.random_weights = f"{Path(model).name}-dummy", True
    return llm
