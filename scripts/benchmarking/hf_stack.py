"""What bench_hf.py times: a text stack of transformers' under each experts implementation."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tma_moe.hf  # noqa: F401, registers the op with transformers
from benchmarking.moe import Candidate, relative_error, spread

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
