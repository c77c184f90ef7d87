"""What bench_moe.py times: one fused MoE layer, beside torch's grouped_mm and the floor of the card."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tma_moe
from benchmarking.moe import (
    Candidate,
    MoeShape,
    dequantised,
    draw_routing,
    floor_us,
    grouped_mm_moe,
    random_experts,
    relative_error,
    spread,
)
from tma_moe.descriptor_policies import POLICIES, clear_descriptor_cache

ROTATION = 4  # weight sets that a CUDA graph cycles through: 0.3 GB touched at one token, against 50 MB of L2
ROUTINGS = ("uniform", "zipf")
console = Console(width=150 if not sys.stdout.isatty() else None)  # tables whole in a log file


class Layers:
    """Random weights of several layers, so that neither L2 nor a small descriptor cache ever holds all of them."""

    def __init__(self, shape: MoeShape, count: int, device: str, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.experts = []
        for _ in range(count):
            self.experts.append(random_experts(shape, device, dtype))
        # The first layer again in float32: the definition of correct.
        self.exact = dequantised(self.experts[0], torch.float32)
        # For the baseline, which has no FP8: as many as rotate.
        rotating = self.experts[:ROTATION]
        self.plain = [dequantised(experts, dtype) for experts in rotating] if shape.fp8 else self.experts


@dataclasses.dataclass
class Point:
    """One token count under one routing: inputs, and the calls that are timed."""

    layers: Layers
    routing: str
    num_tokens: int
    backend: str

    def __post_init__(self) -> None:
        layers = self.layers
        self.x_TH = torch.randn(self.num_tokens, layers.shape.hidden_size, device=layers.device, dtype=layers.dtype)
        self.routes = [
            draw_routing(self.routing, self.num_tokens, layers.shape, seed=seed, device=layers.device)
            for seed in range(ROTATION)
        ]

    def ours(self, layer: int) -> Tensor:
        route = self.routes[layer % ROTATION]
        return tma_moe.fused_moe(self.x_TH, *route, self.layers.experts[layer], backend=self.backend)

    def portable(self, layer: int) -> Tensor:
        route = self.routes[layer % ROTATION]
        return tma_moe.fused_moe(self.x_TH, *route, self.layers.experts[layer], backend="triton")

    def baseline(self, layer: int) -> Tensor:
        experts = self.layers.plain[layer % len(self.layers.plain)]
        return grouped_mm_moe(self.x_TH, *self.routes[layer % ROTATION], experts.gate_up, experts.down)

    def candidate(self, call: Callable[[int], Tensor], num_layers: int, policy: str = "owned") -> Candidate:
        """`call` over the first `num_layers` layers, as one forward pass of a model would."""

        def run() -> None:
            with tma_moe.descriptor_policy(policy):
                for layer in range(num_layers):
                    call(layer)

        return Candidate(run, num_layers)

    def errors(self, timer: Any) -> dict[str, float]:
        """Relative errors against float32: ours under every policy and from a graph, the baseline, what is allowed.

        Allowed is twice the error of the plain-torch reference in the working dtype.
        """
        route, first = self.routes[0], self.layers.experts[0]
        exact = tma_moe.fused_moe(self.x_TH.float(), *route, self.layers.exact, backend="reference")
        working = tma_moe.fused_moe(self.x_TH, *route, first, backend="reference")
        errors = {"allowed": 2 * relative_error(working, exact), "grouped_mm": relative_error(self.baseline(0), exact)}
        for policy in POLICIES:
            # The allocator hands this memory to the output next: an element that is never written shows as NaN.
            torch.full_like(self.x_TH, float("nan"))
            with tma_moe.descriptor_policy(policy):
                errors[policy] = relative_error(self.ours(0), exact)
        errors["graph"] = relative_error(timer.replayed(lambda: self.ours(0)), exact)
        if self.backend == "tma":
            errors["triton"] = relative_error(timer.replayed(lambda: self.portable(0)), exact)
        return errors


def descriptor_counts(candidate: Candidate) -> dict[str, int]:
    """The counters of one more pass of a candidate that has already run."""
    tma_moe.descriptor_stats(reset=True)
    candidate.run()
    return dataclasses.asdict(tma_moe.descriptor_stats(reset=True))


def measure(point: Point, timer: Any, floor: tuple[float, str], eager: bool) -> dict[str, Any]:
    """One row of the results: errors first, then samples of every candidate in microseconds."""
    row: dict[str, Any] = {
        "routing": point.routing,
        "tokens": point.num_tokens,
        "floor_us": floor[0],
        "limit": floor[1],
    }
    row["errors"] = point.errors(timer)
    checked = [name for name in (*POLICIES, "graph", "triton") if name in row["errors"]]
    row["correct"] = all(row["errors"][name] <= row["errors"]["allowed"] for name in checked)
    graphs = {
        "fused_moe": point.candidate(point.ours, ROTATION),
        "grouped_mm": point.candidate(point.baseline, ROTATION),
    }
    if point.backend == "tma":
        graphs["triton"] = point.candidate(point.portable, ROTATION)
    row["graph"] = timer.graph_us(graphs)
    if eager:
        every = len(point.layers.experts)
        candidates = {policy: point.candidate(point.ours, every, policy) for policy in POLICIES}
        candidates["grouped_mm"] = point.candidate(point.baseline, every)
        row["eager"] = timer.eager_us(candidates)
        row["descriptors"] = {policy: descriptor_counts(candidates[policy]) for policy in POLICIES}
        clear_descriptor_cache()
    return row


def run(
    shape: MoeShape,
    tokens: list[int],
    routings: tuple[str, ...],
    num_layers: int,
    timer: Any,
    *,
    backend: str = "tma",
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    results: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures everything and returns the JSON document. Host work does not depend on the routing: first one only.

    ``results`` is filled while it goes on, for whoever wants to keep what was measured before an error.
    """
    ceilings = timer.fp8_ceilings() if shape.fp8 else timer.ceilings()
    results = {} if results is None else results
    results |= {
        "shape": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "layers": num_layers,
        "rotation": ROTATION,
        "card": timer.card(),
        "versions": versions(),
        "ceilings": dataclasses.asdict(ceilings),
        "points": [],
    }
    print_header(results)
    torch.manual_seed(0)
    layers = Layers(shape, num_layers, device, dtype)
    for routing in routings:
        for num_tokens in tokens:
            point = Point(layers, routing, num_tokens, backend)
            floors = [floor_us(shape, ids, ceilings, 1 if shape.fp8 else dtype.itemsize) for ids, _ in point.routes]
            floor = (sum(us for us, _ in floors) / len(floors), floors[0][1])
            row = measure(point, timer, floor, eager=routing == routings[0])
            results["points"].append(row)
            ours, baseline = (spread(row["graph"][name])["median"] for name in ("fused_moe", "grouped_mm"))
            verdict = "" if row["correct"] else "  [bold red]WRONG[/]"
            console.print(f"{routing:8} T={num_tokens:<6} {ours:8.1f} us, grouped_mm {baseline:8.1f} us{verdict}")
    results["card_after"] = timer.card()
    return results


