"""Figures, timelines and traces: what they hold, and that tables keep to their width."""

from __future__ import annotations

import io
import json
from itertools import pairwise

import pytest
from rich.console import Console

from benchmarking import figures, report, timeline
from benchmarking.engine_steps import profile_table, scaling
from benchmarking.inputs import Images
from benchmarking.step_profile import KINDS, StepProfile
from benchmarking.workloads import Load
from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.errors import OptionError

STAGES = dict.fromkeys(report.STAGE_COLUMNS, 0.0123)


@pytest.fixture(scope="module")
def llm(plain):
    return LLM(plain.path, device="cpu", progress=False, max_num_seqs=4)


@pytest.fixture(scope="module")
def measured(llm):
    load = Load(6, 2, 12, 5, 0.5, "48x48", 1, 1)
    return timeline.record(llm, Images(None, "blank", "png", 1), load)


def sample(ttft):
    return {"ttft": ttft, "stages": STAGES | {"decode": 0.0}}


def cell(image, text_len, ttft=1.23456):
    statistics = {"count": 20, "median": 1e3 * ttft, "p90": 1234.5, "p99": 12345.6}
    counts = {"text_len": text_len, "text_tokens": text_len + 12, "vision_tokens": 2042}
    stages = {"stages": dict.fromkeys(STAGES, 1.2345), "stages_over_total": 0.9987}
    samples = [sample(ttft * (1 + i / 10)) for i in range(4)]
    return {"image": image, **counts, "ttft": statistics, **stages, "samples": samples}


@pytest.fixture(scope="module")
def results(llm):
    cells = [cell(size, text) for size in ("224x224", "1080x1920", "560x560", "1024x1024") for text in (128, 1024)]
    return {
        "environment": report.environment(llm),
        "options": {"max_concurrency": 32},
        "single": cells,
        "closed_loop": {"samples": [sample(0.1 * i) for i in range(1, 9)]},
    }


def shown(table):
    out = Console(width=report.TABLE_WIDTH, record=True, file=io.StringIO())
    out.print(table)
    return out.export_text()


def test_tables_fit_without_cut_words(results):
    """Of the largest numbers that are likely: each header and value stands whole."""
    text = shown(report.single_table(results["single"], 36864))
    for word in ("preprocess", "prefill", "vision", "1080x1920", "12345.6", "1036", "2042", "1234.5"):
        assert word in text
    assert "Images are shrunk to 36864 pixels at most" in text
    assert "shrunk" not in shown(report.single_table(results["single"], 10**8))
    row = {"rounds": 5, "ttft_ms": [1234.5] * 2, "host_us_per_moe_layer": [1234.5] * 2, "requests_per_second": [12.3]}
    comparison = {
        name: row | {"speed_up": {"median": 1, "min": 0.5, "max": 12.5}} for name in ("per_call", "transformers")
    }
    text = shown(report.comparison_table("closed loop", comparison))
    for word in ("transformers", "speed-up", "1234.5", "0.500-12.500"):
        assert word in text
    step = StepProfile(123.456, 0.5, dict.fromkeys(KINDS, 12.345), 0.1, {})
    names = (
        "decode, batch 1",
        "decode, batch 32",
        "decode, batch 128",
        "prefill of 8192 tokens",
        "vision tower, 32 images",
    )
    text = shown(profile_table(dict.fromkeys(names, step)))
    for word in ("routing and combine", "before the device", "123.46", "prefill", "128"):
        assert word in text


def test_steps_are_logged_as_they_were(measured):
    loop = measured["loop"]
    assert len(loop["requests"]) == 6
    assert all(begin < first <= end for begin, first, end in loop["requests"])
    steps = loop["steps"]
    assert all(step["launched"] <= step["handed"] <= step["read"] for step in steps)
    assert max(step["decoding"] for step in steps) <= 2
    assert sum(step["images"] for step in steps) == 6
    assert max(timeline.seats(loop["requests"])) == 1
    assert sum(step["tokens"] for step in steps) >= 6  # an answer each, at least


def test_stages_of_the_request_follow_each_other(measured):
    stages = measured["request"]["stages"]
    assert [name for name, *_ in stages] == list(timeline.STAGES)
    for (_, begin, seconds), (_, later, _) in pairwise(stages):
        assert later == pytest.approx(begin + seconds)
    assert sum(seconds for *_, seconds in stages) == pytest.approx(measured["request"]["ttft"], rel=0.2)


