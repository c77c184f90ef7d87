"""Options that several programs share, so that they mean and say the same in each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from batch_inputs import InputOptions

# Of the model and of sampling.
Model = Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'demo'.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. [default: the checkpoint's]")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:1, cpu.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")]
Moe = Annotated[str, typer.Option(help="Experts: tma (Hopper), reference (anywhere), auto.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")]
KVCacheDtype = Annotated[str, typer.Option(help="auto, or fp8: twice the tokens in the cache.")]
MaxPixels = Annotated[int | None, typer.Option(help="Resize larger images to this many pixels.")]
ExpertLayout = Annotated[str | None, typer.Option(help="published or transformers5, if the checkpoint asks.")]

# Of what requests may read.
MediaRoot = Annotated[Path | None, typer.Option(help="Read image files from this directory and those in it alone.")]
AllowHosts = Annotated[
    str | None,
    typer.Option(
        help="Download images from these hosts alone: names with commas between them, .example.org for all below it; "
        "'' for none."
    ),
]
AllowPrivateHosts = Annotated[
    bool | None,
    typer.Option(
        "--allow-private-hosts/--no-private-hosts",
        help="Download images from this machine and from private networks too. [default: not for --input]",
    ),
]

# Of batches.
PromptColumn = Annotated[
    str | None, typer.Option(help='Column of parquet or tars that holds the prompts. [default: "prompt"]')
]
ImageColumn = Annotated[
    str | None,
    typer.Option(help='Column of images: bytes, paths or URLs. [default: "image" or "images"; of tars, all images]'),
]
IdColumn = Annotated[str | None, typer.Option(help='Column of ids of a parquet file. [default: "id"]')]
KeepInput = Annotated[
    bool,
    typer.Option(
        "--keep-input",
        help='JSON lines: keep each line\'s keys beside its answer, as "input", and unknown keys too. (Of other kinds '
        "of input all columns are kept.)",
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(help="Leave a column of the input out of the output, such as the bytes of images; repeatable."),
]
Prefix = Annotated[str, typer.Option(help="Begins the names of the answers' columns in a parquet file.")]
ServedModelName = Annotated[
    str | None, typer.Option(help="The name of the model in OpenAI's batch format. [default: --model]")
]


def media_limits(media_root: Path | None, allow_hosts: str | None, allow_private_hosts: bool) -> dict[str, Any]:
    """What of :class:`LLM`'s options these are."""
    hosts = None if allow_hosts is None else [name for name in allow_hosts.split(",") if name.strip()]
    return {"media_root": media_root, "allow_hosts": hosts, "allow_private_hosts": allow_private_hosts}


def input_options(
    model: str,
    prompt: str | None,
    prompt_column: str | None,
    image_column: str | None,
    id_column: str | None,
    keep_input: bool,
    drop: list[str] | None,
    served_model_name: str | None,
) -> InputOptions:
    from batch_inputs import InputOptions  # slow to import: not before --help has been answered

    names = (model, Path(model).name) if served_model_name is None else (served_model_name,)
    columns = prompt_column, image_column, id_column
    return InputOptions(prompt, *columns, keep_input, tuple(drop or ()), names, served_model_name)
