"""Make a demo checkpoint from nothing: the architecture at 29 MB, trained on drawn pictures and word problems.

    python scripts/train_demo.py --data FOLDER/train.jsonl --out qwen3vl_moe/demo

First the vision tower learns alone what is in a picture (demo_training/tower.py), then all of the model learns to
answer. docs/demo.md has longer schedules, in parts, and how long they took. What it draws with: pip install
'qwen3vl-moe[demo]'.

Written beside the checkpoint: training.json, with seeds, sizes, steps, losses, load of each expert and final figures.
Exit status: 0 done, 2 something in the call has to be mended.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import platform
import signal
import threading
import time
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
SHORTEST_STEP = 512
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    data: Annotated[Path | None, typer.Option(help="gsm8k's train.jsonl. Without it: generated problems only.")] = None,
    tower_steps: Annotated[int, typer.Option(help="Steps in which the vision tower learns alone, before.")] = 3000,
    tower_pictures: Annotated[int, typer.Option(help="Pictures of such a step.")] = 128,
    minutes: Annotated[float, typer.Option(help="Length of training after that; the rate follows it.")] = 8.0,
    steps: Annotated[int | None, typer.Option(help="Length in steps instead of minutes, to repeat a run.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a step in rows about pictures.")] = 16384,
    text_tokens: Annotated[int, typer.Option(help="Tokens of a step in rows of text.")] = 8192,
    moved: Annotated[
        float, typer.Option(help="Share of the pictures whose learned positions are moved about (pictures.py).")
    ] = 0.8,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of weights, tokenizer and data.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda, cpu.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="bfloat16 (for CPUs too that multiply in it), float32, auto (float32 on a CPU).")
    ] = "auto",
    graphs: Annotated[bool, typer.Option(help="Repeat the steps as a CUDA graph, on a GPU.")] = True,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Fuse what is between the products (torch.compile): a minute more at first."),
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that draw and tokenize.")] = 14,
    state: Annotated[Path | None, typer.Option(help="File to go on from, if there, and to stop into.")] = None,
    stop_after: Annotated[
        float | None, typer.Option(help="Stop after so many minutes into --state; call again to go on.")
    ] = None,
    size: Annotated[str, typer.Option(help="full (29 MB), medium (9 MB), small (1 MB, to try the program).")] = "full",
    questions: Annotated[int, typer.Option(help="Held-out picture questions at the end.")] = 1400,
    new: Annotated[int, typer.Option(help="Questions of the new held-out set at the end.")] = 1300,
    problems: Annotated[int, typer.Option(help="Training problems at the end.")] = 200,
) -> None:
    """Make a demo checkpoint from nothing."""
    try:
        if stop_after is not None and state is None:
            raise OptionError("--stop-after needs --state: a file that the next call goes on from")
        if minutes <= 0 or min(tower_pictures, 1 if steps is None else steps) < 1:
            raise OptionError("--minutes, --tower-pictures and --steps have to be positive")
        if min(tokens, text_tokens) < SHORTEST_STEP:
            raise OptionError(f"--tokens and --text-tokens have to be {SHORTEST_STEP} at least, to hold a row")
        if min(workers, tower_steps, questions, new, problems) < 0:
            raise OptionError("--workers, --tower-steps, --questions, --new and --problems have to be zero or more")
        if not 0 <= moved <= 1:
            raise OptionError("--moved is a share, from 0 to 1")
        if size not in ("full", "medium", "small"):
            raise OptionError(f"--size {size} is unknown; choose full, medium or small")
        if dtype not in ("auto", "bfloat16", "float32"):
            raise OptionError(f"--dtype {dtype} is unknown; choose auto, bfloat16 or float32")
        options = dict(locals())
        for package in ("cv2", "matplotlib", "skimage", "sklearn", "font_roboto", "font_source_sans_pro"):
            if find_spec(package) is None:
                raise OptionError(f"{package} is missing, which training draws with; pip install 'qwen3vl-moe[demo]'")
        train(options)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None


def train(options: dict[str, Any]) -> None:
    import torch

    from demo_training.batches import DATA_VERSION, Budget, TrainingBatches
    from demo_training.model import MEDIUM, SMALL, Sizes, build_model, published_config, token_ids
    from demo_training.publish import write_json, write_weights
    from demo_training.texts import read_problems
    from demo_training.tokenizer import write_processor
    from demo_training.tower import TowerBatches, TowerHeads, train_tower
    from demo_training.trainer import Trainer, TrainingRecipe

    device = _device(options["device"])
    out, seed = options["out"], options["seed"]
    problems = read_problems(options["data"]) if options["data"] else []
    sizes = {"full": Sizes(), "medium": MEDIUM, "small": SMALL}[options["size"]]
    out.mkdir(parents=True, exist_ok=True)
    write_processor(out, problems, vocab_size=sizes.vocab, seed=seed)
    ids = token_ids(out)
    raw = published_config(sizes, ids)
    write_json(out / "config.json", raw)
    write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": [ids.im_end, ids.endoftext]})

    recipe = TrainingRecipe(options["minutes"], options["steps"], options["learning_rate"])
    if not options["tower_steps"]:
        recipe = dataclasses.replace(recipe, tower=1.0, tower_later=1.0)
    dtype = options["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    model = build_model(raw, seed=seed)
    heads = TowerHeads(model.model.visual)
    goes_on = options["state"] and options["state"].exists()
    if options["tower_steps"] and not goes_on:
        alone = TowerBatches(pictures=options["tower_pictures"], steps=options["tower_steps"], seed=seed)
        pictures = _batches(alone, 0, options["workers"], device)
        train_tower(
            model,
            heads,
            pictures,
            recipe,
            len(alone),
            device=device,
            dtype=dtype,
            graphs=options["graphs"],
            report=_report_tower,
        )
        pictures.close()
    trainer = Trainer(
        model,
        heads,
        recipe,
        device=device,
        dtype=dtype,
        graphs=options["graphs"],
        compiled=options["compiled"],
        seed=seed,
    )
    if goes_on:
        trainer.load(options["state"])
        stderr.print(f"going on at step {trainer.progress.step}")
    count = sum(parameter.numel() for parameter in model.parameters())
    stderr.print(f"{count / 1e6:.2f} M parameters on {device}, {len(problems)} problems")

    dataset = TrainingBatches(
        str(out / "tokenizer.json"),
        options["data"],
        budget=Budget(options["tokens"], options["text_tokens"]),
        steps=10_000_000,
        seed=seed,
        moved=options["moved"],
    )
    batches = _batches(dataset, trainer.progress.step, options["workers"], device)
    done = trainer.run(
        batches,
        stop_after=options["stop_after"],
        report=_report,
        every=100 if count > 5e6 else 20,
        keep=options["state"],
    )
    batches.close()
    if not done:
        stderr.print(f"stopped at step {trainer.progress.step}; the same call goes on from {options['state']}")
        return

    size = write_weights(trainer.model, out)
    progress = trainer.progress
    record = {
        "data": DATA_VERSION,
        "sizes": dataclasses.asdict(sizes),
        "parameters": count,
        "bytes": size,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "tower_steps": options["tower_steps"],
        "tower_pictures": options["tower_pictures"],
        "moved": options["moved"],
        "tokens_per_step": options["tokens"],
        "text_tokens_per_step": options["text_tokens"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "tokens": progress.tokens,
        "patches": progress.patches,
        "expert_load": progress.load_LE,
        "history": progress.history[:: max(1, len(progress.history) // 50)],
    }
    write_json(out / "training.json", record)  # before the evaluation, which may fail
    if not options["questions"] + options["new"] + options["problems"]:
        return
    record["final"] = _evaluate(out, device, options, problems)
    write_json(out / "training.json", record)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda") or (name != "cpu" and not torch.cuda.is_available()):
        raise OptionError(f"--device {name} cannot be used here; choose auto, cpu, or cuda where there is a GPU")
    return torch.device(name)


def _batches(dataset: Any, first: int, workers: int, device: Any) -> Generator[Any, None, None]:
    """The batches from step ``first`` on; worker processes draw ahead, until it is closed."""
    from torch.utils.data import DataLoader

    ahead = {"prefetch_factor": 2, "multiprocessing_context": "spawn"} if workers else {}
    batches = iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first, len(dataset)),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            **ahead,
        )
    )
    try:
        yield from batches
    finally:
        # They hold nothing that is needed, and the DataLoader's own end waits up to five seconds for each of them.
        # Killed workers are errors to its handler of signals, and to its thread that pins what they send.
        watch, complain = signal.signal(signal.SIGCHLD, signal.SIG_DFL), threading.excepthook
        threading.excepthook = lambda _: None
        try:
            for worker in multiprocessing.active_children():
                worker.kill()
            del batches
        finally:
            signal.signal(signal.SIGCHLD, watch)
            threading.excepthook = complain


def _report_tower(step: int, loss: float, right: float) -> None:
    stderr.print(f"vision tower alone, step {step:5d}  loss {loss:.3f}  {right:.3f} of the things named rightly")


def _report(figures: dict[str, float]) -> None:
    speed = figures["tokens"] / max(figures["seconds"], 1e-9)
    stderr.print(
        f"{figures['seconds']:7.0f} s  step {figures['step']:6d}  pictures {figures['pictures']:.3f} "
        f"({figures['pictures_right']:.3f} of tokens right)  text {figures['text']:.3f} "
        f"({figures['text_right']:.3f})  balance {figures['balance']:.2f}  "
        f"things named rightly {figures['named']:.3f}, placed {figures['placed']:.3f}, "
        f"known {figures['known']:.3f}, in cells {figures['ordered']:.3f}, found {figures['found']:.3f} "
        f"and {figures['found_in_grid']:.3f}  {speed:.0f} tokens/s, "
        f"{figures['waited']:.0%} of the time without a batch"
    )


def _evaluate(out: Path, device: Any, options: dict[str, Any], problems: list) -> dict[str, Any]:
    from functools import partial

    from demo_training.evaluation import evaluate, heldout_examples, new_heldout, our_answers
    from qwen3vl_moe.engine import LLM

    started = time.monotonic()
    llm = LLM(out, device=str(device), moe="reference")
    final, _ = evaluate(
        partial(our_answers, llm),
        heldout_examples(options["questions"]),
        problems[: options["problems"]],
        new_heldout(options["new"]),
    )
    for part in ("pictures", "new"):
        for kind, cell in final.get(part, {}).items():
            stderr.print(f"{part:8s} {kind:24s} {cell['right']:5d} of {cell['of']:5d}")
    if "training_problems" in final:
        stderr.print(f"training problems: {final['training_problems']}")
    return final | {"evaluation_seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    any_text()
    app()
