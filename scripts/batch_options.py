"""The options of programs that answer batches; those of sampling and of the engine are in cli_options.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from batch_inputs import InputOptions

AllowPrivateHosts = Annotated[
    bool | None,
    typer.Option(
        "--allow-private-hosts/--no-private-hosts",
        help="Download images and videos from this machine and from private networks too. [default: not for --input]",
    ),
]
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


def answer_settings(given: dict[str, Any]) -> dict[str, Any]:
    """What the answers of a job depend on besides sampling, of a program's options: part of their fingerprints."""
    settings = {"model": given["model"], "max_pixels": given["max_pixels"]}
    return settings | {name: given[name] for name in ("min_pixels", "engine") if given[name] is not None}
