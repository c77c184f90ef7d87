"""Does the fast path answer as well as the plain one, on these weights?

    python eval/parity.py --model DIR --variants tma,reference
    python eval/parity.py --model demo --variants reference,transformers --data FOLDER --limit 20
    python eval/parity.py --model DIR --load-format dummy --limit 64 --max-gen-toks 32
    python eval/parity.py --model DIR --variants tma,tma@2

The same gsm8k problems go through each variant, over one copy of the weights (but ``tma@2``, which is ``tma`` with
every layer divided among two GPUs: it is loaded before the others and given up). Parity holds if

1. no difference of accuracy between the first variant and another is more than chance (exact McNemar test over the
   problems that only one of them solves, two-sided, 5 %: it takes at least 6 such problems to reject), and
2. the log-probabilities of each variant of ours are right (see logprobs.py: against an fp32 evaluation of the same
   weights, at most twice the error of transformers in the same dtype, and for ``tma`` of ``reference``), twice over:
   the model's logits over prompts and answers, and what the engine itself reported for the tokens that it generated
   (cache, decode kernels, graphs).

Random weights solve nothing, so for them only the second counts, and only our variants write answers: what they are
compared on needs no more.

Exit status: 0 parity holds, 1 it does not, 2 something in the call has to be mended, 130 interrupted.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import beside_scripts  # noqa: F401, before what lies there
import cli_options as cli
from qwen3vl_moe.errors import OptionError, UserError

SIGNIFICANCE = 0.05
ANSWER_TOKENS = 128  # of each answer that is compared token by token
# Wide enough for the tables where no terminal says how wide it is.
stdout = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: cli.Model = "demo",
    variants: Annotated[
        str, typer.Option(help="Of tma, triton, reference, transformers, tma@2...; the first is on trial.")
    ] = ("tma,reference"),
    limit: Annotated[int | None, typer.Option(help="Only the first so many problems.")] = None,
    num_fewshot: Annotated[int, typer.Option(help="Worked examples before each problem.")] = 5,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Folder with train.jsonl and test.jsonl. [hub]")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Ask through the chat template.")] = True,
    max_gen_toks: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    logprob_problems: Annotated[int, typer.Option(help="Problems that are compared token by token.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Folder for parity.json and lm-eval's files.")] = None,
    device: cli.Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16.")] = "auto",
    max_model_len: cli.MaxModelLen = None,
    max_num_seqs: cli.MaxNumSeqs = None,
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
) -> None:
    """Compare accuracy and log-probabilities of several ways to compute the same weights."""
    try:
        import problems  # imported here, as all that is slow: not before --help has been answered
        from gsm8k import task_check

        names = [name.strip() for name in variants.split(",") if name.strip()]
        problems.require_lm_eval()
        from benchmarking.loading import load_llm
        from peers import OURS, RANKED, VARIANTS, EngineLM, release

        ranked = {name: match for name in names if (match := RANKED.fullmatch(name))}
        if not names or len(set(names)) < len(names) or {*names} - {*VARIANTS, *ranked} or names[0] not in OURS:
            raise OptionError(
                f"--variants {variants}: choose from {', '.join(VARIANTS)} and tma@2 for two GPUs, each once, tma or "
                "reference first"
            )
        if logprob_problems < 1:
            raise OptionError(f"--logprob-problems {logprob_problems}: 1 or more is needed")
        asked = problems.Gsm8k(split, num_fewshot, limit, data, chat)
        task_check(asked, output, max_gen_toks)
        options: dict[str, Any] = {"load_format": load_format, "device": device, "dtype": dtype}
        options |= {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
        runs: dict[str, Run] = {}
        for name, match in ranked.items():
            llm = load_llm(model, moe=match[1], tensor_parallel_size=int(match[2]), **options)
            stderr.print(f"{name}:", style="bold")
            lm = EngineLM(llm, answer_logprobs=True)
            runs[name] = run_problems(lm, asked, f"{llm.name}-{name}", max_gen_toks, output)
            release(llm)
        llm = load_llm(model, moe=names[0], **options)
        report: dict[str, Any] = {"parity": None}  # undecided, should it end early
        try:
            for part in compare(llm, names, asked, max_gen_toks, logprob_problems, output, runs):
                report |= part
                show(part)
        finally:  # what has been measured is kept, whatever became of the rest
            if output is not None and len(report) > 1:
                (output / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
                stdout.print(f"written: {output / 'parity.json'}")
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(130) from None
    if not report["parity"]:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Run:
    """What one variant answered: per problem the answer, and for each filter whether it is right."""

    answers: list[Any]
    right: dict[str, list[bool]]


def compare(
    llm: Any,
    names: list[str],
    asked: Any,
    max_gen_toks: int,
    count: int,
    output: Path | None,
    runs: dict[str, Run],
) -> Iterator[dict[str, Any]]:
    """The report in parts, each as soon as it has been measured. The engine of ``llm`` is given up.

    Args:
        runs: of variants that have been through the problems already; takes the others.

    Raises:
        OptionError: the working dtype is fp32, a variant cannot run here, or weights are in FP8.
    """
    import torch

    from benchmarking.transformers_twin import require_16_bits
    from peers import OURS, release
    from qwen3vl_moe.weights.placement import resolve_moe

    model = llm.engine.model
    if model.dtype not in (torch.bfloat16, torch.float16):
        raise OptionError("--dtype must be bfloat16 or float16: the yardstick is an fp32 evaluation")
    require_16_bits(model.config)  # before hours of answers, not after them
    ours = [name for name in names if name in OURS or name in runs]
    for name in set(ours) - set(runs):
        resolve_moe(name, model.device, model.dtype, model.config.text)
    settings = llm.settings
    counts = not settings["random_weights"]
    accuracy: dict[str, dict[str, float]] = {}
    for name in names if counts else ours:
        if name not in runs:
            runs[name] = run(llm, name, asked, max_gen_toks, output)
        accuracy[name] = {key: statistics.mean(right) for key, right in runs[name].right.items()}
        stdout.print(f"{name}: " + ", ".join(f"{key} {share:.2%}" for key, share in accuracy[name].items()))
    pairs = {other: accuracy_pair(runs[names[0]], runs[other]) for other in list(accuracy)[1:]}
    yield {
        "settings": {key: value for key, value in settings.items() if key != "moe"},
        "variants": list(accuracy),
        "problems": len(runs[names[0]].answers),
        "accuracy": accuracy,
        "pairs": pairs,
        "accuracy_counts": counts,
    }
    release(llm)  # its cache leaves no room for whole sequences of logits
    tokens = token_report(model, {name: runs[name].answers[:count] for name in ours})
    same_accuracy = all(pair["p_value"] >= SIGNIFICANCE for pair in pairs.values())
    same_logprobs = all(
        not row["verdict"].startswith("WRONG") for rows in (tokens["logits"], tokens["engine"]) for row in rows
    )
    yield {**tokens, "accuracy_counts": counts, "parity": same_logprobs and (same_accuracy or not counts)}


def run(llm: Any, name: str, asked: Any, max_gen_toks: int, output: Path | None) -> Run:
    """All problems through one variant."""
    from peers import variant_lm

    stderr.print(f"{name}:", style="bold")
    return run_problems(variant_lm(llm, name), asked, f"{llm.name}-{name}", max_gen_toks, output)


def run_problems(lm: Any, asked: Any, name: str, max_gen_toks: int, output: Path | None) -> Run:
    """All problems through an lm-eval model of ours; ``name`` is that of the folder of its result files."""
    import problems
    from gsm8k import generation

    results, tracker = problems.evaluate(lm, asked, name=name, gen_kwargs=generation(max_gen_toks), output=output)
    if tracker is not None:
        problems.save(results, tracker)
    right: dict[str, list[bool]] = {each: [] for each in problems.FILTERS}
    for row in sorted(results["samples"]["gsm8k"], key=lambda row: row["doc_id"]):
        right[row["filter"]].append(bool(row["exact_match"]))
    return Run(lm.answers, right)


def accuracy_pair(first: Run, other: Run) -> dict[str, Any]:
    """How two variants' answers differ. The test is over lm-eval's flexible-extract filter."""
    both = list(zip(first.answers, other.answers, strict=True))
    places = [_divergence(a.token_ids, b.token_ids) for a, b in both]
    flips = list(zip(first.right["flexible-extract"], other.right["flexible-extract"], strict=True))
    lost, won = flips.count((False, True)), flips.count((True, False))
    return {
        "identical": sum(a.text == b.text for a, b in both),
        "first_divergences": [place for place in places if place is not None],
        "right_to_wrong": lost,
        "wrong_to_right": won,
        "p_value": mcnemar(lost, won),
    }


def _divergence(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    """Index of the first token that differs, or that only one answer has."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of a split as uneven as this one, if either side were equally likely."""
    n, k = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def token_report(model: Any, answers: dict[str, list[Any]]) -> dict[str, Any]:
    """Distances from the fp32 evaluation and between variants, over prompts and answers.

    Args:
        model: the weights.
        answers: per variant of ours, its answers; the first variant's are the text on which all are compared.
    """
    import torch

    from logprobs import Distance, of_tokens
    from peers import OURS, Evaluations, peers_of

    evaluations, (first, *others) = Evaluations(model), [name for name in answers if name in OURS]
    everybody = list(dict.fromkeys([first, *others, *(peer for name in answers for peer in peers_of(name))]))
    logits = {name: Distance() for name in everybody}
    between = {name: Distance() for name in others}
    engine = {name: {who: Distance() for who in ("engine", *peers_of(name))} for name in answers}
    todo: dict[tuple[int, ...], list] = {}  # sequences, and whose engine wrote them
    for name, each in answers.items():
        for answer in each:
            todo.setdefault(answer.prompt_ids + answer.token_ids[:ANSWER_TOKENS], []).append((name, answer))
    for ids, writers in track(todo.items(), "log-probabilities", console=stderr, transient=True):
        targets_T = torch.tensor(ids[1:], device=model.device)
        exact_TV = evaluations.logits("fp32", ids)
        compared = writers[0][0] == first
        # A text of another variant's serves to judge what its own engine reported, and is computed by its peers only.
        needed = everybody if compared else dict.fromkeys(peer for name, _ in writers for peer in peers_of(name))
        found = {name: evaluations.logits(name, ids) for name in needed}
        if compared:
            for name, distance in logits.items():
                distance.add_logits(exact_TV, found[name], targets_T)
            for name, distance in between.items():
                distance.add_logits(found[name], found[first], targets_T)
        for name, answer in writers:
            rows = slice(len(answer.prompt_ids) - 1, None)
            exact_T = of_tokens(exact_TV[rows], targets_T[rows])
            reported_T = torch.tensor(answer.logprobs[:ANSWER_TOKENS], dtype=torch.float64, device=model.device)
            for who, distance in engine[name].items():
                own_T = reported_T if who == "engine" else of_tokens(found[who][rows], targets_T[rows])
                distance.add(own_T - exact_T)
    reports = []
    for name, distances in engine.items():
        own, peers = distances["engine"], [distances[peer] for peer in peers_of(name)]
        reports.append({"variant": name, **own.figures(), "verdict": verdict_of(own, peers)})
        reports += [{"variant": f"- {p}", **distances[p].figures(), "verdict": "a peer"} for p in peers_of(name)]
    rows = []
    for name, distance in logits.items():
        peers = [logits[peer] for peer in (peers_of(name) if name in OURS else ())]
        rows.append({"variant": name, **distance.figures(), "verdict": verdict_of(distance, peers)})
    return {
        "logits": rows,
        "engine": reports,
        "between": [{"variant": f"{first} - {name}", **d.figures()} for name, d in between.items()],
    }


