"""Times one fused MoE layer against torch's grouped_mm and the floor of the card.

    python scripts/bench_moe.py --json moe.json --plot moe.png

For every token count and routing, in one run and in turns: the op replayed from a CUDA graph, and launched eagerly
under the three descriptor policies with the host's time per op, beside a baseline of torch parts and, where "fused_moe"
is the Hopper kernels, beside the portable ones ("triton"); elsewhere "fused_moe" is these. The weights rotate,
so that L2 never holds them; data are random; every timed result is first compared with the op in float32, and a wrong
one makes the program fail. The floor uses the copy bandwidth and matrix rate measured at the start of the same run.
Exit status: 0, 1 if a result is wrong, 2 for a bad option or a machine that cannot run the kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from program import any_text

DEFAULT_TOKENS = "1,8,32,128,450,1024,2048,4096,8192,16384"
QUICK_TOKENS = "1,32,450,4096"


def fail(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def check_outputs(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.resolve().parent.is_dir():
            raise fail(f"cannot write {path}: the folder {path.resolve().parent} does not exist")


def report(results: dict[str, Any], json_path: Path | None, plot_path: Path | None) -> None:
    """Writes the files, prints the tables, and leaves with status 1 if any result was wrong."""
    from benchmarking import moe_layer

    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n")
    moe_layer.console.print(moe_layer.graph_table(results))
    moe_layer.console.print(moe_layer.eager_table(results))
    if plot_path is not None:
        from benchmarking.moe_plot import plot

        plot(results, plot_path)
    wrong = [f"{row['routing']} T={row['tokens']}" for row in results["points"] if not row["correct"]]
    if wrong:
        typer.echo(f"error: wrong results at {', '.join(wrong)}: see the error column", err=True)
        raise typer.Exit(1)


def main(
    tokens: str = typer.Option(DEFAULT_TOKENS, help="Token counts, comma separated."),
    shape: str = typer.Option("128,8,2048,768", help="E,K,H,I: experts, experts per token, hidden size, expert width."),
    dtype: str = typer.Option("bf16", help="Of the weights: bf16, or fp8 (with block scales; grouped_mm stays bf16)."),
    backend: str = typer.Option("auto", help="What fused_moe is: tma, triton, or the first of these that runs."),
    routing: str = typer.Option("uniform,zipf", help="Routings: uniform, zipf or both."),
    layers: int = typer.Option(48, min=4, help="Weight sets for the eager passes (30B model: 48, 1.2 GB each)."),
    samples: int = typer.Option(30, min=3, help="Samples of every candidate."),
    quick: bool = typer.Option(False, help=f"Only T = {QUICK_TOKENS}, 10 samples."),
    load: Path | None = typer.Option(None, help="Print and plot the results of this --json file; needs no GPU."),
    json_path: Path | None = typer.Option(None, "--json", help="Write everything measured, all samples, to this file."),
    plot_path: Path | None = typer.Option(None, "--plot", help="Write a PNG with time over tokens."),
) -> None:
    """Times one fused MoE layer against torch's grouped_mm and the floor of the card."""
    import torch  # slow to import: not before --help has been answered

    from benchmarking import moe_layer
    from benchmarking.moe import CudaTimer, MoeShape, first_that_runs, parse_tokens

    check_outputs(json_path, plot_path)
    if plot_path is not None:
        try:
            import matplotlib  # noqa: F401, a mistake should show before the measurement
        except ImportError:
            raise fail("--plot needs matplotlib: pip install matplotlib") from None
    if load is not None:
        from qwen3vl_moe.errors import UserError
        from qwen3vl_moe.json_files import read_json_object

        try:
            results = read_json_object(load, UserError)
            moe_layer.print_header(results)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise fail(f"--load {load}: not a results file of this program ({type(error).__name__}: {error})") from None
        report(results, None, plot_path)
        return
    try:
        moe_shape, counts = MoeShape.parse(shape, dtype), parse_tokens(QUICK_TOKENS if quick else tokens)
    except ValueError as error:
        raise fail(str(error)) from None
    routings = tuple(routing.split(","))
    if not set(routings) <= set(moe_layer.ROUTINGS):
        raise fail(f"--routing {routing!r}: choose uniform, zipf or uniform,zipf")
    try:
        backend, reason = first_that_runs(backend)
    except ValueError as error:
        raise fail(f"--backend: {error}") from None
    if reason is not None:
        raise fail(f"nothing to measure here: {reason}")
    per_layer = moe_shape.num_experts * moe_shape.expert_bytes(1 if moe_shape.fp8 else 2)
    needed, free = layers * per_layer, torch.cuda.mem_get_info()[0]
    if needed + 12 * 2**30 > free:
        raise fail(
            f"{layers} layers need {needed / 2**30:.0f} GiB and about 12 GiB beside them, but "
            f"{free / 2**30:.0f} GiB are free: pass a smaller --layers"
        )
    results = {}
    try:
        with torch.inference_mode():
            moe_layer.run(
                moe_shape,
                counts,
                routings,
                layers,
                CudaTimer(10 if quick else samples),
                backend=backend,
                results=results,
            )
    except BaseException:  # what has been measured is shown and kept
        if results.get("points"):
            report(results, json_path, None)
        raise
    report(results, json_path, plot_path)


if __name__ == "__main__":
    any_text()
    typer.run(main)
