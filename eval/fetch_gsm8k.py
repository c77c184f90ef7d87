"""Fetch gsm8k from the Hugging Face hub into a folder, for --data of the programs here and of the demo's training.

    python eval/fetch_gsm8k.py data/gsm8k        # `make data` does this; train.jsonl 4 MB, test.jsonl 0.7 MB

A split that is there already is left alone. Exit status: 0 done, 2 the data cannot be had or written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qwen3vl_moe.errors import UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(folder: Annotated[Path, typer.Argument(help="Where train.jsonl and test.jsonl go.")]) -> None:
    """Fetch gsm8k from the Hugging Face hub into a folder."""
    try:
        fetch(folder)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None


def fetch(folder: Path) -> None:
    """Write the splits that ``folder`` has not; a file is there whole or not at all.

    Raises:
        UserError: the hub cannot be reached, or a file cannot be written.
    """
    from problems import SPLITS, from_hub  # slow to import
    from replace_file import replace_file

    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    missing = {split: path for split, path in paths.items() if not path.exists()}
    rows = from_hub(list(missing)) if missing else {}
    for split, path in missing.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n" for row in rows[split])
            replace_file(path, (line.encode() for line in lines))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
    for path in paths.values():
        stderr.print(f"{path}: {'fetched' if path in missing.values() else 'was there'}")


if __name__ == "__main__":
    import beside_scripts  # noqa: F401
    from program import any_text

    any_text()
    app()