def test_the_log_leaves_the_engine_as_it_was(llm):
    launch, read = llm.engine.runner.launch, llm.engine.runner.read
    few = SamplingParams(max_tokens=8, ignore_eos=True)
    with timeline.step_log(llm) as log:
        llm.generate(["Hello"] * 2, few)
    assert (llm.engine.runner.launch, llm.engine.runner.read) == (launch, read)
    assert log
    before = len(log)
    llm.generate("Hello", few)
    assert len(log) == before


def test_the_trace_is_what_perfetto_reads(measured, results, tmp_path):
    path = tmp_path / "trace.json"
    timeline.write_trace(path, measured, results["environment"])
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and {"name", "pid", "tid", "ts"} <= event.keys() for event in spans)
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in spans} == named
    assert sum(event["name"].endswith("to its first token") for event in spans) == 6
    # Spans of one row may not overlap, but for rounding: Perfetto would nest them.
    for row in named:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if (e["pid"], e["tid"]) == row)
        assert all(end <= begin + 1e-3 for (_, end), (begin, _) in pairwise(mine))


def test_kernels_have_a_row_and_a_kind(measured, results, tmp_path):
    kernels = [("experts", "weights_m_up", 0.001, 0.002), ("copies", "Memcpy HtoD", 0.0, 0.0005)]
    with_kernels = measured | {"request": measured["request"] | {"kernels": kernels}}
    events = timeline.chrome_trace(with_kernels, results["environment"])["traceEvents"]
    assert [e["args"] for e in events if e["name"] == "weights_m_up"] == [{"kind": "experts"}]
    figures.plot_timeline(with_kernels, tmp_path / "t.png", results["environment"])
    assert [timeline._kind(name) for name in ("Memcpy HtoD (Pinned)", "route_topk", "sm90_xmma_gemm", "else")] == [
        "copies",
        "routing and combine",
        "projections and head",
        "the rest",
    ]


def test_the_report_has_few_curves_that_begin_at_0(results, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, step = [], Axes.step
    monkeypatch.setattr(Axes, "step", lambda axis, x, y, **rest: drawn.append((x, y)) or step(axis, x, y, **rest))
    figures.plot_report(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len(drawn) == 5  # of 8 cells the 4 with the shorter text, and the closed loop
    assert all((y[0], y[-1]) == (0, 1) and len(x) == len(y) for x, y in drawn)


def test_transformers_lump_is_called_one(results):
    rows = {name: {"samples": [sample(0.1)]} for name in ("graphs", "transformers")}
    bars = figures._single_bars({"comparison": {"single": rows}})
    assert bars["transformers"][figures.LUMP] == bars["graphs"]["prefill"] == STAGES["prefill"]
    assert bars["transformers"]["prefill"] == 0
    figures_of = results | {"comparison": {"single": rows}}
    figures_of.pop("single")
    assert "closed loop" in figures._distributions(figures_of)[0]


def test_speeds_of_decoding(tmp_path, results):
    step = {"launched": 0.0, "read": 1.0, "prefill_tokens": 0, "decoding": 2}
    # Launched before the tokens of the step before were read: it waits for them. Steps with prompts do not count.
    steps = [step, step | {"launched": 0.5, "read": 1.5}, step | {"launched": 2, "read": 2.25, "decoding": 1}]
    steps.append(step | {"launched": 3, "read": 4, "prefill_tokens": 7})
    assert figures.decode_speeds(steps) == {2: [4.0], 1: [4.0]}
    rows = [{"sequences": 4, "context": 512, "ms": 8.0, "floor_ms": 2.0}, {"what": "prefill", "ms": 1}]
    rows.append({"sequences": 1, "context": 65000, "ms": 8.0, "floor_ms": 2.0})  # another length: another curve
    assert list(scaling(rows).values()) == [{4: [500.0]}, {4: [2000.0]}]
    figures.plot_scaling(scaling(rows), tmp_path / "s.svg", results["environment"], "Decoding")
    assert (tmp_path / "s.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.gif", "--plot .*plot.gif: a name ending in"),
        ("no/where.png", "there is no directory"),
        (".png", "ending in"),
    ],
)
def test_pictures_that_cannot_be_written(tmp_path, name, message):
    with pytest.raises(OptionError, match=message):
        figures.check_figure("--plot", tmp_path / name)
