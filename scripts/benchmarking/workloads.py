"""The measurements of scripts/ttft.py: a grid of single requests, the closed loop, and variants in turns."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarking.inputs import Images, TimedRequest, make_request, parse_resolution, random_lengths
from benchmarking.report import STAGE_COLUMNS, median_stages
from benchmarking.serving import closed_loop, single_stream
from benchmarking.statistics import Record, serving_metrics, speed_up, summary
from benchmarking.step_profile import traced
from benchmarking.variants import (
    TRANSFORMERS,
    TransformersPeer,
    host_us_per_layer,
    single_stream_as,
    variant,
)
from qwen3vl_moe.engine import LLM
from qwen3vl_moe.errors import OptionError

Progress = Callable[[str], object]


def profiler_check(llm: LLM, images: Images, load: Load) -> dict[str, float | None]:
    """One warm request under torch's profiler: our clock beside the trace's, in milliseconds.

    ``trace_ms`` is the length of the request in the trace, to compare with ``ttft_ms``. On a GPU ``device_span_ms``,
    from the start of the first copy or kernel to the end of the last, is to compare with ``device_stages_ms``, what our
    stages say of the same; ``device_busy_ms`` is how long kernels and copies ran in it.
    """
    warm, request = (TimedRequest(r.messages, 1) for r in load.requests(llm, images, 2, turn=10**6 + 3))
    record, whole, events = traced(
        lambda: single_stream(llm, request),
        lambda: single_stream(llm, warm),
        on_gpu=llm.engine.model.device.type == "cuda",
    )
    device = [event.time_range for event in events]
    stages = sum(record.stages[name] for name in ("host_to_device", "vision", "prefill", "sample"))
    return {
        "ttft_ms": 1e3 * record.ttft,
        "trace_ms": whole.time_range.elapsed_us() / 1e3,
        "device_stages_ms": 1e3 * stages if device else None,
        "device_span_ms": (max(r.end for r in device) - min(r.start for r in device)) / 1e3 if device else None,
        "device_busy_ms": sum(r.elapsed_us() for r in device) / 1e3 if device else None,
    }


@dataclass(frozen=True)
class Load:
    """Requests as bench_serving's options of the same names describe them."""

    num_prompts: int
    max_concurrency: int
    random_input_len: int
    random_output_len: int
    random_range_ratio: float
    image_resolution: str
    image_count: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_concurrency", "random_input_len", "random_output_len"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")
        if not 0 <= self.random_range_ratio <= 1:
            raise OptionError(f"--random-range-ratio {self.random_range_ratio}: a number from 0 to 1 is needed")
        for name in ("image_count", "seed"):
            if getattr(self, name) < 0:
                raise OptionError(f"--{name.replace('_', '-')} {getattr(self, name)}: 0 or more is needed")
        parse_resolution(self.image_resolution)

    def requests(self, llm: LLM, images: Images, count: int, turn: int = 0, who: int = 0) -> list[TimedRequest]:
        """``count`` requests. Lengths depend on the seed and ``turn``; what stands in them depends on ``who`` too.

        So variants of one turn have the same work, and none finds the images or texts of another in a cache.
        """
        lengths, contents = np.random.default_rng([self.seed, turn]), np.random.default_rng([self.seed, turn, who, 1])
        input_lens = random_lengths(self.random_input_len, self.random_range_ratio, count, lengths)
        output_lens = random_lengths(self.random_output_len, self.random_range_ratio, count, lengths)
        resolution = parse_resolution(self.image_resolution)
        return [
            make_request(
                llm.processor.tokenizer,
                [images.take(resolution, contents) for _ in range(self.image_count)],
                text_len,
                output_len,
                contents,
                images.video_frames,
            )
            for text_len, output_len in zip(input_lens, output_lens, strict=True)
        ]


def single_grid(
    llm: LLM, images: Images, sizes: list[str], text_lens: list[int], repeats: int, seed: int, step: Progress
) -> Iterator[dict[str, Any]]:
    """Time to first token over image sizes (or the files of a directory) and text lengths; two warm-ups a cell."""
    sources = images.names or sizes
    for number, source in enumerate(sources):
        for text_len in text_lens:
            rng = np.random.default_rng([seed, number, text_len])
            records = []
            for _ in range(repeats + 2):
                data = images.files[number] if images.files else images.take(parse_resolution(source), rng)
                request = make_request(llm.processor.tokenizer, [data], text_len, 1, rng, images.video_frames)
                records.append(single_stream(llm, request))
                step("single stream")
            yield _cell(source, text_len, records[2:])


