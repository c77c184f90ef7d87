"""Looks at this machine: what it is, which kernels run, whether they are right, how fast they are, what fits.

    python scripts/check.py                         # the first thing to run on a new card; goes into reports
    python scripts/check.py --memory-limit 24       # as if the card had 24 GB
    python scripts/check.py --no-timing             # only whether results are right

Works with no GPU, too. With TRITON_INTERPRET=1 the kernels of the experts are checked on the CPU, in triton's
interpreter, on a small layer.
Exit status: 0, 1 if a result is wrong, 2 for a bad option.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarking.card import ceilings
from checking.fast import layers
from checking.machine import describe, fits, kernels, tile_notes
from checking.right import results, working_dtype
from program import any_text
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.weights.placement import free_bytes, parse_device

console = Console(width=130 if not sys.stdout.isatty() else None)  # tables whole in a log file
_LEAST_FOR_TIMING = 6 * 2**30  # bytes that measuring memory and products takes on a card


def two_columns(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def check_right(device: torch.device, dtype: torch.dtype, memory: int) -> list[dict[str, Any]]:
    """Compares every operation with its reference, and prints a table."""
    table = Table(title=f"Right? Each operation beside its reference in float64 or float32 ({dtype})")
    for name in ("operation", "by", "relative error", "allowed", ""):
        table.add_column(name, justify="right" if name in ("relative error", "allowed") else "left")
    found = []
    for result in results(device, dtype, memory):
        verdict = "right" if result.right else "[bold red]WRONG[/]"
        table.add_row(result.operation, result.by, f"{result.error:.2e}", f"{result.allowed:.2e}", verdict)
        found.append(dataclasses.asdict(result) | {"right": result.right})
    console.print(table)
    return found


def check_fast(device: torch.device, dtype: torch.dtype, memory: int) -> dict[str, Any]:
    """Measures the machine and one layer, and prints a table; on a card with too little free memory it says so."""
    if device.type == "cuda" and memory < _LEAST_FOR_TIMING:
        console.print(f"not timed: {memory / 1e9:.1f} GB are free, {_LEAST_FOR_TIMING / 1e9:.1f} GB are needed")
        return {}
    can = ceilings(device)
    bandwidth = f"{can.bytes_per_second / 1e9:,.0f} GB/s (copy, read + written)"
    product = f"{can.flops_per_second / 1e12:,.2f} TFLOP/s (bf16)"
    console.print(two_columns("How fast", {"memory": bandwidth, "products": product}))
    rows = list(layers(device, dtype, can, memory))
    size = "of the 30B model" if device.type == "cuda" else "(16 experts, 4 chosen, 256 wide: small, as this is a CPU)"
    table = Table(title=f"One MoE layer {size}, microseconds; the floor is the weights it touches, read once, or math")
    backends = list(dict.fromkeys(name for row in rows for name in row.took))
    for name in ("weights", "tokens", "floor", "limit", *backends, "best / floor"):
        table.add_column(name, justify="left" if name in ("weights", "limit") else "right")
    for row in rows:
        times = [f"{row.took[name]:,.1f}" for name in backends]
        share = f"{min(row.took.values()) / row.floor:.2f}"
        table.add_row(row.weights, str(row.tokens), f"{row.floor:,.1f}", row.limit, *times, share)
    console.print(table)
    return {"ceilings": dataclasses.asdict(can), "layers": [dataclasses.asdict(row) for row in rows]}


def check_fits(memory: int, what: str) -> list[dict[str, Any]]:
    """Prints on how many such cards each checkpoint of the 30B model fits."""
    table = Table(title=f"What fits, with {memory / 1e9:.1f} GB of memory {what}: weights, a step, 8,192 cached tokens")
    for name in ("checkpoint", "cards", "weights of each", "needed of each", ""):
        table.add_column(name, justify="right" if name not in ("checkpoint", "") else "left")
    found = []
    for fit in fits(memory):
        sizes = f"{fit.weights / 1e9:.1f} GB", f"{fit.needed / 1e9:.1f} GB"
        table.add_row(fit.checkpoint, str(fit.cards), *sizes, "fits" if fit.fits else "does not fit")
        found.append(dataclasses.asdict(fit))
    console.print(table)
    return found


def fail(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def main(
    device: str = typer.Option("auto", help="auto (a GPU where there is one), cuda, cuda:1 or cpu."),
    memory_limit: float | None = typer.Option(None, min=0.1, help="GB: as if the device had no more memory."),
    timing: bool = typer.Option(True, help="Measure how fast it is."),
    json_path: Path | None = typer.Option(None, "--json", help="Write everything to this file, for a report."),
) -> None:
    """Looks at this machine: what it is, which kernels run, whether they are right, how fast they are, what fits."""
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise fail(f"cannot write {json_path}: the folder {json_path.resolve().parent} does not exist")
    try:
        place = parse_device(device)
    except UserError as error:
        raise fail(str(error)) from None
    dtype = working_dtype(place)
    on_card = place.type == "cuda"
    total = torch.cuda.get_device_properties(place).total_memory if on_card else free_bytes(place) or 0
    free = free_bytes(place) or 0
    if memory_limit is not None:
        limit = int(memory_limit * 1e9)
        if on_card and limit < total:
            torch.cuda.set_per_process_memory_fraction(limit / total, place)
        # A machine without a card stands for one that has a card of so much memory.
        total, free = min(total, limit) if on_card else limit, min(free, limit)
    found: dict[str, Any] = {"machine": describe(place), "kernels": kernels(place, dtype)}
    found["notes"] = tile_notes(place, dtype)
    console.print(two_columns("This machine", found["machine"]))
    console.print(two_columns("What runs as what, for the 30B model", found["kernels"]))
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False)
    with torch.inference_mode():
        found["right"] = check_right(place, dtype, free)
        found["fast"] = check_fast(place, dtype, free) if timing else {}
    what = "a card" if on_card or memory_limit is not None else "(this machine's, as it has no card)"
    found["fits"] = check_fits(total, what)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [f"{row['operation']} by {row['by']}" for row in found["right"] if not row["right"]]
    if wrong:
        typer.echo(f"error: wrong results: {'; '.join(wrong)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    any_text()
    typer.run(main)
