"""How many of gsm8k's problems does the model solve? lm-eval's own task and filters, on our engine.

    python eval/gsm8k.py --model Qwen/Qwen3-VL-30B-A3B-Instruct
    python eval/gsm8k.py --model DIR --data FOLDER --output results     # no network needed
    python eval/gsm8k.py --model demo --data FOLDER --limit 20

The speed of the whole run, with answers of one length, on random weights of any size, and transformers' beside it:

    python eval/gsm8k.py --model DIR --load-format dummy --ignore-eos --max-gen-toks 128 --temperature 1
    python eval/gsm8k.py ... --through transformers --max-num-seqs 32 --limit 32

Exit status: 0 done, 2 something in the call has to be mended, 130 interrupted.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import beside_scripts  # noqa: F401, before what lies there
import cli_options as cli
from qwen3vl_moe.errors import OptionError, UserError

stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: cli.Model = "demo",
    limit: Annotated[int | None, typer.Option(help="Only the first so many problems.")] = None,
    num_fewshot: Annotated[int, typer.Option(help="Worked examples before each problem.")] = 5,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Folder with train.jsonl and test.jsonl. [hub]")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Ask through the chat template.")] = True,
    fixed_examples: Annotated[
        bool, typer.Option(help="The same examples before every problem: quicker, and not lm-eval's default.")
    ] = False,
    max_gen_toks: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of exactly --max-gen-toks tokens, for timing.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for lm-eval's result and sample files.")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Prefix of a file of answers: an interrupted run goes on from there."),
    ] = None,
    device: cli.Device = "auto",
    dtype: cli.Dtype = "auto",
    moe: cli.Moe = "auto",
    max_model_len: cli.MaxModelLen = None,
    tensor_parallel_size: cli.TensorParallelSize = 1,
    data_parallel_size: cli.DataParallelSize = 1,
    kv_cache_dtype: cli.KvCacheDtype = "auto",
    max_num_seqs: cli.MaxNumSeqs = None,
    gpu_memory_utilization: cli.GpuMemoryUtilization = None,
    load_format: cli.LoadFormat = "auto",
    routing: Annotated[
        str | None, typer.Option(help="With dummy: balanced or skewed choice of experts. [the random router's]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="A picture of answer tokens/s over running problems; .png, .pdf or .svg.")
    ] = None,
    through: Annotated[
        str, typer.Option(help="engine, or transformers: its generate, --max-num-seqs problems at a time, to compare.")
    ] = "engine",
) -> None:
    """Accuracy on gsm8k, by lm-eval's own task and filters."""
    options = cli.engine_options(locals())
    try:
        import problems  # imported here, as all that is slow: not before --help has been answered

        if through not in ("engine", "transformers"):
            raise OptionError(f"--through {through}: choose engine or transformers")
        asked = problems.Gsm8k(split, num_fewshot, limit, data, chat, fixed_examples)
        problems.require_lm_eval()
        task_check(asked, output, max_gen_toks, temperature, cache)
        from benchmarking.figures import check_figure, decode_speeds, plot_scaling
        from benchmarking.loading import load_llm
        from benchmarking.report import environment
        from benchmarking.timeline import step_log
        from benchmarking.watch import Watch
        from lm import EngineLM

        check_figure("--plot", plot)
        if plot is not None and through != "engine":
            raise OptionError("--plot shows the engine's steps: leave out --through")
        if through == "transformers":
            # The engine only lends its weights: it gets a cache for one sequence, and no graphs.
            options |= {"max_num_seqs": 1, "enforce_eager": True}
        started = time.perf_counter()
        llm = load_llm(model, load_format=load_format, routing=routing, **options)
        stderr.print(f"loading and warming up: {time.perf_counter() - started:.1f} s", style="dim")
        if through == "transformers":
            from peers import TransformersLM

            lm = TransformersLM(llm, max_num_seqs or 32)
        else:
            lm = EngineLM(llm)
        stderr.print(", ".join(f"{key} {value}" for key, value in llm.settings.items()), style="dim")
        kwargs = generation(max_gen_toks, temperature, ignore_eos)
        with Watch(llm) as watch, step_log(llm) if plot else nullcontext([]) as steps:
            results, tracker = problems.evaluate(
                lm,
                asked,
                name=llm.name,
                gen_kwargs=kwargs,
                cache=cache and cache_file(cache, llm.settings),
                output=output,
            )
        figures = {
            **llm.settings,
            "through": through,
            "data": str(data or "hub"),
            **speed(lm, len(results["samples"]["gsm8k"]) // len(problems.FILTERS)),
        }
        report(results, figures, asked)
        if plot is not None:
            plot_scaling({"steps of decoding": decode_speeds(steps)}, plot, environment(llm), "gsm8k")
            stdout.print(f"written: {plot}")
        for line in watch.lines():
            stderr.print(line, style="dim")
        try:
            if ignore_eos and lm.answers and through == "engine":
                figures["experts"] = experts_read(llm, lm.answers, temperature)
                report_experts(figures["experts"])
        finally:  # whatever happens to what is counted afterwards, the answers are kept
            if output is not None:
                results["qwen3vl_moe"] = figures
                for path in problems.save(results, tracker):
                    stdout.print(f"written: {path}")
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(130) from None


def task_check(
    asked: Any, output: Path | None, max_gen_toks: int, temperature: float = 0.0, cache: Path | None = None
) -> None:
    """What can be known before the weights are loaded."""
    if max_gen_toks < 1:
        raise OptionError(f"--max-gen-toks {max_gen_toks}: 1 or more is needed")
    if temperature < 0:
        raise OptionError(f"--temperature {temperature}: 0 or more is needed")
    asked.task()
    for option, folder in (("--output", output), ("--cache", cache and cache.parent)):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option}: {folder} cannot be made a folder: {error.strerror}") from None


