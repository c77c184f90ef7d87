"""When what happened: one request on host and device, and every step of a closed loop; also as a Chrome trace.

A timeline is plain data (:func:`record`), which figures.py draws and :func:`chrome_trace` writes for Perfetto
(https://ui.perfetto.dev) and chrome://tracing. It is measured apart from the figures of a report: a profiler and a log
of steps cost a little time of their own.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarking.inputs import TimedRequest
from benchmarking.serving import closed_loop, single_stream
from benchmarking.step_profile import KINDS, traced
from qwen3vl_moe.engine import LLM
from qwen3vl_moe.engine.chunks import Decoding

# Of a request, in their order; "decode" is left out, as these requests end with their first token.
STAGES = ("preprocess", "queue", "host_to_device", "vision", "prefill", "sample")
MOST_REQUESTS = 256  # of a closed loop that is drawn


@contextmanager
def step_log(llm: LLM) -> Iterator[list[dict[str, Any]]]:
    """Within it, each step of the engine adds an entry.

    ``launched`` to ``handed`` is the host's work until the device has all of it, ``read`` is when its tokens were on
    the host (``time.perf_counter``). ``prefill_tokens``, ``decoding`` (sequences), ``images`` and ``waiting``
    (sequences) are what it held; ``tokens`` is how many it gave.
    """
    runner, log, open_steps = llm.engine.runner, [], {}
    launch, read = runner.launch, runner.read

    def logged_launch(chunks, *after):
        started = time.perf_counter()
        launched = launch(chunks, *after)
        if isinstance(chunks, Decoding):
            prefill, decoding, tokens = 0, len(chunks), len(chunks)
        else:
            prefill = sum(chunk.stop - chunk.start for chunk in chunks if chunk.is_prefill)
            decoding = sum(not chunk.is_prefill for chunk in chunks)
            tokens = sum(chunk.samples for chunk in chunks)
        entry = {"launched": started, "handed": time.perf_counter(), "prefill_tokens": prefill, "decoding": decoding}
        entry |= {"images": len(launched.encoded), "waiting": len(llm.engine.scheduler.waiting), "tokens": tokens}
        open_steps[id(launched)] = entry
        return launched

    def logged_read(launched):
        result = read(launched)
        if (entry := open_steps.pop(id(launched), None)) is not None:
            log.append(entry | {"read": time.perf_counter()})
        return result

    runner.launch, runner.read = logged_launch, logged_read
    try:
        yield log
    finally:
        runner.launch, runner.read = launch, read


def record(llm: LLM, images: Any, load: Any) -> dict[str, Any]:
    """One warm request, and a closed loop with an entry for every step; ``images`` and ``load`` as in workloads.py.

    Returns:
        ``request``: ``stages`` [(name, begin, seconds)] and ``kernels`` [(kind, name, begin, seconds)] (none on a CPU),
        in seconds from its submission. ``loop``: ``steps`` as of :func:`step_log` and ``requests`` [(begin, first
        token, end)], in seconds from its start, with ``max_concurrency``.
    """
    on_gpu = llm.engine.model.device.type == "cuda"
    warm, request = (TimedRequest(r.messages, 1) for r in load.requests(llm, images, 2, turn=10**6 + 5))
    seen, whole, events = traced(lambda: single_stream(llm, request), lambda: single_stream(llm, warm), on_gpu=on_gpu)
    began = whole.time_range.start
    kernels = [
        (_kind(event.name), event.name, (event.time_range.start - began) / 1e6, event.time_range.elapsed_us() / 1e6)
        for event in events
    ]
    requests = load.requests(llm, images, min(load.num_prompts, MOST_REQUESTS), turn=10**6 + 6)
    started = time.perf_counter()
    with step_log(llm) as log:
        records, _ = closed_loop(llm, requests, load.max_concurrency)
    times = "launched", "handed", "read"
    steps = [entry | {name: entry[name] - started for name in times} for entry in log]
    spans = sorted((r.start - started, r.token_times[0] - started, r.token_times[-1] - started) for r in records)
    loop = {"steps": steps, "requests": spans, "max_concurrency": load.max_concurrency}
    return {"request": {"stages": _stages(seen.stages), "kernels": kernels, "ttft": seen.ttft}, "loop": loop}


def _stages(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    """Stages one after the other, as they follow in a request that is alone."""
    placed, at = [], 0.0
    for name in STAGES:
        placed.append((name, at, seconds.get(name, 0.0)))
        at += seconds.get(name, 0.0)
    return placed


def _kind(name: str) -> str:
    if re.match(r"mem(cpy|set)", name, re.IGNORECASE):
        return "copies"
    return next(kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE))


def seats(requests: Sequence[tuple[float, float, float]]) -> list[int]:
    """A row for each request of a closed loop, in which it is alone while it lasts; the lowest that is free."""
    ends: list[float] = []
    rows = []
    for begin, _, end in requests:
        row = next((number for number, until in enumerate(ends) if until <= begin), len(ends))
        ends[row : row + 1] = [end]
        rows.append(row)
    return rows


def chrome_trace(timeline: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """The timeline as trace events: a process for the request, one for the closed loop."""
    events: list[dict[str, Any]] = []

    def name(kind: str, text: str, pid: int, tid: int = 0) -> None:
        events.append({"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": text}})

    def span(text: str, pid: int, tid: int, begin: float, seconds: float, **args: Any) -> None:
        place = {"pid": pid, "tid": tid, "ts": 1e6 * begin, "dur": 1e6 * seconds}
        events.append({"ph": "X", "name": text, **place, "args": args})

    request, loop = timeline["request"], timeline["loop"]
    name("process", "one request", 1)
    name("thread", "stages", 1, 1)
    for stage, begin, seconds in request["stages"]:
        span(stage.replace("_", " "), 1, 1, begin, seconds)
    for kind, kernel, begin, seconds in request["kernels"]:
        span(kernel, 1, 2, begin, seconds, kind=kind)
    if request["kernels"]:
        name("thread", "kernels and copies of the device", 1, 2)
    name("process", f"closed loop, {loop['max_concurrency']} at a time", 2)
    # Two threads: a step may be launched while the tokens of the one before are waited for.
    name("thread", "engine: launching steps (host)", 2, 1)
    name("thread", "engine: steps until their tokens are read", 2, 2)
    last_read = 0.0
    for number, step in enumerate(loop["steps"]):
        held = {key: step[key] for key in ("prefill_tokens", "decoding", "images", "waiting", "tokens")}
        span(f"launch {number}", 2, 1, step["launched"], step["handed"] - step["launched"], **held)
        row = 2 if step["launched"] >= last_read else 3
        last_read = step["read"] if row == 2 else last_read
        if row == 3 and not any(event.get("tid") == 3 for event in events):
            name("thread", "engine: steps launched ahead", 2, 3)
        span(_title(step), 2, row, step["launched"], step["read"] - step["launched"], step=number, **held)
        for counter in ("decoding", "prefill_tokens", "waiting"):
            place = {"name": counter.replace("_", " "), "pid": 2, "ts": 1e6 * step["launched"]}
            events.append({"ph": "C", **place, "args": {counter: step[counter]}})
    for number, (row, (begin, first, end)) in enumerate(zip(seats(loop["requests"]), loop["requests"], strict=True)):
        span(f"request {number}: to its first token", 2, 10 + row, begin, first - begin)
        span(f"request {number}: the rest", 2, 10 + row, first, end - first)
    for row in sorted(set(seats(loop["requests"]))):
        name("thread", f"seat {row + 1}", 2, 10 + row)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": environment}


def _title(step: dict[str, Any]) -> str:
    parts = [f"{step['decoding']} decode"] if step["decoding"] else []
    parts += [f"{step['prefill_tokens']} prompt tokens"] if step["prefill_tokens"] else []
    return " + ".join(parts) or "step"


def write_trace(path: Path, timeline: dict[str, Any], environment: dict[str, Any]) -> None:
    path.write_text(json.dumps(chrome_trace(timeline, environment)) + "\n", encoding="utf-8")
