"""Accuracy of a demo checkpoint on held-out pictures, by question kind, through this package's LLM.

    python scripts/eval_demo.py --model demo
    python scripts/eval_demo.py --model demo --new 1300 --against-transformers
    python scripts/eval_demo.py --model demo --new 460 --faults
    python scripts/eval_demo.py --sample picture.png     # draw one of them, and print its question and answer

The pictures and phrasings are never used in training. The table goes to stderr; stdout holds nothing but JSON with
--json. Exit status: 0 done, 1 answers differ from those of transformers, 2 something in the call has to be mended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
SAMPLE_KIND = "describe"


@app.command()
def main(
    model: Annotated[str | None, typer.Option(help="Checkpoint directory, or 'demo'.")] = None,
    questions: Annotated[int, typer.Option(help="Held-out picture questions.")] = 1400,
    new: Annotated[
        int, typer.Option(help="Questions of the new set: pictures by another hand (pip install 'qwen3vl-moe[demo]').")
    ] = 0,
    data: Annotated[Path | None, typer.Option(help="gsm8k's train.jsonl: score training problems too.")] = None,
    problems: Annotated[int, typer.Option(help="Training problems, the first of the file.")] = 200,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    moe: Annotated[str, typer.Option(help="Experts: tma (Hopper), triton (GPUs), reference, auto.")] = "auto",
    against_transformers: Annotated[
        bool, typer.Option("--against-transformers", help="Ask transformers too: on the CPU, in fp32, one by one.")
    ] = False,
    faults: Annotated[
        bool,
        typer.Option("--faults", help="Plant faults in the model, and count the answers to --new that change."),
    ] = False,
    sample: Annotated[Path | None, typer.Option(help="Write one held-out picture here instead; .png.")] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the counts into the checkpoint's training.json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The counts as one JSON object on stdout.")] = False,
) -> None:
    """Accuracy of a demo checkpoint on held-out pictures, by question kind."""
    try:
        if problems < 1 or min(questions, new) < 0 or questions + new < 1:
            raise OptionError("--problems, and --questions or --new, have to be positive")
        if sample is not None:
            _draw_sample(sample)
            return
        if model is None:
            raise OptionError("name a checkpoint directory with --model, or a picture to draw with --sample")
        if model == "demo":
            from qwen3vl_moe.weights import resolve  # slow to import

            model = str(resolve(model))
        if not Path(model).is_dir():
            raise OptionError(f"--model {model} is no directory; scripts/train_demo.py makes one")
        if record and not (Path(model) / "training.json").is_file():
            raise OptionError(f"--record needs {model}/training.json, which scripts/train_demo.py writes")
        options = {"device": device, "dtype": dtype, "moe": moe}
        if against_transformers or faults:
            if set(options.values()) != {"auto"}:
                raise OptionError(
                    "--against-transformers and --faults compare in fp32 on the CPU: leave --device, --dtype and --moe"
                )
            options = {"device": "cpu", "dtype": "float32", "moe": "reference"}
        if faults:
            if new < 1 or against_transformers:
                raise OptionError("--faults needs questions of the new set, --new 230 or more, and no other comparison")
            _plant(model, new, options, as_json)
            return
        scores = _evaluate(model, (questions, new), data, problems, options, against_transformers)
        if record:
            _record(Path(model) / "training.json", scores, options)
        if as_json:
            print(json.dumps(scores))
        if scores.get("transformers", {}).get("different_answers"):
            raise typer.Exit(1)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None


def _evaluate(
    model: str,
    counts: tuple[int, int],
    data: Path | None,
    problems: int,
    options: dict[str, str],
    against: bool,
) -> dict:
    from functools import partial

    from demo_training.evaluation import evaluate, heldout_examples, new_heldout, our_answers, transformers_answers
    from demo_training.texts import read_problems
    from qwen3vl_moe.engine import LLM  # slow to import: not before the options have been checked

    examples, new = heldout_examples(counts[0]), new_heldout(counts[1])
    training = read_problems(data)[:problems] if data else []
    llm = LLM(model, **options)
    scores, answers = evaluate(partial(our_answers, llm), examples, training, new)
    columns = {"ours": scores}
    if against:
        stderr.print(_table(columns))  # what is known so far: the rest takes longer, and may fail
        columns["transformers"], theirs = evaluate(partial(transformers_answers, model), examples, training, new)
        different = [number for number, pair in enumerate(zip(answers, theirs, strict=True)) if pair[0] != pair[1]]
        scores["transformers"] = columns["transformers"] | {"different_answers": len(different)}
    stderr.print(_table(columns))
    if against:
        stderr.print(f"{len(different)} of {len(answers)} answers differ between ours and transformers")
        for number in different[:5]:
            stderr.print(f"  question {number}: {answers[number]!r} and {theirs[number]!r}")
    return scores


def _record(path: Path, scores: dict, options: dict[str, str]) -> None:
    """Counts of this program into ``final`` of a training.json; what was not asked stays as it is there."""
    import torch

    from replace_file import replace_file

    record = json.loads(path.read_text(encoding="utf-8"))
    how = ", ".join(f"{name} {value}" for name, value in options.items())
    counts = {name: table for name, table in scores.items() if name != "transformers"}
    evaluated = {"evaluated_on": f"{how}, torch {torch.__version__}, by scripts/eval_demo.py"}
    record["final"] = record.get("final", {}) | counts | evaluated
    replace_file(path, [json.dumps(record, indent=2).encode() + b"\n"])


def _plant(model: str, count: int, options: dict[str, str], as_json: bool) -> None:
    from demo_training.evaluation import new_heldout
    from demo_training.faults import measure
    from qwen3vl_moe.engine import LLM

    counted = measure(LLM(model, **options), new_heldout(count))
    table = Table("fault", "answers changed", "at least")
    for name, cell in counted.items():
        share = cell["changed"] / max(cell["of"], 1)
        table.add_row(name, f"{cell['changed']} of {cell['of']} ({share:.1%})", f"{cell['least']:.0%}")
    stderr.print(table)
    if as_json:
        print(json.dumps(counted))


def _table(columns: dict[str, dict]) -> Table:
    """Right answers by kind; a column for each who answered."""
    rows: dict[str, list[str]] = {}
    for scores in columns.values():
        cells = {kind: (cell["right"], cell["of"]) for kind, cell in scores.get("pictures", {}).items()}
        cells |= {f"new: {kind}": (cell["right"], cell["of"]) for kind, cell in scores.get("new", {}).items()}
        for name in ("strict", "flexible") if "training_problems" in scores else ():
            cell = scores["training_problems"]
            cells[f"training problems, {name}"] = cell[name], cell["of"]
        for kind, (right, of) in cells.items():
            rows.setdefault(kind, []).append(f"{right} of {of} ({right / of:.1%})")
    table = Table("questions", *(f"right, {name}" for name in columns))
    for kind, cells in rows.items():
        table.add_row(kind, *cells)
    return table


def _draw_sample(path: Path) -> None:
    from demo_training.drawing import draw
    from demo_training.evaluation import heldout_examples

    example = next(e for e in heldout_examples(1000) if e.questions[0].kind == SAMPLE_KIND and len(e.scenes) == 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw(example.scenes[0]).save(path)
    except (OSError, ValueError) as error:
        raise OptionError(f"--sample {path} cannot be written: {error}; name a .png file") from None
    stderr.print(f"picture:  {path}")
    stderr.print(f"question: {example.questions[0].text}")
    stderr.print(f"expected: {example.questions[0].answer}")


if __name__ == "__main__":
    any_text()
    app()
