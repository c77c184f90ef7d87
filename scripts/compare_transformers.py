"""Are our logits right in bf16? Ours and transformers' beside an fp32 evaluation of the same weights.

    python scripts/compare_transformers.py --model DIR --image cat.jpg --prompt "What is this?"
    python scripts/compare_transformers.py --load-format dummy     # 30B sizes, random weights: needs 80 GB

Both models share one copy of the weights. An answer counts as right if its error against the fp32 evaluation is at most
twice that of transformers in the same dtype. Exit status 1 if one is not.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

import cli_options as cli
from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def main(
    model: cli.ModelOrSizes = None,
    load_format: str = typer.Option("auto", help="auto, or dummy: random weights at the 30B sizes."),
    prompt: str = typer.Option("Describe what you see, and count from one to twenty.", help="Text of the prompt."),
    image: Path | None = typer.Option(None, help="An image for the second prompt (with a real checkpoint)."),
    video: Path | None = typer.Option(None, help="A video for a third prompt (with a real checkpoint)."),
    device: cli.Device = "auto",
    dtype: str = typer.Option("bfloat16", help="bfloat16 or float16: what is judged."),
    moe: str = typer.Option("auto", help="Comma-separated: tma, triton, reference, auto."),
    layers: int | None = typer.Option(None, help="Fewer decoder layers (with dummy)."),
    json_file: Path | None = typer.Option(None, "--json", help="Write the figures here."),
) -> None:
    """Compare our logits and transformers' with an fp32 evaluation of the same weights."""
    import torch  # slow to import: not before --help has been answered

    from benchmarking.against_transformers import compare
    from benchmarking.loading import LOAD_FORMATS
    from benchmarking.random_weights import in_fp8
    from benchmarking.transformers_twin import require_16_bits
    from qwen3vl_moe.config import Qwen3VLMoeConfig
    from qwen3vl_moe.weights.placement import parse_device

    try:
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise OptionError(f"--json {json_file}: there is no directory {json_file.parent}")
        if load_format not in LOAD_FORMATS:
            raise OptionError(f"--load-format {load_format!r} is unknown; choose from {', '.join(LOAD_FORMATS)}")
        if (model is None) == (load_format == "auto"):
            raise OptionError("give --model a checkpoint, or take random weights at the 30B sizes: --load-format dummy")
        if load_format == "dummy-fp8":
            require_16_bits(in_fp8(Qwen3VLMoeConfig.qwen3_vl_30b_a3b()))
        rows = compare(model, prompt, image, video, parse_device(device), getattr(torch, dtype, None), moe, layers)
    except (UserError, RuntimeError) as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    table = Table("prompt", "model", "relative error", "largest / scale", "mean KL", "top-1", "verdict")
    for row in rows:
        numbers = (f"{row['relative']:.3e}", f"{row['largest']:.3e}", f"{row['kl']:.2e}", f"{row['top1']:.1%}")
        table.add_row(row["prompt"], row["model"], *numbers, row["verdict"])
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=2))
    if any(row["verdict"] == "WRONG" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    any_text()
    typer.run(main)
