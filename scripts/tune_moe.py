"""Finds the fastest tiles of the fused MoE on this GPU and writes them where the op looks them up.

    python scripts/tune_moe.py                          # Qwen3-VL-30B-A3B
    python scripts/tune_moe.py --shape 8,2,4096,14336   # Mixtral
    python scripts/tune_moe.py --backend triton         # the portable kernels, also where the Hopper ones run

For every token count: the candidates of tile_search.py, compiled in parallel before anything is timed; the whole op
replayed from a CUDA graph over rotating weights; first the best tiles of the up product, then of the down product
beside it; then a run-off of the winners against the tiles in use. A winner must give the right result. Finished token
counts are kept in OUTPUT.partial: a run that was out of time (--max-seconds) goes on when it is started again.
Exit status: 0, 1 if the time was up before all token counts were done, 2 for a bad option or no GPU.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import typer

from program import any_text

# By backend: what is tuned unless told otherwise, and for how many seconds at most.
DEFAULT_TOKENS = {
    "tma": "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192",
    "triton": "1,4,16,64,128,256,512,1024,2048,8192",
}
DEFAULT_SECONDS = {"tma": 480.0, "triton": 170.0}
CONTRIBUTE = """Others with this card would be glad of the file: please send it. First
    pytest tests/kernels/test_tiles.py tests/kernels/test_codegen.py tests/kernels/test_portable_codegen.py
then open a pull request with the file, and in its text what these print (docs/add_a_gpu.md says more):
    python scripts/check.py
    python scripts/bench_moe.py --layers 4 --quick"""


def fail(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def main(
    shape: str = typer.Option("128,8,2048,768", help="E,K,H,I: experts, experts per token, hidden size, expert width."),
    dtype: str = typer.Option("bf16", help="Of the weights: bf16, or fp8 with block scales."),
    backend: str = typer.Option("auto", help="tma (Hopper), triton (all cards from 8.0 on), or the first that runs."),
    tokens: str | None = typer.Option(None, help="Token counts to tune; each serves calls up to its own size."),
    output: Path | None = typer.Option(None, help="Configuration file; by default in tma_moe/configs, by device name."),
    max_seconds: float | None = typer.Option(
        None, min=1.0, help="Stop after this long (tma: 480, triton: 170); start again to go on."
    ),
    jobs: int = typer.Option(os.cpu_count() or 1, min=1, help="Processes that compile."),
) -> None:
    """Finds the fastest tiles of the fused MoE on this GPU and writes them where the op looks them up."""
    import torch  # slow to import: not before --help has been answered
    import triton

    from benchmarking import tile_tuning
    from benchmarking.moe import CudaTimer, MoeShape, first_that_runs, parse_tokens
    from benchmarking.tile_output import check_output, config_path
    from tma_moe import tiles as tile_files
    from tma_moe.portable.rule import portable_choices_for
    from tma_moe.portable.targets import shared_memory
    from tma_moe.support import FP8_PRODUCTS

    started = time.monotonic()
    try:
        backend, reason = first_that_runs(backend)
        moe_shape, counts = MoeShape.parse(shape, dtype), parse_tokens(tokens or DEFAULT_TOKENS[backend])
    except ValueError as error:
        raise fail(str(error)) from None
    max_seconds = max_seconds or DEFAULT_SECONDS[backend]
    deadline = started + max_seconds
    if reason is not None:
        raise fail(f"nothing to tune here: {reason}")
    device, card = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    try:
        output = output or config_path(device, moe_shape.fp8, backend == "triton")
        check_output(output)
    except ValueError as error:
        raise fail(str(error)) from None
    rejected = tile_tuning.compile_all(moe_shape, counts, jobs, backend, card)
    with torch.inference_mode():
        torch.manual_seed(0)
        op = tile_tuning.GpuOp(moe_shape)
        if backend == "tma":
            current = tile_files.choices_for(device, triton.__version__, *op.sizes, fp8=moe_shape.fp8)
        else:
            of_card = card >= FP8_PRODUCTS, shared_memory(card)
            current = portable_choices_for(device, triton.__version__, op.sizes, moe_shape.fp8, *of_card)
        search = tile_tuning.Search(
            moe_shape, op, CudaTimer(samples=7, sample_us=1000.0), rejected, deadline, backend, card
        )
        try:
            rows, complete = tile_tuning.tune(search, counts, current, output, device)
        except ValueError as error:
            raise fail(str(error)) from None
    tile_tuning.console.print(tile_tuning.table(rows))
    tile_tuning.console.print(f"wrote {output}" if rows else "nothing finished, nothing written")
    if rows:
        tile_tuning.console.print(CONTRIBUTE, markup=False)
    if not complete:
        typer.echo(f"error: {max_seconds:.0f} s were not enough for all token counts: run again to go on", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    any_text()
    typer.run(main)
