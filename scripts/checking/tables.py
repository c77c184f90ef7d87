"""What check.py prints of right, fast and fitting, each in a table and as data."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarking.card import ceilings
from checking.fast import layers
from checking.machine import fits
from checking.right import results

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
