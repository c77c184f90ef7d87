"""The options that programs share, and what becomes of them: sampling, engine, random weights, what may be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3vl_moe.errors import OptionError

_MODEL = typer.Option(help="Checkpoint directory, hub id, or 'demo'.")
Model = Annotated[str, _MODEL]
ModelOrSizes = Annotated[str | None, _MODEL]  # of programs that take the 30B sizes without one
Images = Annotated[list[str] | None, typer.Option(help="Image file or URL, before the text; repeatable.")]
Videos = Annotated[list[str] | None, typer.Option(help="Video file or URL, after the images; repeatable.")]
Fps = Annotated[float | None, typer.Option(help="Frames taken of a video's second. [default: the checkpoint's]")]
System = Annotated[str | None, typer.Option(help="A system message, before all else.")]

MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. [default: the checkpoint's]")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest tokens that make up this share.")]
TopK = Annotated[int | None, typer.Option(help="Only so many of the likeliest tokens; 0: all.")]
MinP = Annotated[float | None, typer.Option(help="Only tokens at least this part as likely as the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: tokens of prompt and answer less likely.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Above 0: tokens of the answer less likely.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="The same, for each time that they are in it.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; repeatable.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]
Sampling = Annotated[
    str | None,
    typer.Option(help='Other sampling parameters, as JSON: \'{"min_tokens": 5, "logit_bias": {"11": -5}}\'.'),
]

Device = Annotated[str, typer.Option(help="auto, cuda, cuda:1, cpu.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")]
Moe = Annotated[str, typer.Option(help="Experts: tma (Hopper), triton (GPUs), reference, auto.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Most requests in a step. [default: by the cache]")]
MaxPrefillTokens = Annotated[int | None, typer.Option(help="Most prompt tokens in a step. [default: 8192]")]
GpuMemoryUtilization = Annotated[float | None, typer.Option(help="Part of the GPU's memory to use. [default: 0.9]")]
KvCacheDtype = Annotated[str, typer.Option(help="auto, or fp8: twice the tokens in the cache.")]
TensorParallelSize = Annotated[int, typer.Option(help="Divide every layer among so many GPUs.")]
DataParallelSize = Annotated[int, typer.Option(help="Answer requests by so many engines, on GPUs of their own.")]
OneEngine = Annotated[int, typer.Option("--data-parallel-size", hidden=True)]  # of programs that drive one engine
MinPixels = Annotated[int | None, typer.Option(help="Enlarge smaller images to this many pixels.")]
MaxPixels = Annotated[int | None, typer.Option(help="Resize larger images to this many pixels.")]
Eager = Annotated[bool, typer.Option(help="Make no CUDA graphs: ready sooner, slower afterwards.")]
ExpertLayout = Annotated[str | None, typer.Option(help="published or transformers5, if the checkpoint asks.")]
Engine = Annotated[str | None, typer.Option(help="Other options of LLM(...), as JSON: '{\"block_size\": 32}'.")]

LoadFormat = Annotated[str, typer.Option(help="auto; dummy or dummy-fp8: random weights.")]
LoadFormatOrSizes = Annotated[
    str, typer.Option(help="auto; dummy or dummy-fp8: random weights, of the 30B sizes without --model.")
]
Routing = Annotated[str, typer.Option(help="With dummy: balanced or skewed choice of experts.")]

MediaRoot = Annotated[
    Path | None, typer.Option(help="Read images and videos from this directory and those in it alone.")
]
AllowHosts = Annotated[
    str | None,
    typer.Option(
        help="Download images and videos from these hosts alone: names with commas between them, .example.org for all "
        "below it; '' for none."
    ),
]

_SAMPLING = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_ENGINE = (
    *("device", "dtype", "moe", "max_model_len", "max_num_seqs", "max_prefill_tokens", "gpu_memory_utilization"),
    *("kv_cache_dtype", "tensor_parallel_size", "data_parallel_size", "min_pixels", "max_pixels", "expert_layout"),
)

_MEDIA = ("media_root", "allow_hosts", "allow_private_hosts")


def sampling_params(given: dict[str, Any], *, one_answer: bool = False) -> Any:
    """The :class:`SamplingParams` of a program's options; ``given`` is the ``locals()`` of its main.

    Args:
        one_answer: the program shows one answer a question.

    Raises:
        OptionError: a value is outside of what is possible, --sampling is no JSON object or names an option again, or
            several answers are asked for where one is shown.
    """
    from qwen3vl_moe.engine import SamplingParams  # slow to import: not before --help has been answered

    named = {name: given[name] for name in _SAMPLING if given[name] is not None and given[name] != []}
    params = SamplingParams(**named, **_more("--sampling", given["sampling"], named))
    if one_answer:
        if params.n > 1:
            raise OptionError(f"n={params.n}: one answer is shown here; a file of requests takes several (--input)")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(params, name) is not None:
                raise OptionError(f"{name}={getattr(params, name)}: only the answer is shown here; LLM.chat gives them")
        if not params.detokenize:
            raise OptionError("detokenize=False: an answer is shown as text here")
    return params


def engine_options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`LLM` among a program's options, but for the model and what may be read.

    Raises:
        OptionError: --engine is no JSON object, or names something that another option says.
    """
    named = {name: given[name] for name in _ENGINE if given.get(name) is not None}
    if given.get("eager"):
        named["enforce_eager"] = True
    more = _more("--engine", given.get("engine"), named)
    if elsewhere := sorted(more.keys() & {"model", "device", *_MEDIA}):
        raise OptionError(f"--engine says {elsewhere[0]}, which this program has options of its own for")
    return named | more


def require_one_engine(data_parallel_size: int, instead: str) -> None:
    """Refuse several engines where one is driven step by step.

    Raises:
        OptionError: there are to be several.
    """
    if data_parallel_size != 1:
        raise OptionError(f"--data-parallel-size {data_parallel_size}: this program drives one engine; {instead}")


def media_limits(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`LLM` that limit what is read as an image or video."""
    hosts = given["allow_hosts"]
    return {
        "media_root": given["media_root"],
        "allow_hosts": None if hosts is None else [name for name in hosts.split(",") if name.strip()],
        "allow_private_hosts": given["allow_private_hosts"],
    }


def _more(option: str, text: str | None, named: dict[str, Any]) -> dict[str, Any]:
    """What JSON adds to the options that have names of their own."""
    if text is None:
        return {}
    try:
        more = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{option} {text!r} is no JSON ({error})") from None
    if not isinstance(more, dict):
        raise OptionError(f'{option} {text!r}: a JSON object such as {{"name": value}} is needed')
    if twice := sorted(more.keys() & named.keys()):
        raise OptionError(f"{option} says {twice[0]}, for which there is --{twice[0].replace('_', '-')}: name one")
    if "self" in more:  # of the classes that take the rest by its name
        raise OptionError(f"{option} says self, which is no option")
    return more
