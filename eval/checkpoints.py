"""Do two checkpoints answer alike? A quantised one beside its original, for example, or one on one card and on two.

    python eval/checkpoints.py DIR DIR_FP8 --data FOLDER
    python eval/checkpoints.py DIR DIR_FP8 --limit 64 --output RESULTS
    python eval/checkpoints.py DIR DIR --tensor-parallel-size 1,2

The same gsm8k problems go to the first checkpoint and then to the second (one after the other, so a card need hold only
one of them). Shown are their accuracies; how many answers changed from right to wrong and from wrong to right, with an
exact McNemar test; and how far the second one's log-probabilities are from the first one's at the tokens of the first
one's answers: |delta log p|, KL(first || second), and how often both find the same token most likely.

Nothing is judged: how much a checkpoint may differ is for the reader to say. To ask whether the *computation* of one
checkpoint is right, see parity.py. Exit status: 0 done, 2 something in the call has to be mended, 130 interrupted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import beside_scripts  # noqa: F401, before what lies there
import cli_options as cli
from parity import accuracy_pair, run_problems, show_accuracy, show_distances, stderr, stdout
from qwen3vl_moe.errors import OptionError, UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
ANSWER_TOKENS = 128  # of each answer whose distributions are kept and compared


@app.command()
def main(
    first: Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or 'demo'.")],
    second: Annotated[str, typer.Argument(help="The one that is compared with it.")],
    limit: Annotated[int | None, typer.Option(help="Only the first so many problems.")] = None,
    num_fewshot: Annotated[int, typer.Option(help="Worked examples before each problem.")] = 5,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Folder with train.jsonl and test.jsonl. [hub]")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Ask through the chat template.")] = True,
    max_gen_toks: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    logprob_problems: Annotated[int, typer.Option(help="Problems whose answers are compared token by token.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Folder for checkpoints.json and lm-eval's files.")] = None,
    device: cli.Device = "auto",
    dtype: cli.Dtype = "auto",
    moe: cli.Moe = "auto",
    max_model_len: cli.MaxModelLen = None,
    kv_cache_dtype: cli.KvCacheDtype = "auto",
    max_num_seqs: cli.MaxNumSeqs = None,
    tensor_parallel_size: Annotated[
        str, typer.Option(help="GPUs that every layer is divided among: one number, or one for each checkpoint (1,2).")
    ] = "1",
    load_format: cli.LoadFormat = "auto",
) -> None:
    """Compare accuracy and log-probabilities of two checkpoints."""
    try:
        import problems  # imported here, as all that is slow: not before --help has been answered
        from gsm8k import task_check

        asked = problems.Gsm8k(split, num_fewshot, limit, data, chat)
        problems.require_lm_eval()
        task_check(asked, output, max_gen_toks)
        if logprob_problems < 1:
            raise OptionError(f"--logprob-problems {logprob_problems}: 1 or more is needed")
        options = {"device": device, "dtype": dtype, "moe": moe, "max_num_seqs": max_num_seqs}
        options |= {"max_model_len": max_model_len, "kv_cache_dtype": kv_cache_dtype, "load_format": load_format}
        sizes = _sizes(tensor_parallel_size)
        report = compare((first, second), sizes, options, asked, max_gen_toks, logprob_problems, output)
        show_accuracy(report)
        show_distances([report["distance"]], f"log-probabilities of {second} beside {first}, on the latter's answers")
        if output is not None:
            (output / "checkpoints.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            stdout.print(f"written: {output / 'checkpoints.json'}")
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(130) from None


def _sizes(text: str) -> tuple[int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise OptionError(f"--tensor-parallel-size {text}: a number is needed, or two with a comma between them")
    return int(parts[0]), int(parts[-1])


@dataclass(frozen=True)
class Text:
    """One answer of the first checkpoint with what it answers.

    Attributes:
        ids: prompt and answer.
        answer: how many of them are the answer.
        logits_RV: of the first checkpoint where these were chosen, on the host: 39 MB in bf16 at the published
            vocabulary.
    """

    ids: tuple[int, ...]
    answer: int
    logits_RV: Any


def compare(
    names: tuple[str, str],
    sizes: tuple[int, int],
    options: dict[str, Any],
    asked: Any,
    max_gen_toks: int,
    count: int,
    output: Path | None,
) -> dict[str, Any]:
    """The report: settings, accuracies, flips, and the distance of log-probabilities.

    Args:
        names, sizes: of each checkpoint, and of how many ranks it gets.
        options: of ``load_llm``.
    """
    import statistics

    import torch

    from benchmarking.loading import load_llm
    from lm import EngineLM
    from logprobs import Distance
    from peers import engine_logits, release

    runs, settings, texts, distance = [], [], [], Distance()
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        stderr.print(f"{name}:", style="bold")
        llm = load_llm(name, tensor_parallel_size=size, **options)
        settings.append(llm.settings)
        runs.append(run_problems(EngineLM(llm), asked, f"{llm.name}-{number + 1}", max_gen_toks, output))
        if number == 0:
            answers = (answer for answer in runs[0].answers[:count] if answer.token_ids)
            for answer in answers:
                new = answer.token_ids[:ANSWER_TOKENS]
                ids = answer.prompt_ids + new
                texts.append(Text(ids, len(new), engine_logits(llm.engine, ids, len(answer.prompt_ids) - 1)[:-1]))
        for text in texts if number else ():
            rows_RV = engine_logits(llm.engine, text.ids, len(text.ids) - text.answer - 1)[:-1]
            if rows_RV.shape != text.logits_RV.shape:
                raise OptionError(f"{names[0]} and {names[1]} have vocabularies of different sizes")
            device = llm.engine.model.device  # in fp64, on 150,000 columns
            targets_R = torch.tensor(text.ids[-text.answer :], device=device)
            distance.add_logits(text.logits_RV.to(device), rows_RV.to(device), targets_R)
        release(llm)
    if not texts:
        raise OptionError("no answer has a token: there is nothing to compare")
    labels = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    accuracy = [{key: statistics.mean(right) for key, right in each.right.items()} for each in runs]
    return {
        "settings": dict(zip(labels, settings, strict=True)),
        "variants": labels[::-1],  # the second is on trial
        "problems": len(runs[0].answers),
        "accuracy": dict(zip(labels, accuracy, strict=True)),
        "pairs": {labels[0]: accuracy_pair(runs[1], runs[0])},
        "distance": {"variant": labels[1], **distance.figures()},
    }


if __name__ == "__main__":
    from program import any_text

    any_text()
    app()
