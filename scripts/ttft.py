"""How long until the first token? One request at a time, under load, and side by side with other ways to run it.

    python scripts/ttft.py --load-format dummy --json ttft.json --plot ttft.png       # 30B sizes, random weights: 80 GB
    python scripts/ttft.py --model Qwen/Qwen3-VL-30B-A3B-Instruct
    python scripts/ttft.py --load-format dummy --workload single --compare per_call,lru,owned --against transformers
    python scripts/ttft.py --load-format dummy --video-frames 64 --sizes 360p --text-lens 128 --workload single
    python scripts/ttft.py --model demo --sizes 224x224 --num-prompts 8 --max-concurrency 3   # anywhere: a try-out
    python scripts/ttft.py --model demo --timeline timeline.png --trace trace.json            # what happened when

The single stream covers a grid of image sizes and text lengths, from encoded bytes and text to the first token on the
host, split by stage. The first request of the process is reported apart, with the time from the start of the process
to its token: run the program twice to see what Triton's cache on disk saves. The closed loop takes its options, their
meaning and its table from sglang's bench_serving, in process instead of over HTTP. Definitions stand in
scripts/benchmarking/statistics.py, and what the variants of --compare are in scripts/benchmarking/variants.py.
No prompt is taken from the cache. Exit status: 0, or 2 if something in the call has to be mended.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tqdm import tqdm

import cli_options as cli
from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

WORKLOADS = {"single": ("single",), "closed-loop": ("closed loop",), "both": ("single", "closed loop")}
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: cli.ModelOrSizes = None,
    load_format: cli.LoadFormatOrSizes = "auto",
    routing: cli.Routing = "balanced",
    device: cli.Device = "auto",
    moe: cli.Moe = "auto",
    kv_cache_dtype: cli.KvCacheDtype = "auto",
    tensor_parallel_size: cli.TensorParallelSize = 1,
    data_parallel_size: cli.OneEngine = 1,
    eager: cli.Eager = False,
    workload: Annotated[str, typer.Option(help="single, closed-loop, both.")] = "both",
    sizes: Annotated[str, typer.Option(help="Single stream: image sizes, HEIGHTxWIDTH.")] = (
        "224x224,560x560,1024x1024,1080x1920"
    ),
    text_lens: Annotated[str, typer.Option(help="Single stream: tokens of text.")] = "128,1024",
    repeats: Annotated[int, typer.Option(help="Single stream: warm requests per cell, or variant and round.")] = 20,
    num_prompts: Annotated[int, typer.Option(help="Closed loop: requests.")] = 256,
    max_concurrency: Annotated[int, typer.Option(help="Closed loop: requests at a time.")] = 32,
    random_input_len: Annotated[int, typer.Option(help="Most tokens of text.")] = 128,
    random_output_len: Annotated[int, typer.Option(help="Most tokens of answer.")] = 32,
    random_range_ratio: Annotated[float, typer.Option(help="Least length, as part of the most.")] = 0.1,
    image_resolution: Annotated[str, typer.Option(help="HEIGHTxWIDTH, 4k, 1080p, 720p, 360p.")] = "560x560",
    image_format: Annotated[str, typer.Option(help="jpeg or png.")] = "jpeg",
    video_frames: Annotated[
        int, typer.Option(help="Videos instead of images, of which so many frames are taken, two of each second.")
    ] = 0,
    image_count: Annotated[int, typer.Option(help="Images per request.")] = 1,
    image_content: Annotated[str, typer.Option(help="random pixels, drawn shapes, blank.")] = "random",
    images: Annotated[Path | None, typer.Option(help="Directory of image files instead of made-up ones.")] = None,
    seed: Annotated[int, typer.Option(help="Of lengths, texts and images.")] = 1,
    warmup_requests: Annotated[int, typer.Option(help="Closed loop: requests before it.")] = 1,
    temperature: Annotated[float, typer.Option(help="Closed loop: 0 is greedy.")] = 0.0,
    compare: Annotated[str | None, typer.Option(help="Variants to run in turns, the first is the baseline.")] = None,
    against: Annotated[str | None, typer.Option(help="transformers: one more variant (single stream only).")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of a comparison.")] = 5,
    profile: Annotated[bool, typer.Option(help="Check one request against a profiler trace.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Everything, samples included.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A picture of distributions and stages.")] = None,
    timeline_file: Annotated[
        Path | None,
        typer.Option(
            "--timeline", help="A picture of one request (stages, kernels) and of every step of a closed loop."
        ),
    ] = None,
    trace_file: Annotated[
        Path | None, typer.Option("--trace", help="The same as a Chrome trace, .json: open it in ui.perfetto.dev.")
    ] = None,
) -> None:
    """Measure the time to first token, and serving under load, on this machine."""
    options = dict(locals())
    del options["data_parallel_size"]
    import torch  # slow to import: not before --help has been answered

    results: dict[str, Any] = {}
    try:
        try:
            cli.require_one_engine(data_parallel_size, "gsm8k.py times several")
            run(options, results)
        finally:  # what has been measured is shown and kept, whatever became of the rest
            if "cold" in results:
                show(results)
                write(results, json_file)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except torch.OutOfMemoryError:
        stderr.print(
            "error: the device is out of memory; the 30B sizes need an 80 GB card to themselves: end what else runs on "
            "it, or lower --max-concurrency, --image-resolution or --sizes"
        )
        raise typer.Exit(2) from None
    draw(results, plot_file, timeline_file)


def run(options: dict[str, Any], results: dict[str, Any]) -> None:
    """Check the options, load, measure; see the module for what is measured. ``results`` takes each part at once."""
    from benchmarking import report, timeline, workloads
    from benchmarking.card import card
    from benchmarking.inputs import Images, parse_resolution
    from benchmarking.variants import TRANSFORMERS, check_names, check_variants, has_graphs
    from benchmarking.watch import Watch

    # All that can be wrong is found before the weights are loaded, as far as it can be known.
    kinds = _kinds(options)
    load = workloads.Load(**{name: options[name] for name in workloads.Load.__dataclass_fields__})
    frames = options["video_frames"]
    if frames < 0 or (frames and options["images"] is not None):
        raise OptionError(f"--video-frames {frames}: 0 or more is needed, and no --images beside it")
    sources = Images(options["images"], options["image_content"], options["image_format"], load.image_count, frames)
    sizes = [size.strip() for size in options["sizes"].split(",")]
    for size in sizes:
        parse_resolution(size)
    text_lens = _integers("--text-lens", options["text_lens"])
    names = check_names(options["compare"] or "")

    started = time.perf_counter()
    llm = load_llm(options)
    load_seconds = time.perf_counter() - started
    if options["against"]:
        names = [*(names or ["graphs" if has_graphs(llm) else "eager"]), TRANSFORMERS]
    check_variants(names, llm)
    results |= {"environment": report.environment(llm), "options": _plain(options)}
    stderr.print(report.heading(results["environment"]))
    if names:
        total = len(kinds) * options["rounds"] * len(names)
    else:
        cells = len(sources.names or sizes) * len(text_lens)
        per_kind = {"single": cells * (options["repeats"] + 2), "closed loop": load.num_prompts}
        total = sum(per_kind[kind] for kind in kinds)
    # Variants bring engines of their own, whose kernels may compile.
    with tqdm(total=total) as bar, nullcontext() if names else Watch(llm) as watch:
        results["cold"] = workloads.cold_request(llm, sources, load, load_seconds)

        def step(what: str) -> None:
            bar.set_description(what)
            bar.update()

        if names:
            counts = options["rounds"], options["repeats"]
            for kind in kinds:
                found = workloads.compare(llm, sources, load, names, kind, *counts, step)
                results.setdefault("comparison", {})[kind] = found
        else:
            if "single" in kinds:
                cell_options = sizes, text_lens, options["repeats"], load.seed
                results["single"] = []
                results["single"].extend(workloads.single_grid(llm, sources, *cell_options, step))  # cell by cell
            if "closed loop" in kinds:
                warmups, temperature = options["warmup_requests"], options["temperature"]
                results["closed_loop"] = workloads.run_closed_loop(llm, sources, load, warmups, temperature, step)
    if watch is not None:
        results["watched"] = watch.lines()
    # The clocks under load, not those of an idle card.
    results["environment"]["card_after"] = card(llm.engine.model.device)
    if options["profile"]:
        results["profiler"] = workloads.profiler_check(llm, sources, load)
    if options["timeline_file"] or options["trace_file"]:
        results["timeline"] = timeline.record(llm, sources, load)


def load_llm(options: dict[str, Any]) -> Any:
    """The model that the options ask for."""
    from benchmarking.loading import load_llm as load

    # Every prompt is computed whole, also where the files of --images come round again.
    engine = {"enforce_eager": options["eager"], "enable_prefix_caching": False}
    engine |= {name: options[name] for name in ("kv_cache_dtype", "tensor_parallel_size")}
    if options["model"] is None:
        # Beside weights of the 30B sizes, memory is for requests, not for length; a video is long.
        engine["max_model_len"] = 65536 if options["video_frames"] else 16384
    same = {name: options[name] for name in ("load_format", "device", "moe")}
    routing = options["routing"] if options["load_format"] != "auto" else None
    return load(options["model"], routing=routing, **same, **engine)


def _kinds(options: dict[str, Any]) -> tuple[str, ...]:
    """The workloads; raises OptionError for options that do not fit together."""
    if options["workload"] not in WORKLOADS:
        raise OptionError(f"--workload {options['workload']!r} is unknown; choose from {', '.join(WORKLOADS)}")
    if options["load_format"] == "auto" and options["model"] is None:
        raise OptionError("give --model a checkpoint, or measure random weights at the 30B sizes: --load-format dummy")
    if options["against"] not in (None, "transformers"):
        raise OptionError(f"--against {options['against']!r} is unknown; only transformers can be compared in process")
    if options["against"] and options["workload"] != "single":
        raise OptionError("--against transformers takes one request at a time: add --workload single")
    for name in ("repeats", "rounds"):
        if options[name] < 1:
            raise OptionError(f"--{name} {options[name]}: at least 1 is needed")
    for name in ("temperature", "warmup_requests"):
        if not options[name] >= 0:
            raise OptionError(f"--{name.replace('_', '-')} {options[name]}: 0 or more is needed")
    from benchmarking.figures import check_figure, check_file

    for name in ("json_file", "trace_file"):
        check_file(options[name])
    for name in ("plot_file", "timeline_file"):
        check_figure(f"--{name.removesuffix('_file')}", options[name])
    return WORKLOADS[options["workload"]]


def _integers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise OptionError(f"{name} {text!r} is not a list of positive integers such as 128,1024")
    return [int(part) for part in parts]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def show(results: dict[str, Any]) -> None:
    """The tables, on stdout."""
    from benchmarking import report
    from benchmarking.statistics import serving_table

    wide = None if sys.stdout.isatty() else report.TABLE_WIDTH
    out = Console(highlight=False, markup=False, soft_wrap=True, width=wide)
    out.print(results["environment"]["command"])
    out.print(report.heading(results["environment"]))
    out.print(report.cold_line(results["cold"]))
    if results.get("single"):
        out.print(report.single_table(results["single"], results["environment"]["max_pixels"]), soft_wrap=False)
    if "closed_loop" in results:
        out.print(serving_table(results["closed_loop"]["metrics"], results["options"]["max_concurrency"]))
    for kind, comparison in results.get("comparison", {}).items():
        out.print(report.comparison_table(kind, comparison), soft_wrap=False)
    for line in results.get("watched", ()):
        out.print(line)
    if "profiler" in results:
        found = {name: f"{value:.2f}" for name, value in results["profiler"].items() if value is not None}
        out.print("profiler: " + ", ".join(f"{name} {value}" for name, value in found.items()))


def write(results: dict[str, Any], json_file: Path | None) -> None:
    """All that was measured, and the trace."""
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    if "timeline" in results and (trace_file := results["options"]["trace_file"]):
        from benchmarking.timeline import write_trace

        write_trace(Path(trace_file), results["timeline"], results["environment"])


def draw(results: dict[str, Any], plot_file: Path | None, timeline_file: Path | None) -> None:
    """The pictures that were asked for."""
    from benchmarking import figures

    if plot_file is not None:
        figures.plot_report(results, plot_file)
    if timeline_file is not None:
        figures.plot_timeline(results["timeline"], timeline_file, results["environment"])


if __name__ == "__main__":
    any_text()
    app()