def verdict_of(distance: Any, peers: list[Any]) -> str:
    wrong = sorted({what for peer in peers for what in distance.too_far(peer)})
    return f"WRONG: {', '.join(wrong)}" if wrong else "right" if peers else "a peer"


def show(part: dict[str, Any]) -> None:
    """Print a part of the report for a reader."""
    (show_accuracy if "accuracy" in part else show_tokens)(part)


def show_accuracy(report: dict[str, Any]) -> None:
    first, *_ = report["variants"]
    table = Table(
        "variant", *report["accuracy"][first], title="gsm8k, right answers", title_justify="left", box=box.SIMPLE
    )
    for name, shares in report["accuracy"].items():
        table.add_row(name, *(f"{share:.2%}" for share in shares.values()))
    stdout.print(table)
    for other, pair in report["pairs"].items():
        places = sorted(pair["first_divergences"])
        where = f", the first divergence at token {places[0]} (median {places[len(places) // 2]})" if places else ""
        stdout.print(
            f"{first} against {other}: {pair['identical']} of {report['problems']} answers identical{where}; "
            f"{pair['right_to_wrong']} right -> wrong, {pair['wrong_to_right']} wrong -> right by {first}, "
            f"exact McNemar p = {pair['p_value']:.3g}"
        )


def show_tokens(report: dict[str, Any]) -> None:
    for key, title in (
        ("logits", "the model's logits against fp32, on prompts and answers"),
        ("engine", "what the engine reported for its own answers, against fp32"),
        ("between", "the model's logits, variant against variant"),
    ):
        if report[key]:
            show_distances(report[key], title)
    if not report["accuracy_counts"]:
        stdout.print("The weights are random and solve nothing: only the log-probabilities count.")
    stdout.print("parity holds" if report["parity"] else "NO PARITY", style="bold")


def show_distances(rows: list[dict[str, Any]], title: str) -> None:
    """A table of ``Distance.figures``, each with the ``variant`` that is meant."""
    headings = ("tokens", "median", "mean", "largest", "median KL", "KL", "top-1", "")
    table = Table("Δ log p", *headings, title=title, title_justify="left", box=box.SIMPLE)
    for row in rows:
        table.add_row(row["variant"], *_cells(row))
    stdout.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    numbers = (
        "-" if row[key] is None else f"{row[key]:.2e}" for key in ("median", "mean", "largest", "median_kl", "kl")
    )
    top1 = "-" if row["top1"] is None else f"{row['top1']:.2%}"
    return [str(row["tokens"]), *numbers, top1, row.get("verdict", "")]


if __name__ == "__main__":
    from program import any_text

    any_text()
    app()
