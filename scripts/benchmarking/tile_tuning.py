"""How tune_moe.py finds the fastest right tiles: compiled in parallel, timed in turns, kept as it goes on."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from rich.console import Console
from rich.table import Table

import tma_moe
from benchmarking.moe import (
    Candidate,
    MoeShape,
    dequantised,
    draw_routing,
    random_experts,
    relative_error,
    spread,
)
from benchmarking.tile_output import write_config
from benchmarking.tile_search import HOPPER, ROLES, compile_or_reason, families, same_kernel
from replace_file import replace_file
from tma_moe import tiles as tile_files
from tma_moe.recipe import make_recipe
from tma_moe.tiles import Choice, Tiles

ROTATION = 4  # weight sets, so that L2 never holds them
# Kernels that can ask L2 to keep what they store.
KEEPING = ("weights_m", "weights_m_ws", "fp8_weights_m", *tile_files.PORTABLE_KERNELS)
AT_ONCE = 8  # candidates timed in turns; each holds a captured graph with its buffers
console = Console(width=150 if not sys.stdout.isatty() else None)  # tables whole in a log file


class Op(Protocol):
    """What the search needs of the op: something to time, and whether it computes the right thing."""

    def candidate(self, choice: Choice, num_tokens: int) -> Candidate: ...

    def error(self, choice: Choice, num_tokens: int) -> float:
        """Error over the allowed error; above 1 is wrong."""
        ...


class GpuOp:
    """The op with given tiles, on random data and uniform routing."""

    def __init__(self, shape: MoeShape, device: str = "cuda", dtype: torch.dtype = torch.bfloat16):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.sizes = (shape.num_experts, shape.experts_per_token, shape.hidden_size, shape.expert_width)
        self.inputs: tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self.experts = []
        for _ in range(ROTATION):
            self.experts.append(random_experts(shape, device, dtype))

    def _inputs(self, num_tokens: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Activations and one routing for each weight set; every candidate of a token count gets the same."""
        if self.inputs is None or self.inputs[0].shape[0] != num_tokens:
            x_TH = torch.randn(num_tokens, self.shape.hidden_size, device=self.device, dtype=self.dtype)
            routes = [
                draw_routing("uniform", num_tokens, self.shape, seed=i, device=self.device) for i in range(ROTATION)
            ]
            self.inputs = (x_TH, routes)
        return self.inputs

    def candidate(self, choice: Choice, num_tokens: int) -> Candidate:
        x_TH, routes = self._inputs(num_tokens)
        recipe = make_recipe(x_TH.device, *self.sizes, choice)

        def run() -> None:
            for route, experts in zip(routes, self.experts, strict=True):
                recipe.run(x_TH, *route, experts)

        return Candidate(run, ROTATION)

    def error(self, choice: Choice, num_tokens: int) -> float:
        x_TH, routes = self._inputs(num_tokens)
        first = self.experts[0]
        exact = tma_moe.fused_moe(x_TH.float(), *routes[0], dequantised(first, torch.float32), backend="reference")
        working = tma_moe.fused_moe(x_TH, *routes[0], first, backend="reference")
        ours = make_recipe(x_TH.device, *self.sizes, choice).run(x_TH, *routes[0], first)
        return relative_error(ours, exact) / (2 * relative_error(working, exact))


