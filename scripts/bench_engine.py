"""How fast is the engine on this card? Time to first token, decode steps, prefill, vision, beside their floors.

    python scripts/bench_engine.py --load-format dummy             # the 30B sizes, random weights: needs an 80 GB card
    python scripts/bench_engine.py --load-format dummy --profile   # and where the time of each step goes
    python scripts/bench_engine.py --model demo --quick            # anywhere; tries the program out

Steps go through the engine as a user's request does: their time includes scheduling, packing, sampling and
detokenising (the vision tower alone is called without the scheduler). Medians of warm runs. Random weights choose their
experts by a balanced draw (--routing), since a random router crowds tokens onto a few, which flatters every figure; how
many experts a layer reads in the timed steps is printed beside each figure.

Host rows: what a decode step costs the host, the time that it waits for the device left out. As long as that is less
than the step itself, the device never waits.

Floors: a step reads the touched experts, the other weights and the cache once, at the bandwidth of a device-to-device
copy measured in the same run; prefill and vision need their matrix products, at the rate of a large bf16 product
measured likewise. Prefill gets the larger of the two.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

import cli_options as cli
from program import any_text
from qwen3vl_moe.errors import UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def main(
    model: cli.ModelOrSizes = None,
    load_format: cli.LoadFormatOrSizes = "auto",
    routing: cli.Routing = "balanced",
    device: cli.Device = "auto",
    moe: cli.Moe = "auto",
    kv_cache_dtype: cli.KvCacheDtype = "auto",
    tensor_parallel_size: cli.TensorParallelSize = 1,
    eager: cli.Eager = False,
    quick: bool = typer.Option(False, help="Small sizes and few repetitions."),
    profile: bool = typer.Option(False, help="Show where the time of a step goes, too: needs a GPU."),
    json_file: Path | None = typer.Option(None, "--json", help="Write the figures here."),
    plot_file: Path | None = typer.Option(None, "--plot", help="A picture of tokens/s over running sequences."),
    data_parallel_size: cli.OneEngine = 1,
) -> None:
    """Measure the engine on this machine."""
    options = dict(locals())
    del options["data_parallel_size"]
    from benchmarking.engine_steps import bench  # slow to import: not before --help has been answered

    try:
        cli.require_one_engine(data_parallel_size, "gsm8k.py times several")
        bench(options)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    any_text()
    typer.run(main)
