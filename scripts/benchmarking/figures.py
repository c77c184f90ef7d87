"""Pictures of measurements: distributions and stages, throughput over running sequences, timelines.

Curves differ by their line as well as by their colour, legends stand outside of the axes, and the title says the model,
its weights, the card and the versions.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarking.report import STAGE_COLUMNS, median_stages
from benchmarking.step_profile import KINDS
from benchmarking.timeline import seats
from qwen3vl_moe.errors import OptionError

SUFFIXES = (".png", ".pdf", ".svg")
# Colours that people with the usual kinds of colour blindness can tell apart (Okabe and Ito), and lines for the rest.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C", "#F0E442")
LINES = ("-", "--", "-.", ":")
MOST_CURVES = 6
LUMP = "vision + prefill"  # transformers' stages are not told apart
_STAGES = dict(zip((*STAGE_COLUMNS, LUMP), COLOURS, strict=False))
_KIND_COLOURS = dict(zip((*KINDS, "copies"), COLOURS, strict=True))


def check_figure(option: str, path: Path | None) -> None:
    """Raises OptionError where a picture could not be drawn or written, before anything is measured for it."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"{option} {path}: a name ending in .png, .pdf or .svg is needed")
    check_file(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(f"{option} needs matplotlib: pip install 'qwen3vl-moe[bench]'") from None


def check_file(path: Path | None) -> None:
    """Raises OptionError where a file cannot be written for want of a directory."""
    if path is not None and not path.absolute().parent.is_dir():
        raise OptionError(f"{path} cannot be written: there is no directory {path.parent}")
    if path is not None and path.is_dir():
        raise OptionError(f"{path} cannot be written: it is a directory")


@contextmanager
def figure(path: Path, environment: dict[str, Any], title: str, rows: int, columns: int, **options: Any) -> Iterator:
    """The axes of a figure that is written on leaving; ``options`` are of ``matplotlib.pyplot.subplots``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    try:
        drawn.suptitle(f"{title}\n{_about(environment)}", fontsize=10)
        yield axes
        drawn.savefig(path, dpi=130)
    finally:
        pyplot.close(drawn)


def _about(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions)
    weights = "random weights" if environment["weights"] == "random" else "the checkpoint's weights"
    return f"{environment['settings']['model']}, {weights}; {environment['card']['name']}; {shown}"


def plot_report(results: dict[str, Any], path: Path) -> None:
    """Distributions of the time to first token, and medians of its stages, of what scripts/ttft.py has measured."""
    bars, loop = _single_bars(results), _loop_bars(results)
    widths = [5, max(2.0, 0.55 * len(bars)), max(1.0, 0.55 * len(loop))]
    panels = [width for width, there in zip(widths, (True, bars, loop), strict=True) if there]
    size = 3.5 + 1.05 * sum(panels), 4.8
    with figure(
        path, results["environment"], "Time to first token", 1, len(panels), figsize=size, width_ratios=panels
    ) as axes:
        left, *rest = axes[0]
        curves, left_out = _distributions(results)
        for number, (name, samples) in enumerate(curves.items()):
            ordered = sorted(1e3 * value for value in samples)
            shares = [i / len(ordered) for i in range(len(ordered) + 1)]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
            left.step([ordered[0], *ordered], shares, where="post", label=name, **style)
        left.set(xlabel="time to first token, ms", ylabel="share of requests", title="distribution" + left_out)
        left.set_xscale("log")
        left.xaxis.set_major_formatter("{x:g}")
        left.xaxis.set_minor_formatter("{x:g}")
        left.tick_params(axis="x", which="both", labelsize=7, rotation=45)
        left.title.set_fontsize(9)
        left.set_ylim(0, 1.01)
        left.grid(alpha=0.3)
        left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, frameon=False)
        titles = [title for title, there in (("one at a time", bars), ("closed loop", loop)) if there]
        for axis, title, each in zip(rest, titles, [found for found in (bars, loop) if found], strict=True):
            _stack(axis, each, title)
        if rest:
            handles, labels = [], []
            for axis in rest:
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                    if label not in labels:
                        handles.append(handle)
                        labels.append(label)
            rest[-1].legend(handles, labels, fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)


def _stack(axis: Any, bars: dict[str, dict[str, float]], title: str) -> None:
    """Stages as parts of bars, in ms."""
    bottom = [0.0] * len(bars)
    for stage, colour in _STAGES.items():
        heights = [1e3 * stages.get(stage, 0.0) for stages in bars.values()]
        if any(heights):
            hatch = "//" if stage == LUMP else None
            label = stage.replace("_", " ")
            axis.bar(range(len(bars)), heights, 0.7, bottom=bottom, label=label, color=colour, hatch=hatch)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axis.set_xticks(range(len(bars)), list(bars), rotation=40, ha="right", fontsize=7)
    axis.set(ylabel="ms", title=f"stages, medians\n{title}")
    axis.title.set_fontsize(9)


def _distributions(results: dict[str, Any]) -> tuple[dict[str, list[float]], str]:
    """At most MOST_CURVES curves, and what the title says if there are more samples than that."""
    found = {}
    for workload, comparison in results.get("comparison", {}).items():
        for name, row in comparison.items():
            found[f"{workload}: {name}"] = [record["ttft"] for record in row["samples"]]
    cells = results.get("single", [])
    loop = {"closed loop": results["closed_loop"]["samples"]} if "closed_loop" in results else {}
    shortest = min((cell["text_len"] for cell in cells), default=0)
    few = len(cells) + len(loop) > MOST_CURVES
    shown = [cell for cell in cells if not few or cell["text_len"] == shortest][: MOST_CURVES - len(loop)]
    for cell in shown:
        found[f"{cell['image']}, {cell['text_len']} tokens of text"] = [record["ttft"] for record in cell["samples"]]
    for name, samples in loop.items():
        found[name] = [record["ttft"] for record in samples]
    return found, f" ({len(shown)} of {len(cells)} single cells)" if len(shown) < len(cells) else ""


def _single_bars(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    bars = {f"{cell['image']}, {cell['text_len']}": cell["stages"] for cell in results.get("single", [])}
    for name, row in results.get("comparison", {}).get("single", {}).items():
        stages = median_stages(row["samples"])
        if name == "transformers":
            stages = stages | {LUMP: stages.get("prefill", 0.0), "prefill": 0.0}
        bars[name] = stages
    return bars


def _loop_bars(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    comparison = results.get("comparison", {}).get("closed loop", {})
    bars = {name: median_stages(row["samples"]) for name, row in comparison.items()}
    if "closed_loop" in results:
        bars[f"{results['options']['max_concurrency']} at a time"] = median_stages(results["closed_loop"]["samples"])
    return bars


def decode_speeds(steps: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    """Tokens per second of steps that only decode, by how many sequences they had; of the log of timeline.py."""
    found: dict[int, list[float]] = {}
    for before, step in pairwise(steps):
        # A step that was launched ahead waits for the one before it.
        seconds = step["read"] - max(step["launched"], before["read"])
        if not step["prefill_tokens"] and step["decoding"] and seconds > 0:
            found.setdefault(step["decoding"], []).append(step["decoding"] / seconds)
    return found


def plot_scaling(
    curves: dict[str, dict[int, Sequence[float]]], path: Path, environment: dict[str, Any], title: str
) -> None:
    """Tokens per second over running sequences: medians, and the middle half of the steps as a band."""
    with figure(path, environment, title, 1, 1, figsize=(7.5, 4.8)) as axes:
        axis = axes[0][0]
        for number, (name, speeds) in enumerate(curves.items()):
            counts = sorted(speeds)
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}
            medians = [statistics.median(speeds[count]) for count in counts]
            axis.plot(counts, medians, marker="o", markersize=3, label=name, **style)
            if any(len(speeds[count]) > 3 for count in counts):
                quarters = [
                    statistics.quantiles(speeds[n], n=4) if len(speeds[n]) > 1 else 3 * [speeds[n][0]] for n in counts
                ]
                low, high = [q[0] for q in quarters], [q[2] for q in quarters]
                axis.fill_between(counts, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="sequences in the step", ylabel="answer tokens per second", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def plot_timeline(timeline: dict[str, Any], path: Path, environment: dict[str, Any]) -> None:
    """One request: stages, and kernels of the device. One closed loop: its requests, and what each step held."""
    loop = timeline["loop"]
    height = 0.13 * (max(seats(loop["requests"])) + 1)
    ratios = [1.3, max(1.6, min(height, 4.0)), 1.2, 1.2]
    with figure(
        path, environment, "Timelines", 4, 1, figsize=(11, 2.5 + 1.35 * sum(ratios)), height_ratios=ratios
    ) as axes:
        one, requests, decoding, prefill = (row[0] for row in axes)
        _draw_request(one, timeline["request"])
        for row, (begin, first, end) in zip(seats(loop["requests"]), loop["requests"], strict=True):
            requests.barh(row, first - begin, 0.8, begin, color=COLOURS[1], edgecolor="white", linewidth=0.3)
            requests.barh(row, end - first, 0.8, first, color=COLOURS[0])
        for colour, label in ((COLOURS[1], "to the first token"), (COLOURS[0], "the rest of the answer")):
            requests.barh(0, 0, color=colour, label=label)
        title = f"closed loop: {len(loop['requests'])} requests, {loop['max_concurrency']} at a time"
        requests.set_yticks([])
        requests.set(ylabel="requests, by seat", title=title)
        edges, held = _steps(loop["steps"])
        for key, axis, label, colour in (
            ("decoding", decoding, "sequences that decode", COLOURS[0]),
            ("waiting", decoding, "sequences that wait", COLOURS[4]),
            ("prefill_tokens", prefill, "prompt tokens", COLOURS[2]),
        ):
            style = {"color": colour, "linewidth": 0.8, "linestyle": "--" if key == "waiting" else "-"}
            axis.stairs(held[key], edges, label=label, **style)
            axis.stairs(held[key], edges, fill=True, color=colour, alpha=0.35)
            axis.set_ylim(0, 1.1 * max([1, *held[key], *(held["decoding"] if axis is decoding else [])]))
        decoding.set(ylabel="sequences", title="what each step held")
        prefill.set(ylabel="tokens", xlabel="s")
        ended = max((*[end for *_, end in loop["requests"]], *edges))
        for axis in (requests, decoding, prefill):
            axis.set_xlim(0, ended)
        for axis in (one, requests, decoding, prefill):
            axis.title.set_fontsize(9)
            axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _draw_request(axis: Any, request: dict[str, Any]) -> None:
    for stage, begin, seconds in request["stages"]:
        label = f"{stage.replace('_', ' ')} {1e3 * seconds:.1f} ms"
        axis.barh(1, 1e3 * seconds, 0.7, 1e3 * begin, color=_STAGES[stage], label=label)
    shown = set()
    for kind, _, begin, seconds in request["kernels"]:
        label = None if kind in shown else kind
        shown.add(kind)
        axis.barh(0, 1e3 * seconds, 0.7, 1e3 * begin, color=_KIND_COLOURS[kind], label=label)
    rows = ["device", "stages"] if request["kernels"] else ["stages"]
    axis.set_yticks([0, 1] if request["kernels"] else [1], rows)
    axis.set_ylim(-0.6 if request["kernels"] else 0.2, 1.8)
    title = f"one request: {1e3 * request['ttft']:.1f} ms to its first token"
    axis.set(xlabel="ms", title=title, xlim=(0, None))


def _steps(steps: Sequence[dict[str, Any]]) -> tuple[list[float], dict[str, list[float]]]:
    """Edges and heights of stairs: each step from when it could begin to its tokens, and nothing in between."""
    edges, held = [0.0], {"decoding": [], "waiting": [], "prefill_tokens": []}
    for step in sorted(steps, key=lambda each: each["read"]):
        begin = max(step["launched"], edges[-1])
        for key, heights in held.items():
            heights += [0, step[key]]
        edges += [begin, max(step["read"], begin)]
    return edges, held