def generation(max_gen_toks: int, temperature: float = 0.0, ignore_eos: bool = False) -> dict[str, Any]:
    """lm-eval's generation arguments; they go on top of the task's own, which are greedy."""
    kwargs: dict[str, Any] = {"max_gen_toks": max_gen_toks, "temperature": temperature, "do_sample": temperature > 0}
    return kwargs | ({"ignore_eos": True, "until": []} if ignore_eos else {})


def cache_file(prefix: Path, settings: dict[str, Any]) -> Path:
    """One cache per way of computing: lm-eval knows an answer by its question alone."""
    keys = "model", "device", "dtype", "moe", "kv_cache_dtype", "max_model_len"
    ways = json.dumps({key: settings[key] for key in keys})
    return prefix.with_name(f"{prefix.name}-{hashlib.sha256(ways.encode()).hexdigest()[:12]}")


def speed(lm: Any, num_problems: int) -> dict[str, Any]:
    """Figures of the answers that were computed in this run."""
    answers = lm.answers
    prompt_tokens, new_tokens = sum(len(a.prompt_ids) for a in answers), sum(len(a.token_ids) for a in answers)
    return {
        "problems": num_problems,
        "answers_computed": len(answers),
        "answers_truncated": sum(a.truncated for a in answers),
        "prompts_cut": lm.prompts_cut,
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_reused": sum(a.cached_tokens for a in answers),
        "answer_tokens": new_tokens,
        "seconds": lm.seconds,
        "answer_tokens_per_second": new_tokens / lm.seconds if lm.seconds else 0.0,
        "tokens_per_second": (prompt_tokens + new_tokens) / lm.seconds if lm.seconds else 0.0,
    }


def experts_read(llm: Any, answers: list[Any], temperature: float) -> dict[str, Any]:
    """What a decoding step in the middle of the answers reads, counted after the run and not part of its time."""
    from benchmarking.experts_read import experts_while_decoding

    texts = [(*answer.prompt_ids, *answer.token_ids[: len(answer.token_ids) // 2]) for answer in answers]
    sequences, touched = experts_while_decoding(llm, texts, temperature)
    return {"sequences": sequences, "per_layer": touched, "of": llm.engine.model.config.text.num_experts}


def report(results: dict[str, Any], figures: dict[str, Any], asked: Any) -> None:
    from problems import FILTERS, accuracy

    table = Table("filter", "exact match", "standard error", box=box.SIMPLE)
    for name in FILTERS:
        share, error = accuracy(results, name)
        table.add_row(name, f"{share:.2%}", "-" if error is None else f"{error:.2%}")
    stdout.print(f"gsm8k, {asked.split}, {figures['problems']} problems, {asked.num_fewshot}-shot")
    stdout.print(table)
    if figures["random_weights"]:
        stdout.print("The weights are random: these answers are noise.")
    computed, prompt = figures["answers_computed"], figures["prompt_tokens"]
    if computed < figures["problems"]:
        stdout.print(f"{figures['problems'] - computed} answers were in the cache; the figures below leave them out.")
    if not computed:
        return
    stdout.print(f"{figures['answers_truncated']} of {computed} answers were cut off at the longest length")
    if figures["prompts_cut"]:
        stdout.print(
            f"{figures['prompts_cut']} of {computed} prompts did not fit and lost their beginning: raise "
            "--max-model-len, or lower --max-gen-toks or --num-fewshot"
        )
    stdout.print(
        f"{prompt} prompt tokens, {figures['prompt_tokens_reused'] / prompt:.1%} of them reused from earlier prompts; "
        f"{figures['answer_tokens']} answer tokens"
    )
    stdout.print(
        f"{figures['seconds']:.2f} s: {figures['answer_tokens_per_second']:.0f} answer tokens/s, "
        f"{figures['tokens_per_second']:.0f} tokens/s with the prompts"
    )


def report_experts(experts: dict[str, Any]) -> None:
    if experts["sequences"]:
        stdout.print(
            f"a decoding step of {experts['sequences']} problems reads {experts['per_layer']:.0f} of {experts['of']} "
            "experts a layer"
        )


if __name__ == "__main__":
    from program import any_text

    any_text()
    app()
