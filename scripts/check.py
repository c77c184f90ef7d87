"""Looks at this machine: what it is, which kernels run, whether they are right, how fast they are, what fits.

    python scripts/check.py                         # the first thing to run on a new card; goes into reports
    python scripts/check.py --memory-limit 24       # as if the card had 24 GB
    python scripts/check.py --no-timing             # only whether results are right

Works with no GPU, too. With TRITON_INTERPRET=1 the kernels of the experts are checked on the CPU, in triton's
interpreter, on a small layer.
Exit status: 0, 1 if a result is wrong, 2 for a bad option.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from program import any_text
from qwen3vl_moe.errors import UserError


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
    import torch  # slow to import: not before --help has been answered

    from checking import tables
    from checking.machine import describe, kernels, tile_notes
    from checking.right import working_dtype
    from qwen3vl_moe.weights.placement import free_bytes, parse_device

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
    tables.console.print(tables.two_columns("This machine", found["machine"]))
    tables.console.print(tables.two_columns("What runs as what, for the 30B model", found["kernels"]))
    for note in found["notes"]:
        tables.console.print(f"note: {note}", markup=False)
    with torch.inference_mode():
        found["right"] = tables.check_right(place, dtype, free)
        found["fast"] = tables.check_fast(place, dtype, free) if timing else {}
    what = "a card" if on_card or memory_limit is not None else "(this machine's, as it has no card)"
    found["fits"] = tables.check_fits(total, what)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [f"{row['operation']} by {row['by']}" for row in found["right"] if not row["right"]]
    if wrong:
        typer.echo(f"error: wrong results: {'; '.join(wrong)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    any_text()
    typer.run(main)