def _cell(source: str, text_len: int, records: list[Record]) -> dict[str, Any]:
    samples = [record.as_dict() for record in records]
    shares = [sum(record.stages[name] for name in STAGE_COLUMNS) / record.ttft for record in records]
    return {
        "image": source,
        "text_len": text_len,
        "text_tokens": round(statistics.median(record.text_tokens for record in records)),
        "vision_tokens": records[0].vision_tokens,
        "ttft": summary([record.ttft for record in records]),
        "stages": median_stages(samples),
        "stages_over_total": statistics.median(shares),
        "samples": samples,
    }


def cold_request(llm: LLM, images: Images, load: Load, load_seconds: float) -> dict[str, Any]:
    """The first request of the process, and how long after the start of the process it had its first token."""
    [request] = load.requests(llm, images, 1, turn=10**6)
    record = single_stream(llm, TimedRequest(request.messages, 1))
    age, since = process_age(), time.perf_counter() - record.token_times[0]
    kind = f"video(s) of {images.video_frames} frames" if images.video_frames else "image(s)"
    what = f"{load.image_count} {kind} of {images.names[0] if images.names else load.image_resolution}"
    start_to_first_token = None if age is None else age - since
    return {
        **record.as_dict(),
        "image": what,
        "load_seconds": load_seconds,
        "start_to_first_token": start_to_first_token,
    }


def process_age() -> float | None:
    """Seconds since the kernel made this process, interpreter and imports included, to a hundredth; None off Linux."""
    try:
        # The name of the program, in brackets, may hold spaces; the start is the 20th value behind it, in clock ticks.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run_closed_loop(
    llm: LLM, images: Images, load: Load, warmups: int, temperature: float, step: Progress
) -> dict[str, Any]:
    """The serving benchmark, once."""
    for request in load.requests(llm, images, warmups, turn=10**6 + 1):
        single_stream(llm, request, temperature)
    requests = load.requests(llm, images, load.num_prompts)
    records, duration = closed_loop(llm, requests, load.max_concurrency, temperature, done=lambda: step("closed loop"))
    metrics = serving_metrics(records, duration)
    return {"metrics": metrics, "samples": [record.as_dict() for record in records]}


def compare(
    llm: LLM, images: Images, load: Load, names: list[str], workload: str, rounds: int, repeats: int, step: Progress
) -> dict[str, Any]:
    """Variants in turns, in an order that is reversed from round to round, each round with requests of its own.

    ``workload`` is ``"single"`` (``repeats`` requests a round, one after the other) or ``"closed loop"``. The speed-up
    of a variant is over the first one, round by round.
    """
    peer = TransformersPeer(llm) if TRANSFORMERS in names else None
    rows: dict[str, dict[str, Any]] = {
        name: {"rounds": rounds, "ttft_ms": [], "requests_per_second": [], "host_us_per_moe_layer": [], "samples": []}
        for name in names
    }
    for name in names:  # compile and warm what the variant needs
        for request in load.requests(llm, images, 2, turn=10**6 + 2):
            single_stream_as(llm, name, request, peer)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            row = rows[name]
            count = repeats if workload == "single" else load.num_prompts
            requests = load.requests(llm, images, count, turn, who=names.index(name))
            if workload == "single":
                started = time.perf_counter()
                records = [single_stream_as(llm, name, TimedRequest(r.messages, 1), peer) for r in requests]
                duration = time.perf_counter() - started
            else:
                with variant(llm, name):
                    records, duration = closed_loop(llm, requests, load.max_concurrency)
            row["ttft_ms"].append(1e3 * statistics.fmean(record.ttft for record in records))
            row["requests_per_second"].append(len(records) / duration)
            row["samples"] += [record.as_dict() for record in records]
            if name not in (TRANSFORMERS, "graphs"):  # a replay makes no launches, and transformers' layers are its own
                with variant(llm, name):
                    row["host_us_per_moe_layer"].append(host_us_per_layer(llm, requests[0]))
            step(f"{workload}, {name}")
    for row in rows.values():
        row["speed_up"] = speed_up(rows[names[0]]["ttft_ms"], row["ttft_ms"])
    return rows