def versions() -> dict[str, str]:
    import triton

    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown (no git here)"
    found = {"commit": commit, "torch": torch.__version__, "triton": triton.__version__}
    return found | {"cuda": str(torch.version.cuda), "python": platform.python_version()}


def print_header(results: dict[str, Any]) -> None:
    ceilings = results["ceilings"]
    console.print("  ".join(f"{name} {value}" for name, value in (results["card"] | results["versions"]).items()))
    console.print(
        f"shape E,K,H,I = {results['shape']} {results['dtype']}; "
        f"measured copy {ceilings['bytes_per_second'] / 1e12:.2f} TB/s (read + written), "
        f"matmul {ceilings['flops_per_second'] / 1e12:.0f} TFLOP/s"
    )


def graph_table(results: dict[str, Any]) -> Table:
    """Medians from CUDA-graph replay, the floor, the gain over grouped_mm, and the error beside the allowed one."""
    table = Table(title="CUDA-graph replay, whole op, microseconds (median, 20th-80th percentile)")
    for name in (
        "routing",
        "tokens",
        "floor",
        "limit",
        "fused_moe",
        "p20-p80",
        "x floor",
        "triton",
        "grouped_mm",
        "gain",
    ):
        table.add_column(name, justify="left" if name in ("routing", "limit") else "right")
    table.add_column("error / allowed", justify="right")
    for row in results["points"]:
        ours, baseline = (spread(row["graph"][name]) for name in ("fused_moe", "grouped_mm"))
        worst = max(row["errors"].get(name, 0.0) for name in (*POLICIES, "graph", "triton"))
        error = f"{worst:.2e} / {row['errors']['allowed']:.2e}"
        table.add_row(
            row["routing"],
            str(row["tokens"]),
            f"{row['floor_us']:.0f}",
            row["limit"],
            f"[bold]{ours['median']:.1f}[/]",
            f"{ours['p20']:.1f}-{ours['p80']:.1f}",
            f"{ours['median'] / row['floor_us']:.2f}",
            f"{spread(row['graph']['triton'])['median']:.1f}" if "triton" in row["graph"] else "-",
            f"{baseline['median']:.1f}",
            f"{baseline['median'] / ours['median']:.2f}x",
            error if row["correct"] else f"[bold red]{error} WRONG[/]",
        )
    return table


def eager_table(results: dict[str, Any]) -> Table:
    """Eager launches over all layers: time until the GPU is done, host time per op, and the table's counters per op."""
    title = f"Launched eagerly over {results['layers']} layers, microseconds per op: until done (of it host)"
    table = Table(title=title)
    for name in ("tokens", *POLICIES, "grouped_mm", "objects built per op", "lru hits / misses per pass"):
        table.add_column(name, justify="right")
    for row in results["points"]:
        if "eager" not in row:
            continue
        cells = []
        for name in (*POLICIES, "grouped_mm"):
            total, host = (spread(row["eager"][name][kind])["median"] for kind in ("total", "host"))
            cells.append(f"{total:.1f} ({host:.1f})")
        counts = row["descriptors"]
        built = ", ".join(f"{policy} {counts[policy]['built'] / results['layers']:.1f}" for policy in POLICIES)
        lru = f"{counts['lru']['hits']} / {counts['lru']['misses']}"
        table.add_row(str(row["tokens"]), *cells, built, lru)
    return table