@dataclass
class Search:
    """The search at every token count, with what it knows so far."""

    shape: MoeShape
    op: Op
    timer: Any
    rejected: dict[tuple[str, Tiles], str]
    deadline: float
    backend: str = "tma"
    card: tuple[int, int] = HOPPER

    def best(self, num_tokens: int, current: Choice) -> dict[str, Any] | None:
        """The fastest right choice at `num_tokens` beside the current one; None if the time was up before."""
        finalists = [current]
        for family in families(self.shape, num_tokens, self.backend, self.card):
            ups, downs = ([t for t in family[role] if not self._rejected(role, t)] for role in ROLES)
            if not ups or not downs:
                continue
            up, down = (self._seed(role, candidates, current) for role, candidates in (("up", ups), ("down", downs)))
            up = self._fastest([Choice(None, tiles, down) for tiles in ups], num_tokens).up
            if time.monotonic() > self.deadline:
                return None
            finalists.append(self._fastest([Choice(None, up, tiles) for tiles in downs], num_tokens))
            if time.monotonic() > self.deadline:
                return None
        finalists = list(dict.fromkeys(Choice(None, choice.up, choice.down) for choice in finalists))
        medians = self._medians(finalists, num_tokens)
        # Only for the fastest: what L2 keeps depends on the number of tokens more than on the tiles.
        others = [choice for choice in keeping(min(medians, key=medians.__getitem__)) if choice not in medians]
        if others:
            medians |= self._medians(others, num_tokens)
        for choice in sorted(medians, key=medians.__getitem__):
            error = self.op.error(choice, num_tokens)
            if error <= 1:
                in_use = medians.get(finalists[0])
                return {"choice": choice, "us": medians[choice], "current_us": in_use, "error": error}
            console.print(f"[red]T={num_tokens}: wrong result ({error:.2f} of the allowed error): {show(choice)}")
        raise RuntimeError(f"no tiles give a right result at {num_tokens} tokens")

    def _rejected(self, role: str, tiles: Tiles) -> bool:
        return (role, same_kernel(tiles)) in self.rejected

    @staticmethod
    def _seed(role: str, candidates: list[Tiles], current: Choice) -> Tiles:
        in_use = getattr(current, role)
        return in_use if any(in_use.kernel == tiles.kernel for tiles in candidates) else candidates[0]

    def _fastest(self, choices: list[Choice], num_tokens: int) -> Choice:
        medians = self._medians(choices, num_tokens)
        return min(medians, key=medians.__getitem__)

    def _medians(self, choices: list[Choice], num_tokens: int) -> dict[Choice, float]:
        """Median microseconds of each choice; those that cannot be launched are left out, unless none is left."""
        medians: dict[Choice, float] = {}
        for start in range(0, len(choices), AT_ONCE):
            if medians and time.monotonic() > self.deadline:
                break
            candidates = {}
            for choice in choices[start : start + AT_ONCE]:
                candidate = self.op.candidate(choice, num_tokens)
                try:
                    candidate.run()
                except Exception as error:  # out of resources at launch, in one of several classes
                    console.print(f"left out: {show(choice)}: {error}")
                    continue
                candidates[choice] = candidate
            samples = self.timer.graph_us(candidates)
            medians |= {choice: spread(values)["median"] for choice, values in samples.items()}
        if not medians:
            raise RuntimeError(f"none of {len(choices)} candidates can be launched at {num_tokens} tokens")
        return medians


def keeping(choice: Choice) -> list[Choice]:
    """The choice with and without the wish that L2 keeps what either product stores."""

    def ways(tiles: Tiles) -> list[Tiles]:
        return [replace(tiles, keep=keep) for keep in (False, True)] if tiles.kernel in KEEPING else [tiles]

    return [Choice(choice.max_tokens, up, down) for up in ways(choice.up) for down in ways(choice.down)]


def compile_all(
    shape: MoeShape, tokens: list[int], jobs: int, backend: str, card: tuple[int, int]
) -> dict[tuple[str, Tiles], str]:
    """Compiles every candidate of every token count in worker processes; returns why the bad ones are bad."""
    wanted = {
        (role, same_kernel(tiles)): None
        for num_tokens in tokens
        for family in families(shape, num_tokens, backend, card)
        for role in ROLES
        for tiles in family[role]
    }
    console.print(f"compiling {len(wanted)} kernels in {jobs} processes")
    start, rejected = time.monotonic(), {}
    # Workers are started afresh: a forked child of a process that has used CUDA cannot compile safely.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_or_reason, role, tiles, shape, card): (role, tiles) for role, tiles in wanted}
        for future in as_completed(futures):
            reason = future.result()
            if reason is not None:
                rejected[futures[future]] = reason
    console.print(f"compiled in {time.monotonic() - start:.0f} s; {len(rejected)} left out")
    for reason, count in Counter(re.sub(r"\d+ bytes", "bytes", reason) for reason in rejected.values()).items():
        console.print(f"  {count} for: {reason}", markup=False)
    return rejected


def show(choice: Choice) -> str:
    """A choice in one line: kernel rows x cols x block_k, w warps, s stages, c programs per multiprocessor, keep."""

    def tiles(t: Tiles) -> str:
        persistent = f" c{t.ctas_per_sm}" if t.ctas_per_sm else ""
        return f"{t.kernel} {t.rows}x{t.cols}x{t.block_k} w{t.warps} s{t.stages}{persistent}{' keep' * t.keep}"

    return f"up {tiles(choice.up)}, down {tiles(choice.down)}"


