"""A 16-bit checkpoint in, the same in block-scaled FP8 out, in the published format.

    python scripts/quantize.py DIR DIR_FP8
    python scripts/quantize.py DIR DIR_FP8 --check      # compares the two, tensor by tensor

Quantised are q, k, v, o and the experts of every layer; all else is copied as it is. Experts stay in the layout that
they have, and their scales lie as they do. One tensor is in memory at a time, so a machine of a few GB does for any
size. Interrupted, the same call goes on where it stopped: finished shards are kept. config.json comes last, and without
it nothing takes the directory for a checkpoint.

Exit status: 0 done, 1 --check has found a difference, 2 something in the call has to be mended, 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Directory of a 16- or 32-bit checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write; with --check, to compare.")],
    check: Annotated[bool, typer.Option("--check", help="Compare the two instead, tensor by tensor.")] = False,
    scales: Annotated[str, typer.Option(help="bf16 (as published; rounded up) or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="What computes: auto, cuda, cpu.")] = "auto",
    expert_layout: Annotated[
        str | None, typer.Option(help="published or transformers5: only for a SOURCE that does not tell.")
    ] = None,
) -> None:
    """Quantise a checkpoint to block-scaled FP8."""
    import fp8_checkpoint  # slow to import: not before --help has been answered
    from qwen3vl_moe.weights.placement import parse_device

    try:
        if scales not in fp8_checkpoint.SCALES:
            raise OptionError(f"--scales {scales}: choose bf16 or fp32")
        model = fp8_checkpoint.Source.read(source, expert_layout)
        if check:
            if not fp8_checkpoint.compare(model, destination, parse_device(device)):
                raise typer.Exit(1)
            return
        written = fp8_checkpoint.quantise(model, destination, scales, parse_device(device))
        fp8_checkpoint.stdout.print(f"written: {destination}, {written / 1e9:.2f} GB of {model.nbytes / 1e9:.2f}")
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print("interrupted: the same call goes on where it stopped")
        raise typer.Exit(130) from None
    except OSError as error:
        stderr.print(f"error: {error.filename or destination}: {error.strerror or error}")
        raise typer.Exit(2) from None


if __name__ == "__main__":
    any_text()
    app()
