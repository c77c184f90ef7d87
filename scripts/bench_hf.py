"""Times a transformers Qwen3-VL-MoE text stack under each experts implementation, `tma_moe` among them.

    python scripts/bench_hf.py --json hf.json

A few decoder layers of the 30B widths with random weights, one forward without a cache, launched eagerly as a
transformers user would; the implementations take turns. Before that the hidden states at 450 tokens are compared with
those of the same model in float32: the error of `tma_moe` may be at most twice that of `eager`. Exit status: 0, 1 if it
is larger, 2 for a bad option or a machine that cannot run the kernels.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tma_moe
import tma_moe.hf
from benchmarking.moe import Candidate, CudaTimer, parse_tokens, relative_error, spread
from program import any_text

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "tma_moe")
EAGER_TOKENS = 450  # eager loops over the experts in Python; one token count shows it
BATCHED_LIMIT = 32  # batched_mm copies the weights of every chosen expert: 2.4 GB for 32 tokens
WIDTHS = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
WIDTHS |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 1024}
ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
console = Console(width=150 if not sys.stdout.isatty() else None)  # tables whole in a log file


def text_stack(
    num_layers: int, widths: dict[str, int], rope: dict[str, Any], device: str, dtype: torch.dtype
) -> nn.Module:
    """The text tower of transformers' Qwen3-VL-MoE with random weights (norms stay one)."""
    from transformers import Qwen3VLMoeTextConfig, Qwen3VLMoeTextModel

    config = Qwen3VLMoeTextConfig(**widths, num_hidden_layers=num_layers, rope_parameters=rope, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3VLMoeTextModel(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
    return model


def forward(model: nn.Module, inputs_TH: Tensor) -> Tensor:
    return model(inputs_embeds=inputs_TH[None], use_cache=False).last_hidden_state[0]


def errors(model: nn.Module, inputs_TH: Tensor, ours: str) -> dict[str, float]:
    """Relative error of the last hidden states against the same model in float32, by experts implementation."""
    exact_model = copy.deepcopy(model).float()
    exact_model.set_experts_implementation("eager")
    exact = forward(exact_model, inputs_TH.float())
    found = {}
    for name in ("eager", "grouped_mm", ours):
        model.set_experts_implementation(name)
        found[name] = relative_error(forward(model, inputs_TH), exact)
    return found


def run(
    model: nn.Module,
    tokens: list[int],
    timer: Any,
    *,
    ours: str = "tma_moe",
    rounds: int = 3,
    results: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Samples in milliseconds per forward: {"tokens": ..., implementation: [...]} for every token count.

    ``results`` is filled while it goes on, for whoever wants to keep what was measured before an error.
    """
    parameter = next(model.parameters())
    width = model.config.hidden_size

    def draw(num_tokens: int) -> Tensor:
        return torch.randn(num_tokens, width, device=parameter.device, dtype=parameter.dtype)

    results = {} if results is None else results
    results |= {"card": timer.card(), "layers": model.config.num_hidden_layers, "points": []}
    results["errors"] = errors(model, draw(EAGER_TOKENS), ours)
    results["correct"] = results["errors"][ours] <= 2 * results["errors"]["eager"]
    for num_tokens in tokens:
        names = [name for name in IMPLEMENTATIONS[:-1] if applies(name, num_tokens)] + [ours]
        inputs_TH = draw(num_tokens)
        samples: dict[str, list[float]] = {name: [] for name in names}
        candidate = Candidate(lambda inputs_TH=inputs_TH: forward(model, inputs_TH), 1)
        for _ in range(rounds):
            for name in names:
                model.set_experts_implementation(name)
                timed = timer.eager_us({name: candidate}, seconds=0.5)
                samples[name] += [us / 1e3 for us in timed[name]["total"]]
        results["points"].append({"tokens": num_tokens, "ms": samples})
        medians = ", ".join(f"{name} {spread(ms)['median']:.2f} ms" for name, ms in samples.items())
        console.print(f"T={num_tokens:<6} {medians}")
    return results


def applies(name: str, num_tokens: int) -> bool:
    """Whether an implementation is timed at this size; the constants above say why not."""
    return {"eager": num_tokens == EAGER_TOKENS, "batched_mm": num_tokens <= BATCHED_LIMIT}.get(name, True)


def table(results: dict[str, Any], ours: str = "tma_moe") -> Table:
    """Median milliseconds per forward, and the gain over the best of transformers' own."""
    title = f"transformers, {results['layers']} Qwen3-VL-30B-A3B text layers, ms per forward (median, eager launches)"
    out = Table(title=title)
    names = [*IMPLEMENTATIONS[:-1], ours]
    for name in ("tokens", *names, "gain"):
        out.add_column(name, justify="right")
    for point in results["points"]:
        medians = {name: spread(samples)["median"] for name, samples in point["ms"].items()}
        best = min(ms for name, ms in medians.items() if name != ours)
        cells = [f"{medians[name]:.2f}" if name in medians else "-" for name in names]
        out.add_row(str(point["tokens"]), *cells, f"{best / medians[ours]:.2f}x")
    return out


def fail(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(2)


def main(
    tokens: str = typer.Option("1,32,450,2048", help="Token counts, comma separated."),
    layers: int = typer.Option(4, min=1, help="Decoder layers; 1.2 GB each."),
    json_path: Path | None = typer.Option(None, "--json", help="Write all samples to this file."),
) -> None:
    """Times a transformers Qwen3-VL-MoE text stack under each experts implementation."""
    try:
        counts = parse_tokens(tokens)
    except ValueError as error:
        raise fail(str(error)) from None
    if json_path is not None and not json_path.resolve().parent.is_dir():
        raise fail(f"cannot write {json_path}: the folder {json_path.resolve().parent} does not exist")
    reason = tma_moe.unavailable("cuda", torch.bfloat16)
    if reason is not None:
        raise fail(f"nothing to measure here: {reason}")
    results: dict[str, Any] = {}
    try:
        with torch.inference_mode():
            torch.manual_seed(0)
            model = text_stack(layers, WIDTHS, ROPE, "cuda", torch.bfloat16)
            run(model, counts, CudaTimer(samples=10), results=results)
    finally:  # what has been measured is shown and kept, whatever became of the rest
        if results.get("points"):
            if json_path is not None:
                json_path.write_text(json.dumps(results, indent=1) + "\n")
            console.print(table(results))
    found = ", ".join(f"{name} {error:.2e}" for name, error in results["errors"].items())
    console.print(f"error against float32 at {EAGER_TOKENS} tokens: {found}")
    if not results["correct"]:
        typer.echo("error: the error of tma_moe is more than twice that of eager", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    any_text()
    typer.run(main)
