"""Times a transformers Qwen3-VL-MoE text stack under each experts implementation, `tma_moe` among them.

    python scripts/bench_hf.py --json hf.json

A few decoder layers of the 30B widths with random weights, one forward without a cache, launched eagerly as a
transformers user would; the implementations take turns. Before that the hidden states at 450 tokens are compared with
those of the same model in float32: the error of `tma_moe` may be at most twice that of `eager`. Exit status: 0, 1 if it
is larger, 2 for a bad option or a machine that cannot run the kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from program import any_text


def fail(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def main(
    tokens: str = typer.Option("1,32,450,2048", help="Token counts, comma separated."),
    layers: int = typer.Option(4, min=1, help="Decoder layers; 1.2 GB each."),
    json_path: Path | None = typer.Option(None, "--json", help="Write all samples to this file."),
) -> None:
    """Times a transformers Qwen3-VL-MoE text stack under each experts implementation."""
    import torch  # slow to import: not before --help has been answered

    import tma_moe
    from benchmarking import hf_stack
    from benchmarking.moe import CudaTimer, parse_tokens

    try:
        counts = parse_tokens(tokens)
    except ValueError as error:
        raise fail(str(error)) from None
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise fail(f"cannot write {json_path}: the folder {json_path.resolve().parent} does not exist")
    reason = tma_moe.unavailable("cuda", torch.bfloat16)
    if reason is not None:
        raise fail(f"nothing to measure here: {reason}")
    results: dict[str, Any] = {}
    try:
        with torch.inference_mode():
            torch.manual_seed(0)
            model = hf_stack.text_stack(layers, hf_stack.WIDTHS, hf_stack.ROPE, "cuda", torch.bfloat16)
            hf_stack.run(model, counts, CudaTimer(samples=10), results=results)
    finally:  # what has been measured is shown and kept, whatever became of the rest
        if results.get("points"):
            if json_path is not None:
                json_path.write_text(json.dumps(results, indent=1) + "\n")
            hf_stack.console.print(hf_stack.table(results))
    found = ", ".join(f"{name} {error:.2e}" for name, error in results["errors"].items())
    hf_stack.console.print(f"error against float32 at {hf_stack.EAGER_TOKENS} tokens: {found}")
    if not results["correct"]:
        typer.echo("error: the error of tma_moe is more than twice that of eager", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    any_text()
    typer.run(main)
