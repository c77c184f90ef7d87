"""How fast does a checkpoint load? Ours beside ``safetensors.torch.load_file`` on the same files, in one run.

    python scripts/bench_load.py --dir /tmp/weights --gb 20                  # writes a synthetic checkpoint first
    python scripts/bench_load.py --dir ~/Qwen3-VL-30B-A3B-Instruct           # or measures one that is there

The synthetic checkpoint has the names, layout, dtype (bf16) and shard size (5 GB) of the published one and layers of
its full size, only fewer of them; the values are random. Ours does more than the peer: it checks every name and shape,
fuses q, k and v, and transposes the experts. Time counts from the call until the device is done, files to parameters.

"cold" means that the operating system was asked to drop the files from its page cache (posix_fadvise DONTNEED) before
the measurement; "in cache" says how much of them was still there. A layer below (a virtual disk's own cache) may still
hold them. "host peak" is the growth of the process's resident memory, and of that what Linux does not count as shared:
pages of mapped files are, and so may be the pinned buffers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import typer
from rich.console import Console

from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def main(
    directory: Path = typer.Option(..., "--dir", help="A checkpoint, or where to write a synthetic one."),
    gb: float | None = typer.Option(
        None, help="Least size of the synthetic checkpoint, in GB; 6 or more unless tiny. [default: 12, tiny 0.05]"
    ),
    device: str = typer.Option("auto", help="Where to load to: auto, cuda, cuda:1, cpu."),
    rounds: int = typer.Option(3, min=1, help="Runs of each loader, cold and warm each; the order alternates."),
    budget: float = typer.Option(200.0, help="Seconds after which no further run starts (each has run once by then)."),
    tiny: bool = typer.Option(False, help="Tiny layers, to try the program out."),
    keep: bool = typer.Option(False, help="Keep the synthetic checkpoint."),
    json_file: Path | None = typer.Option(None, "--json", help="Write the figures here."),
) -> None:
    """Time our loader and safetensors' load_file on the same files."""
    from benchmarking.load_times import bench, show  # slow to import: not before --help has been answered
    from qwen3vl_moe.weights.placement import parse_device

    try:
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise OptionError(f"--json {json_file}: there is no directory {json_file.parent}")
        gb = (0.05 if tiny else 12.0) if gb is None else gb
        if not 0 < gb < math.inf:
            raise OptionError(f"--gb {gb}: a positive number is needed")
        report: dict = {"runs": []}
        try:
            bench(report, directory, gb, parse_device(device), rounds, budget, tiny, keep)
        finally:  # what has been measured is shown and kept, whatever became of the rest
            if report["runs"]:
                show(report["runs"])
                if json_file:
                    json_file.write_text(json.dumps(report, indent=2))
    except (UserError, OSError, RuntimeError) as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    any_text()
    typer.run(main)
