"""Statistics of timed requests, defined as sglang's bench_serving defines them, and its table.

    TTFT   from the submission of a request to its first token on the host;
    E2E    from the submission to the last token;
    TPOT   (E2E - TTFT) / (output tokens - 1), of requests with more than one output token;
    ITL    every gap between two consecutive tokens of a request, those of all requests pooled;
    duration        from the start of the run to its end;
    throughputs     totals over the duration;
    concurrency     the sum of all E2E times over the duration;
    peaks           the run is cut into seconds from the first submission on: the most tokens that fall into one, and
                    the most requests alive during one. So the peak of requests may exceed the limit of the closed loop:
                    one that ended and the one that took its place are counted in the same second.

Vision tokens count an image's two marker tokens too; text tokens are the rest of the prompt, chat template included.
Percentiles interpolate linearly between samples, as numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Record:
    """What was seen of one request. Times are seconds on one clock.

    Attributes:
        start: submission, before any image is decoded.
        token_times: when each output token was on the host.
        text_tokens, vision_tokens: of the prompt.
        stages: seconds by stage, see :class:`qwen3vl_moe.engine.outputs.RequestMetrics`.
    """

    start: float
    token_times: list[float]
    text_tokens: int
    vision_tokens: int
    stages: dict[str, float]

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def latency(self) -> float:
        return self.token_times[-1] - self.start

    @property
    def tpot(self) -> float | None:
        count = len(self.token_times)
        return (self.latency - self.ttft) / (count - 1) if count > 1 else None

    @property
    def itl(self) -> list[float]:
        return np.diff(self.token_times).tolist()

    def as_dict(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "ttft": self.ttft,
            "latency": self.latency,
            "itl": self.itl,
            "text_tokens": self.text_tokens,
            "vision_tokens": self.vision_tokens,
            "output_tokens": len(self.token_times),
            "stages": self.stages,
        }


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Count, and mean, median, std, p90, p95, p99, max in milliseconds. Of no samples, all are 0."""
    values = 1e3 * np.asarray(seconds if len(seconds) else [0.0])
    percentiles = {f"p{percent}": float(np.percentile(values, percent)) for percent in (90, 95, 99)}
    return {
        "count": len(seconds),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "std": float(values.std()),
        **percentiles,
        "max": float(values.max()),
    }


def serving_metrics(records: Sequence[Record], duration: float) -> dict[str, Any]:
    """The figures of the table, for one run; throughputs per second, latencies by :func:`summary`."""
    text, vision = (sum(getattr(r, f"{kind}_tokens") for r in records) for kind in ("text", "vision"))
    output = sum(len(record.token_times) for record in records)
    peak_tokens, peak_requests = _peaks(records)
    return {
        "completed": len(records),
        "duration": duration,
        "input_tokens": text + vision,
        "input_text_tokens": text,
        "input_vision_tokens": vision,
        "output_tokens": output,
        "request_throughput": len(records) / duration,
        "input_throughput": (text + vision) / duration,
        "output_throughput": output / duration,
        "peak_output_throughput": peak_tokens,
        "peak_concurrency": peak_requests,
        "total_throughput": (text + vision + output) / duration,
        "concurrency": sum(record.latency for record in records) / duration,
        "e2e": summary([record.latency for record in records]),
        "ttft": summary([record.ttft for record in records]),
        "tpot": summary([record.tpot for record in records if record.tpot is not None]),
        "itl": summary([gap for record in records for gap in record.itl]),
    }


def _peaks(records: Sequence[Record]) -> tuple[int, int]:
    """Most output tokens, and most requests alive, in one second of the run."""
    first = min(record.start for record in records)
    seconds = math.ceil(max(record.token_times[-1] for record in records) - first) + 1
    tokens, alive = np.zeros(seconds, int), np.zeros(seconds, int)
    for record in records:
        np.add.at(tokens, [int(time - first) for time in record.token_times], 1)
        alive[int(record.start - first) : int(record.token_times[-1] - first) + 1] += 1
    return int(tokens.max()), int(alive.max())


_COUNTS = (
    ("Successful requests:", "completed"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "input_tokens"),
    ("Total input text tokens:", "input_text_tokens"),
    ("Total input vision tokens:", "input_vision_tokens"),
    ("Total generated tokens:", "output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Input token throughput (tok/s):", "input_throughput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "peak_output_throughput"),
    ("Peak concurrent requests:", "peak_concurrency"),
    ("Total token throughput (tok/s):", "total_throughput"),
    ("Concurrency:", "concurrency"),
)
_LATENCIES = (
    ("End-to-End Latency", "E2E Latency", "e2e", ("mean", "median", "p90", "p99")),
    ("Time to First Token", "TTFT", "ttft", ("mean", "median", "p90", "p99")),
    ("Time per Output Token (excl. 1st token)", "TPOT", "tpot", ("mean", "median", "p99")),
    ("Inter-Token Latency", "ITL", "itl", ("mean", "median", "p95", "p99", "max")),
)


def serving_table(metrics: dict[str, Any], max_concurrency: int) -> str:
    """The metrics as text, row by row as bench_serving prints them, without its rows about an HTTP server."""
    lines = [" Serving Benchmark Result ".center(50, "=")]
    lines += [_row("Traffic request rate:", math.inf), _row("Max request concurrency:", max_concurrency)]
    lines += [_row(label, metrics[key]) for label, key in _COUNTS]
    for title, label, key, columns in _LATENCIES:
        lines.append(title.center(50, "-"))
        lines += [_row(f"{column.title()} {label} (ms):", metrics[key][column]) for column in columns]
    return "\n".join([*lines, "=" * 50])


def _row(label: str, value: float) -> str:
    return f"{label:<40} {value:.2f}" if isinstance(value, float) and math.isfinite(value) else f"{label:<40} {value}"


def speed_up(baseline: Sequence[float], variant: Sequence[float]) -> dict[str, float]:
    """Of paired rounds: how many times less the variant took; the median of the rounds' ratios, the least, the most."""
    ratios = [before / after for before, after in zip(baseline, variant, strict=True)]
    return {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)}
