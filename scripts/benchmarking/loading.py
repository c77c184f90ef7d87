"""The LLM that a program measures: a checkpoint, or random weights of the same sizes (``--load-format dummy``).

Random weights need no download and make the same work per token; the answers are noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarking.tiny import write_processor_dir
from qwen3vl_moe import LLM, Qwen3VLMoe, Qwen3VLMoeConfig
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.inputs.processor import Processor
from qwen3vl_moe.weights import resolve
from qwen3vl_moe.weights.placement import parse_device, parse_dtype, require_memory, resolve_moe

LOAD_FORMATS = ("auto", "dummy", "dummy-fp8")
ROUTINGS = ("balanced", "skewed")


def load_llm(
    model: str | None,
    *,
    load_format: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    moe: str = "auto",
    routing: str | None = None,
    **engine_options: Any,
) -> LLM:
    """Load a checkpoint, or make one of its sizes with random weights.

    Args:
        model: a checkpoint directory, a hub id, or "demo". With ``dummy`` its config and processor are taken, and it
            needs no weights; None then means the sizes of the 30B model and a small tokenizer made on the spot.
        load_format: ``"auto"``, or ``"dummy"`` as in vLLM: N(0, 0.02) weights. ``"dummy-fp8"``: experts and attention
            in block-scaled FP8, whatever the config says.
        device, dtype, moe: see :class:`LLM`.
        routing: with ``dummy``, ``"balanced"``: a token's experts are drawn uniformly; ``"skewed"``: by Zipf's law;
            None: as the random router has it. Random towers make tokens alike, so left alone they crowd onto a few
            experts, which flatters every figure.
        engine_options: see :class:`LLM`.

    Raises:
        UserError: one of them cannot be used.
    """
    if load_format not in LOAD_FORMATS:
        raise OptionError(f"--load-format {load_format!r} is unknown; choose from {', '.join(LOAD_FORMATS)}")
    if load_format == "auto":
        if model is None:
            raise OptionError("give --model a checkpoint, or take random weights: --load-format dummy")
        return LLM(model, device=device, dtype=dtype, moe=moe, **engine_options)
    if routing is not None and routing not in ROUTINGS:
        raise OptionError(f"--routing {routing!r} is unknown; choose from {', '.join(ROUTINGS)}")
    place = parse_device(device)
    if model is None and place.type == "cpu":
        raise OptionError("random weights at the 30B sizes need a GPU; on a CPU give the directory of a small --model")
    with contextlib.ExitStack() as stack:
        if model is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = _standin(directory)
        else:
            directory = resolve(model, weights=False)
            config = Qwen3VLMoeConfig.from_pretrained(directory)
        processor = Processor.from_pretrained(directory, config, resize_on_device=place.type == "cuda")
        defaults = GenerationDefaults.from_pretrained(directory, processor.eos_token_id)
    if load_format == "dummy-fp8":
        config = in_fp8(config)
    weights = random_model(config, place, parse_dtype(dtype, config.dtype), moe=moe)
    if routing is not None:  # before the LLM captures its graphs
        rows = engine_options.get("max_prefill_tokens", 8192) + (engine_options.get("max_num_seqs") or 512)
        draw_routing(weights, routing, rows)
    llm = LLM.from_parts(weights, processor, defaults, **engine_options)
    llm.name = f"{Path(model).name}-dummy" if model else "Qwen3-VL-30B-A3B sizes"
    llm.random_weights = True
    return llm


def in_fp8(config: Qwen3VLMoeConfig) -> Qwen3VLMoeConfig:
    """The same model with the attention products and experts of all layers in block-scaled FP8."""
    layers = frozenset(range(config.text.num_layers))
    return dataclasses.replace(config, text=dataclasses.replace(config.text, fp8_attention=layers, fp8_experts=layers))


def random_model(
    config: Qwen3VLMoeConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    moe: str = "auto",
) -> Qwen3VLMoe:
    """Random weights of any size, made on the device: N(0, 0.02) matrices, norms at 1, biases at 0.

    Those in FP8 are N(0, 100), with scales around 0.0002.

    Raises:
        OptionError: an unknown or unavailable device or moe; not enough memory.
    """
    device, dtype = parse_device(device), dtype or config.dtype
    with torch.device("meta"):
        model = Qwen3VLMoe(config, resolve_moe(moe, device, dtype, config.text)).set_dtype(dtype)
    require_memory(device, sum(parameter.nbytes for parameter in model.parameters()), "a model of this size", dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float8_e4m3fn:
            for rows in parameter.flatten(0, -2).split(1 << 14):  # N(0, 100) of FP8, piece by piece
                drawn = torch.randn(rows.shape, device=device, dtype=torch.bfloat16, generator=generator)
                rows.copy_(drawn.mul_(100).clamp_(-448, 448))  # beyond that lies no number, and copy_ makes it NaN
        elif name.endswith("scale"):
            parameter.uniform_(1.5e-4, 2.5e-4, generator=generator)
        elif name.endswith(".bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return model


def _standin(directory: Path) -> Qwen3VLMoeConfig:
    """The published sizes over a tokenizer of a few hundred tokens, which is written into a directory."""
    ids = write_processor_dir(
        directory, vocab_size=151936, min_pixels=65536, max_pixels=1 << 24, video_pixels=(4096, 25165824)
    )
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
