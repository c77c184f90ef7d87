"""The LLM that a program measures: a checkpoint, or random weights of the same sizes (``--load-format dummy``).

Random weights need no download and make the same work per token; the answers are noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarking.random_weights import ROUTINGS, dummy_model
from benchmarking.tiny import write_processor_dir
from qwen3vl_moe import LLM, Qwen3VLMoeConfig
from qwen3vl_moe.engine.arguments import parse_options
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.engine.follower import start_ranks
from qwen3vl_moe.engine.replicas import start_replicas
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.inputs.processor import Processor
from qwen3vl_moe.weights import resolve
from qwen3vl_moe.weights.placement import parse_device, require_division

LOAD_FORMATS = ("auto", "dummy", "dummy-fp8")


def load_llm(
    model: str | None,
    *,
    load_format: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    moe: str = "auto",
    routing: str | None = None,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    **engine_options: Any,
) -> LLM:
    """Load a checkpoint, or make one of its sizes with random weights.

    Args:
        model: a checkpoint directory, a hub id, or "demo". With ``dummy`` its config and processor are taken, and it
            needs no weights; None then means the sizes of the 30B model and a small tokenizer made on the spot.
        load_format: ``"auto"``, or ``"dummy"`` as in vLLM: N(0, 0.02) weights. ``"dummy-fp8"``: experts and attention
            in block-scaled FP8, whatever the config says.
        device, dtype, moe, tensor_parallel_size, data_parallel_size: see :class:`LLM`. The number of ranks does not
            change the weights.
        routing: with ``dummy``, ``"balanced"``: a token's experts are drawn uniformly; ``"skewed"``: by Zipf's law;
            None: as the random router has it. Random towers make tokens alike, so left alone they crowd onto a few
            experts, which flatters every figure.
        engine_options: see :class:`LLM`.

    Raises:
        UserError: one of them cannot be used.
    """
    asked = dict(locals())
    asked |= asked.pop("engine_options")
    if load_format not in LOAD_FORMATS:
        raise OptionError(f"--load-format {load_format!r} is unknown; choose from {', '.join(LOAD_FORMATS)}")
    if load_format == "auto":
        if model is None:
            raise OptionError("give --model a checkpoint, or take random weights: --load-format dummy")
        sizes = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        return LLM(model, device=device, dtype=dtype, moe=moe, **sizes, **engine_options)
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
    require_division(config.text, tensor_parallel_size)
    options = parse_options(engine_options)
    replicas = start_replicas(f"{__name__}:load_llm", asked | {"device": place})
    arguments: dict[str, Any] = {
        "directory": None if model is None else str(directory),
        "fp8": load_format == "dummy-fp8",
        "dtype": dtype,
        "moe": moe,
        "routing": routing,
        "rows": options.max_prefill_tokens + (options.max_num_seqs or 512),
    }
    workers = start_ranks(
        tensor_parallel_size, place, arguments, options, loader=f"{dummy_model.__module__}:dummy_model"
    )
    arguments |= {"device": place, "config": config}
    with contextlib.nullcontext() if workers is None else workers.together(hold=False):
        weights = dummy_model(**arguments, **({} if workers is None else {"ranks": workers.ranks}))
    llm = LLM.from_parts(weights, processor, defaults, workers, replicas, **engine_options)
    llm.name = f"{Path(model).name}-dummy" if model else "Qwen3-VL-30B-A3B sizes"
    llm.random_weights = True
    return llm


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