def in_use(choices: tuple[Choice, ...], num_tokens: int) -> Choice:
    """The choice that serves a call of `num_tokens` tokens."""
    return next(c for c in choices if c.max_tokens is None or num_tokens <= c.max_tokens)


def with_buckets(current: tuple[Choice, ...], tuned: dict[int, Choice]) -> tuple[Choice, ...]:
    """The choices with the tuned token counts put in; outside the range that was tuned, `current` stays in force.

    Tiles tuned at a count serve calls from the tuned count below up to that count. The largest also serves all larger
    calls, if it lies in the open-ended last bucket of `current`.
    """
    low, high = min(tuned), max(tuned)
    kept = [c.max_tokens for c in current if c.max_tokens is not None and not low <= c.max_tokens <= high]
    limits = sorted({*tuned, *kept})
    found = [(limit, tuned.get(limit) or in_use(current, limit)) for limit in limits]
    if high > max((c.max_tokens for c in current if c.max_tokens is not None), default=0):
        found[-1] = (None, found[-1][1])
    else:
        found.append((None, current[-1]))
    # Neighbours with the same tiles become one bucket.
    last_of_run = [
        (limit, choice)
        for (limit, choice), (_, after) in zip(found, [*found[1:], (None, None)], strict=True)
        if after is None or (choice.up, choice.down) != (after.up, after.down)
    ]
    return tuple(Choice(limit, choice.up, choice.down) for limit, choice in last_of_run)


def load_partial(path: Path, key: str) -> dict[int, dict[str, Any]]:
    """The finished token counts of an earlier run with the same key (device, triton, shape); empty if there is none."""
    try:
        saved = json.loads(path.read_text())
        if saved["key"] != key:
            return {}
        return {
            int(count): {**row, "choice": Choice(None, Tiles(**row["choice"]["up"]), Tiles(**row["choice"]["down"]))}
            for count, row in saved["rows"].items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not notes of an earlier run ({type(error).__name__}: {error}): delete it") from None


def tune(
    search: Search, tokens: list[int], current: tuple[Choice, ...], output: Path, device: str
) -> tuple[dict[int, dict[str, Any]], bool]:
    """Tunes every token count that is not done yet. Returns the rows by token count and whether all are there."""
    partial = output.with_name(output.name + ".partial")
    key = f"{device}, triton {triton.__version__}, shape {search.shape}"
    key += f", backend {search.backend}" * (search.backend != "tma")
    rows = load_partial(partial, key)
    for num_tokens in tokens:
        if num_tokens in rows:
            console.print(f"T={num_tokens}: done by an earlier run")
            continue
        row = search.best(num_tokens, in_use(current, num_tokens)) if time.monotonic() < search.deadline else None
        if row is None:
            break
        rows[num_tokens] = row
        console.print(f"T={num_tokens}: {row['us']:.1f} us, {show(row['choice'])}")
        saved = {str(count): {**done, "choice": asdict(done["choice"])} for count, done in rows.items()}
        replace_file(partial, [json.dumps({"key": key, "rows": saved}, indent=1).encode() + b"\n"])
    complete = all(count in rows for count in tokens)
    if rows:
        tuned = {count: row["choice"] for count, row in rows.items()}
        write_config(output, device, search.shape, with_buckets(current, tuned), search.card)
    if complete:
        partial.unlink(missing_ok=True)
    return rows, complete


def table(rows: dict[int, dict[str, Any]]) -> Table:
    out = Table(title="Whole op under CUDA-graph replay, microseconds (medians)")
    for name in ("tokens", "in use", "best", "gain", "error / allowed"):
        out.add_column(name, justify="right")
    out.add_column("tiles (rows x columns x block_k, warps, stages, programs per SM)")
    for count, row in sorted(rows.items()):
        before, best = row["current_us"], row["us"]
        cells = (f"{before:.1f}", f"{best:.1f}", f"{before / best:.2f}x") if before else ("-", f"{best:.1f}", "-")
        out.add_row(str(count), *cells, f"{row['error']:.2f}", show(row["choice"]))
    return out
