"""Models with random weights for measurements: no download, the same work per token, answers that are noise."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from typing import Any

import torch
from torch import Tensor

from qwen3vl_moe.checkpoint import resolve
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine import LLM
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.placement import parse_device
from qwen3vl_moe.processor import Processor
from qwen3vl_moe.tiny import write_processor_dir

ROUTINGS = ("balanced", "skewed")


def dummy_llm(
    model: str | None = None, *, device: str, moe: str = "auto", routing: str | None = None, **engine_options: Any
) -> LLM:
    """An LLM with random weights.

    Args:
        model: checkpoint directory or hub id whose config and tokenizer are taken; None: the sizes of the 30B model
            and a small tokenizer made on the spot.
        device, moe: see :class:`LLM`.
        routing: ``"balanced"``: a token's experts are drawn uniformly; ``"skewed"``: by Zipf's law; None: as the random
            router has it. Random towers make tokens alike, so left alone they crowd onto a few experts, which
            flatters every figure.
        engine_options: see :class:`LLM`.

    Raises:
        CheckpointError: no such directory and no such hub id, or the tokenizer is missing.
        ConfigError: config.json asks for something that is not supported.
        OptionError: an unknown routing, a device that is not here or too small, or the 30B sizes on a CPU.
    """
    if routing is not None and routing not in ROUTINGS:
        raise OptionError(f"routing {routing!r} is unknown; choose from {', '.join(ROUTINGS)}")
    parsed = parse_device(device)
    if model is None and parsed.type == "cpu":
        raise OptionError("random weights at the 30B sizes need a GPU; on a CPU give the directory of a small --model")
    with contextlib.ExitStack() as stack:
        if model is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            config = _standin(directory)
        else:
            directory = resolve(model, weights=False)
            config = Qwen3VLMoeConfig.from_pretrained(directory)
        processor = Processor.from_pretrained(directory, config)
    weights = Qwen3VLMoe.random(config, parsed, moe=moe)
    if routing is not None:  # before the LLM captures its graphs
        rows = engine_options.get("max_prefill_tokens", 8192) + engine_options.get("max_num_seqs", 128)
        draw_routing(weights, routing, rows)
    llm = LLM.from_parts(weights, processor, **engine_options)
    llm.name, llm.random_weights = model or "Qwen3-VL-30B-A3B sizes", True
    return llm


def _standin(directory: str) -> Qwen3VLMoeConfig:
    """The published sizes over a tokenizer of a few hundred tokens, which is written into a directory."""
    ids = write_processor_dir(directory, vocab_size=151936, min_pixels=65536, max_pixels=1 << 24)
    return dataclasses.replace(
        Qwen3VLMoeConfig.qwen3_vl_30b_a3b(),
        image_token_id=ids.image,
        video_token_id=ids.video,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
    )


def draw_routing(model: Qwen3VLMoe, routing: str, rows: int) -> None:
    """Make every router of a model give drawn logits in place of its own, one draw per row of a step and layer.

    The k largest of Gumbel noise plus log p are a draw of k experts without replacement with probabilities p. Each
    router still makes its product; the draw is a view, which costs no launch and replays from a CUDA graph.
    """
    text = model.config.text
    shift = 61  # layers begin at different rows of one table
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows + shift * text.num_layers, text.num_experts, generator=generator)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))
    if routing == "skewed":
        gumbel -= torch.log(torch.randperm(text.num_experts, generator=generator) + 1.0)
    table = gumbel.to(model.device, model.dtype)

    def hook(first: int):
        def replaced(module: torch.nn.Module, inputs: tuple, logits_TE: Tensor) -> Tensor:
            return table[first : first + len(logits_TE)]

        return replaced

    for number, layer in enumerate(model.text.layers):
        layer.moe.router.register_forward_hook(hook(shift * number))
