"""What a measurement says about itself, and how it is shown: tables, the machine and the versions."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.table import Table

from benchmarking.card import card
from qwen3vl_moe import LLM

STAGE_COLUMNS = ("preprocess", "queue", "host_to_device", "vision", "prefill", "sample")


def environment(llm: LLM) -> dict[str, Any]:
    """Card, clocks, versions, commit, command and weights, for the head of every report."""
    on_gpu = llm.engine.model.device.type == "cuda"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if on_gpu:
        import triton

        versions |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return {
        "command": " ".join(sys.argv if sys.argv[0].startswith("qwen3vl-moe ") else ["python", *sys.argv]),
        "card": card(llm.engine.model.device),
        "versions": versions,
        "commit": _commit(),
        "weights": "random" if llm.random_weights else "of the checkpoint",
        "settings": llm.settings,
        "max_pixels": llm.processor.image_settings.max_pixels,
    }


def _commit() -> str | None:
    """Of this repository; None where the programs lie elsewhere, such as among the packages of an environment."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=here, timeout=20).stdout.strip()

    here = Path(__file__).resolve().parent
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parents[1]:
            return None  # some other repository, in whose folder an environment lies
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def heading(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    model = found["settings"]["model"]
    weights = "RANDOM WEIGHTS: the answers are noise" if found["weights"] == "random" else "the checkpoint's weights"
    commit = "" if found["commit"] is None else f"; commit {found['commit']}"
    return f"{found['card']['name']}; {versions}{commit}; model {model}\n{weights}"


TABLE_WIDTH = 100  # columns that every table fits, whatever the terminal's width


def single_table(cells: list[dict[str, Any]], max_pixels: int | None = None) -> Table:
    """Time to first token by image and text length; stages are medians of the warm requests.

    ``max_pixels`` is what images are shrunk to: said where one of the cells is larger.
    """
    title = f"Time to first token of a request that is alone, ms; of {cells[0]['ttft']['count']} warm requests each"
    least = min(cell["stages_over_total"] for cell in cells)
    caption = f"The stages make up {least:.1%} of the total or more."
    if max_pixels is not None and any(_pixels(cell["image"]) > max_pixels for cell in cells):
        caption += f" Images are shrunk to {max_pixels} pixels at most, this model's limit."
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0)
    for name in ("image", "text", "image tokens", "median", "p90", "p99", *STAGE_COLUMNS):
        words = name.replace("_", " ").split()
        side = "left" if name == "image" else "right"
        longest = max(map(len, [*words, *(cell["image"] for cell in cells if name == "image")]))
        table.add_column(" ".join(words), justify=side, min_width=min(longest, 20), overflow="fold")
    for cell in cells:
        stages = [f"{1e3 * cell['stages'][name]:.1f}" for name in STAGE_COLUMNS]
        numbers = [f"{cell['ttft'][name]:.1f}" for name in ("median", "p90", "p99")]
        counts = [str(value) for value in (cell["text_tokens"], cell["vision_tokens"])]
        table.add_row(cell["image"], *counts, *numbers, *stages)
    return table


def _pixels(size: str) -> int:
    """Of ``HEIGHTxWIDTH``; 0 for the name of a file."""
    sides = size.split("x")
    return int(sides[0]) * int(sides[1]) if len(sides) == 2 and all(side.isdigit() for side in sides) else 0


def cold_line(cold: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {1e3 * cold['stages'][name]:.1f}" for name in STAGE_COLUMNS)
    line = (
        f"cold, first request of this process ({cold['image']}): {1e3 * cold['ttft']:.1f} ms ({stages}); "
        f"loading and warming up before it took {cold['load_seconds']:.1f} s"
    )
    if cold["start_to_first_token"] is not None:
        line += f"; from the start of the process to this first token: {cold['start_to_first_token']:.1f} s"
    return line


def comparison_table(workload: str, comparison: dict[str, Any]) -> Table:
    """Variants of one workload beside the first of them."""
    first = next(iter(comparison))
    rounds = comparison[first]["rounds"]
    title = f"{workload}: mean time to first token by variant, {rounds} rounds in turns"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("variant", "TTFT ms", "rounds", f"speed-up over {first}", "spread", "req/s", "host us / MoE layer"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for name, row in comparison.items():
        rounds, gain, host = row["ttft_ms"], row["speed_up"], row["host_us_per_moe_layer"]
        table.add_row(
            name,
            f"{statistics.median(rounds):.1f}",
            f"{min(rounds):.1f}-{max(rounds):.1f}",
            f"{gain['median']:.3f}",
            f"{gain['min']:.3f}-{gain['max']:.3f}",
            f"{statistics.median(row['requests_per_second']):.2f}",
            "" if not host else f"{statistics.median(host):.1f} ({min(host):.1f}-{max(host):.1f})",
        )
    return table


def median_stages(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of each stage, in seconds."""
    names = samples[0]["stages"]
    return {name: statistics.median(sample["stages"].get(name, 0.0) for sample in samples) for name in names}
