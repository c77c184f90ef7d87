"""What does the server cost? The closed loop of ttft.py in process and over HTTP, in turns, with one model.

    python scripts/bench_serving.py --load-format dummy --model DIR      # 30B sizes, random weights: 80 GB
    python scripts/bench_serving.py --load-format dummy --max-concurrency 32,256 --num-prompts 512 --rounds 1
    python scripts/bench_serving.py --model demo --image-resolution 128x160 --num-prompts 64 --max-concurrency 4,16
    python scripts/bench_serving.py --model demo --pretend-device --max-concurrency 32,256     # no GPU

The engine runs in this process, what clients talk to in another one, and the client in a third; both ways get requests
of the same sizes, with pictures and texts of their own. With --pretend-device, steps take the time that they take on a
GPU and none of this machine's cores, and it is told for how long the device would have waited for the host. Options,
their meaning and the tables are those of sglang's bench_serving, which can be pointed at scripts/serve.py itself
(docs/serving.md). Exit status: 0, or 2 if something in the call has to be mended.
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import cli_options as cli
from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
WAYS = ("in process", "over HTTP")


@app.command()
def main(
    model: cli.ModelOrSizes = None,
    load_format: cli.LoadFormatOrSizes = "auto",
    routing: cli.Routing = "balanced",
    device: cli.Device = "auto",
    moe: cli.Moe = "auto",
    num_prompts: Annotated[int, typer.Option(help="Requests.")] = 256,
    max_concurrency: Annotated[str, typer.Option(help="Requests at a time; several with commas between them.")] = "32",
    random_input_len: Annotated[int, typer.Option(help="Most tokens of text.")] = 128,
    random_output_len: Annotated[int, typer.Option(help="Most tokens of answer.")] = 32,
    random_range_ratio: Annotated[float, typer.Option(help="Least length, as part of the most.")] = 0.1,
    image_resolution: Annotated[str, typer.Option(help="HEIGHTxWIDTH, 4k, 1080p, 720p, 360p.")] = "560x560",
    image_format: Annotated[str, typer.Option(help="jpeg or png.")] = "jpeg",
    image_count: Annotated[int, typer.Option(help="Images per request.")] = 1,
    image_content: Annotated[str, typer.Option(help="random pixels, drawn shapes, blank.")] = "random",
    seed: Annotated[int, typer.Option(help="Of lengths, texts and images.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often each way has its turn.")] = 3,
    pretend_device: Annotated[
        bool, typer.Option(help="On a CPU: steps that take a GPU's time, to see what the host adds to them.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="The figures of all rounds.")] = None,
) -> None:
    """Measure a server beside the same work in process, on this machine."""
    try:
        from benchmarking.inputs import Images
        from benchmarking.loading import load_llm
        from benchmarking.pretended import PretendedDevice
        from benchmarking.workloads import Load

        loads = []
        for text in max_concurrency.split(","):
            if not text.strip().isdigit():
                raise OptionError(f"--max-concurrency {max_concurrency!r} is no list of numbers such as 32,256")
            sizes = (random_input_len, random_output_len, random_range_ratio, image_resolution, image_count, seed)
            loads.append(Load(num_prompts, int(text), *sizes))
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: at least 1 is needed")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise OptionError(f"{json_file} cannot be written: there is no directory {json_file.parent}")
        images = Images(None, image_content, image_format, image_count)
        options: dict[str, Any] = {"enable_prefix_caching": False}
        if model is None:
            options["max_model_len"] = 16384  # memory is for requests, not for length
        if pretend_device:
            if device not in ("auto", "cpu"):
                raise OptionError(f"--pretend-device and --device {device} contradict each other")
            device = "cpu"
            options |= {"max_model_len": 1024, "max_num_seqs": 512, "num_blocks": 40_000}
        made = {"load_format": load_format, "device": device, "moe": moe}
        llm = load_llm(model, routing=routing if load_format != "auto" else None, **made, **options)
        idle = PretendedDevice(llm).idle if pretend_device else None
        results = measure(llm, images, loads, rounds, idle)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


def measure(
    llm: Any, images: Any, loads: list[Any], rounds: int, idle: list[float] | None = None
) -> list[dict[str, Any]]:
    """All rounds of all loads; tables and comparisons go to stdout as they are made.

    Args:
        idle: where a pretended device notes how long it waited for the host before each step.
    """
    from benchmarking.report import environment, heading
    from benchmarking.serving import closed_loop, single_stream
    from benchmarking.statistics import serving_metrics, serving_table, summary

    out = Console(highlight=False, markup=False, soft_wrap=True)
    out.print(heading(environment(llm)))
    results = []
    for load in loads:
        first = load.requests(llm, images, 2, turn=10**6 + 1)
        for request in first:  # whatever is done once
            single_stream(llm, request)
        metrics: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
                requests = load.requests(llm, images, load.num_prompts, turn, who=WAYS.index(way))
                before = 0 if idle is None else len(idle)
                if way == "in process":
                    found = serving_metrics(*closed_loop(llm, requests, load.max_concurrency))
                else:
                    found = over_http(llm, requests, load.max_concurrency, first)
                if idle is not None:
                    found["idle"] = summary(idle[before:])
                metrics[way].append(found)
                stderr.print(f"{way}, {load.max_concurrency} at a time, round {turn + 1} of {rounds}", style="dim")
        for way in WAYS:
            out.print(f"\n{way}, the last round")
            out.print(serving_table(metrics[way][-1], load.max_concurrency))
        compared = {
            "concurrency": load.max_concurrency,
            "rounds": metrics,
            "mean TTFT": _ratio([found["ttft"]["mean"] for way in WAYS for found in metrics[way]]),
            "requests/s": _ratio([found["request_throughput"] for way in WAYS for found in metrics[way]]),
        }
        units = {"mean TTFT": "ms", "requests/s": "1/s"}
        if idle is not None:
            units["device idle a step"] = "ms"
            compared["device idle a step"] = _ratio([found["idle"]["mean"] for way in WAYS for found in metrics[way]])
        for name, unit in units.items():
            before, after, ratio = compared[name]
            out.print(f"{name}: {before:.1f} {unit} in process, {after:.1f} {unit} over HTTP: {ratio:.3f} times")
        results.append(compared)
    if len(results) > 1:
        out.print(f"\nrequests/s at {' and '.join(str(each['concurrency']) for each in results)} at a time")
        for number, way in enumerate(WAYS):
            out.print(f"{way}: " + ", ".join(f"{each['requests/s'][number]:.1f}" for each in results))
    return results


def _ratio(values: list[float]) -> tuple[float, float, float]:
    """Medians of both halves, and of their pairwise ratios."""
    half = len(values) // 2
    before, after = values[:half], values[half:]
    ratios = [b / max(a, 1e-9) for a, b in zip(before, after, strict=True)]
    return statistics.median(before), statistics.median(after), statistics.median(ratios)


def over_http(llm: Any, requests: list[Any], concurrency: int, first: Sequence[Any] = ()) -> dict[str, Any]:
    """The closed loop through a server, by a client in another process.

    Args:
        first: requests that come before it, for whatever is done once.
    """
    from benchmarking.statistics import Record, serving_metrics, summary

    bodies = b"\n".join(json.dumps(_body(request)).encode() for request in [*first, *requests])
    folder = Path(__file__).resolve().parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    with _served(llm) as url:
        command = [sys.executable, "-m", "benchmarking.http_client", url, str(concurrency), str(len(first))]
        done = subprocess.run(command, input=bodies, capture_output=True, env=environment)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise OptionError(f"the client failed: {lines[-1]}")
    found = json.loads(done.stdout)
    records = []
    for each in found["records"]:
        details = each["usage"]["prompt_tokens_details"]
        vision = details["image_tokens"] + 2 * len(requests[0].messages[0]["content"][:-1])  # with what stands around
        text = each["usage"]["prompt_tokens"] - vision
        records.append(Record(each["start"], each["times"], text, vision, {}))
    metrics = serving_metrics(records, found["duration"])
    # Tokens without a text (half a character, a special one) are no chunk, but they were made.
    counts = [each["usage"]["completion_tokens"] for each in found["records"]]
    pairs = zip(records, counts, strict=True)
    metrics["tpot"] = summary([(one.latency - one.ttft) / (count - 1) for one, count in pairs if count > 1])
    written = sum(counts)
    metrics["output_tokens"], metrics["output_throughput"] = written, written / found["duration"]
    metrics["total_throughput"] = (metrics["input_tokens"] + written) / found["duration"]
    return metrics


def _body(request: Any) -> dict[str, Any]:
    """What bench_serving sends."""
    (message,) = request.messages
    content = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(item["image"]).decode()},
        }
        if item["type"] == "image"
        else item
        for item in message["content"]
    ]
    asked = {"temperature": 0.0, "max_completion_tokens": request.output_len, "stream": True, "ignore_eos": True}
    return {"model": "model", "messages": [{**message, "content": content}], **asked}


@contextmanager
def _served(llm: Any) -> Iterator[str]:
    try:
        from qwen3vl_moe.server.limits import Limits
        from qwen3vl_moe.server.run import Server, bind
    except ImportError as error:
        raise OptionError(f"{error.name} is missing: pip install 'qwen3vl-moe[serve]'") from None
    ready = threading.Event()
    limits = replace(Limits(), waiting=4096)
    server = Server(llm, bind("127.0.0.1", 0), "model", limits, say=lambda _: ready.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not ready.wait(0.1) and thread.is_alive():
            time.sleep(0)
        yield server.address
    finally:
        server.stop()
        thread.join()


if __name__ == "__main__":
    any_text()
    app()
