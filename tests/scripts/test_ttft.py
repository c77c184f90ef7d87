"""scripts/ttft.py: the definitions against samples made by hand, and the whole program on the demo checkpoint."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarking import report, variants
from benchmarking.inputs import Images, make_image, parse_resolution, random_lengths
from benchmarking.loading import load_llm
from benchmarking.serving import closed_loop, single_stream
from benchmarking.statistics import Record, serving_metrics, serving_table, speed_up, summary
from benchmarking.variants import TransformersPeer, variant
from benchmarking.workloads import Load, compare
from qwen3vl_moe.engine import LLM
from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.image_source import decode_rgb, open_image
from tests.model.prompts import assert_close_to_scale
from tma_moe.descriptor_policies import current_descriptor_policy

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SMALL = ["--model", "demo", "--device", "cpu", "--image-resolution", "128x160", "--random-input-len", "24"]
SMALL += ["--random-output-len", "6"]
LOAD = Load(8, 3, 24, 6, 0.5, "64x96", 1, seed=1)


@pytest.fixture(scope="module")
def app():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import ttft
    finally:
        sys.path.remove(str(SCRIPTS))
    return ttft.app


@pytest.fixture(scope="module")
def llm():
    # In fp32, where rounding is too small to send a token to another expert.
    return LLM("demo", device="cpu", dtype="float32", progress=False)


def record(start, times, text=10, vision=6):
    return Record(start, times, text, vision, {})


# --- statistics ---------------------------------------------------------------------------------------------------


def test_definitions_on_a_sample_made_by_hand():
    # Submitted at 1.0; tokens at 1.5, 1.7, 2.5: TTFT 0.5, E2E 1.5, TPOT (1.5 - 0.5) / 2, gaps 0.2 and 0.8.
    # Submitted at 2.0; its only token at 2.1: TTFT = E2E = 0.1, neither TPOT nor gaps.
    found = serving_metrics([record(1.0, [1.5, 1.7, 2.5]), record(2.0, [2.1], vision=0)], duration=2.0)
    assert found["ttft"]["mean"] == pytest.approx(300)
    assert found["e2e"]["median"] == pytest.approx(800)
    assert found["tpot"]["count"] == 1
    assert found["tpot"]["mean"] == pytest.approx(500)
    assert found["itl"]["count"] == 2
    assert found["itl"]["mean"] == pytest.approx(500)
    assert found["itl"]["max"] == pytest.approx(800)
    tokens = {name: found[name] for name in ("input_text_tokens", "input_vision_tokens", "output_tokens")}
    assert tokens == {"input_text_tokens": 20, "input_vision_tokens": 6, "output_tokens": 4}
    assert found["request_throughput"] == 1.0
    assert found["input_throughput"] == 13.0
    assert found["output_throughput"] == 2.0
    assert found["total_throughput"] == 15.0
    assert found["concurrency"] == pytest.approx((1.5 + 0.1) / 2)


def test_peaks_are_counted_by_the_second():
    # Seconds from the first submission: the third request begins in the second in which the first one ends.
    records = [record(5.0, [5.2, 6.3]), record(5.1, [5.3, 5.4]), record(6.4, [7.9])]
    found = serving_metrics(records, duration=3.0)
    assert found["peak_output_throughput"] == 3  # 5.2, 5.3 and 5.4
    assert found["peak_concurrency"] == 2


def test_percentiles_are_numpys():
    samples = np.random.default_rng(0).exponential(size=101)
    found = summary(samples)
    for percent in (90, 95, 99):
        assert found[f"p{percent}"] == pytest.approx(1e3 * np.percentile(samples, percent))
    assert found["median"] == pytest.approx(1e3 * np.median(samples))
    assert found["std"] == pytest.approx(1e3 * np.std(samples))
    assert summary([])["count"] == 0


def test_speed_up_is_taken_round_by_round():
    assert speed_up([2.0, 3.0, 4.0], [1.0, 2.0, 4.0]) == {"median": 1.5, "min": 1.0, "max": 2.0}


def test_the_table_has_the_rows_of_bench_serving():
    table = serving_table(serving_metrics([record(0.0, [0.25, 0.5])], 0.5), max_concurrency=32)
    rows = dict(re.findall(r"^(\S.*?): +(\S+)$", table, re.MULTILINE))
    assert rows["Successful requests"] == "1"
    assert rows["Max request concurrency"] == "32"
    assert rows["Benchmark duration (s)"] == "0.50"
    assert rows["Total input vision tokens"] == "6"
    assert rows["Mean TTFT (ms)"] == "250.00"
    assert rows["P99 ITL (ms)"] == "250.00"
    for name in ("E2E Latency", "TTFT", "TPOT", "ITL"):
        assert {f"Mean {name} (ms)", f"Median {name} (ms)", f"P99 {name} (ms)"} <= set(rows)


def test_the_age_of_a_process_counts_from_before_its_first_line():
    code = "import time; time.sleep(0.5); from benchmarking.workloads import process_age"
    code += "; print(process_age(), time.time())"
    began = time.time()
    path = os.pathsep.join(map(str, (SCRIPTS, SCRIPTS.parent, SCRIPTS.parent / "kernels")))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    age, now = map(float, done.stdout.split())
    # The kernel counts in ticks of a hundredth of a second; making the process is what the two clocks may differ by.
    assert max(0.5, now - began - 0.5) < age <= now - began + 0.02


# --- inputs -------------------------------------------------------------------------------------------------------


def test_lengths_span_the_range_of_the_ratio():
    lengths = random_lengths(20, 0.25, 2000, np.random.default_rng(0))
    assert set(lengths) == set(range(5, 21))
    assert set(random_lengths(3, 0.0, 200, np.random.default_rng(0))) == {1, 2, 3}


def test_resolutions():
    assert parse_resolution("1080x1920") == parse_resolution("1080p") == (1080, 1920)
    for wrong in ("560", "0x10", "axb", "1x2x3"):
        with pytest.raises(OptionError, match=wrong):
            parse_resolution(wrong)


@pytest.mark.parametrize("content", ["drawn", "random", "blank"])
@pytest.mark.parametrize("file_format", ["jpeg", "png"])
def test_made_up_images(content, file_format):
    data = make_image(content, (48, 80), file_format, np.random.default_rng(0))
    image = decode_rgb(open_image(data, 0))
    assert (image.height, image.width) == (48, 80)
    colours = len(image.getcolors(48 * 80))
    assert colours == 1 if content == "blank" else colours > 3


def test_variants_of_a_round_have_equal_work_and_no_text_in_common(llm):
    images = Images(None, "random", "jpeg", 1)
    first, again, other = (LOAD.requests(llm, images, 4, turn=1, who=who) for who in (0, 0, 1))
    contents = [[request.messages[0]["content"] for request in requests] for requests in (first, again, other)]
    assert contents[0] == contents[1]
    assert [r.output_len for r in first] == [r.output_len for r in other]
    assert all(a != b for one, two in zip(contents[0], contents[2], strict=True) for a, b in zip(one, two, strict=True))


def test_images_of_a_directory_are_used_in_turn(tmp_path):
    files = [make_image("drawn", (32, 32), "png", np.random.default_rng(seed)) for seed in range(2)]
    for number, data in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(data)
    images = Images(tmp_path, "random", "jpeg", 1)
    assert [images.take((9, 9), None) for _ in range(3)] == [files[0], files[1], files[0]]


# --- load generators ----------------------------------------------------------------------------------------------


def test_stages_add_up_to_the_total(llm):
    requests = LOAD.requests(llm, Images(None, "random", "jpeg", 1), 9)
    for request in requests[:2]:  # warm
        single_stream(llm, request)
    shares = []
    for request in requests[2:]:
        found = single_stream(llm, request)
        shares.append(sum(found.stages.values()) / found.latency)
        assert min(found.stages.values()) >= 0
        assert all(found.stages[name] > 0 for name in ("preprocess", "host_to_device", "vision", "prefill", "sample"))
    # The median: a busy machine may stop the process for milliseconds between two stages.
    assert np.median(shares) == pytest.approx(1, rel=0.05)


def test_closed_loop_keeps_to_its_limit(llm):
    requests = LOAD.requests(llm, Images(None, "random", "jpeg", 1), 8)
    records, duration = closed_loop(llm, requests, max_concurrency=3)
    assert sorted(len(r.token_times) for r in records) == sorted(r.output_len for r in requests)
    edges = sorted([(r.start, 1) for r in records] + [(r.token_times[-1], -1) for r in records])
    alive = np.cumsum([change for _, change in edges])
    assert alive.max() == 3
    # No sooner than a slot is free is a request submitted, and then at once.
    starts, ends = sorted(r.start for r in records), sorted(r.token_times[-1] for r in records)
    assert all(start >= end for start, end in zip(starts[3:], ends, strict=False))
    assert all(r.token_times == sorted(r.token_times) and r.ttft > 0 for r in records)
    assert max(ends) - min(starts) <= duration
    assert not llm.engine.scheduler.running
    assert not llm.engine.scheduler.waiting


def test_a_request_that_does_not_fit_leaves_nothing_behind(llm):
    requests = LOAD.requests(llm, Images(None, "random", "jpeg", 1), 3)
    requests[1].messages[0]["content"].append({"type": "image", "image": b"no image"})
    with pytest.raises(PromptError):
        closed_loop(llm, requests, max_concurrency=2)
    assert not llm.engine.scheduler.running
    assert not llm.engine.scheduler.waiting


# --- variants and random models -----------------------------------------------------------------------------------


def test_variants_answer_alike_and_put_everything_back(llm):
    image = make_image("drawn", (64, 96), "png", np.random.default_rng(0))
    prompt = llm.processor.chat([{"role": "user", "content": [{"type": "image", "image": image}]}])
    pixels, grids = prompt.images[0].pixel_values, [prompt.images[0].grid_thw]

    def logits():
        return llm.engine.model.logits(prompt.token_ids, pixels, grids)

    expected = logits()
    for name in ("reference", "grouped_mm", "eager"):
        with variant(llm, name):
            assert llm.engine.runner.replays is False
            # The two ways add in different orders: 3e-7 was measured, and 3e-3 where one of them rounds to bf16.
            assert_close_to_scale(logits(), expected, tolerance=1e-5)
    assert llm.engine.runner.replays is True
    assert torch.equal(logits(), expected)


def test_variants_run_what_they_say(llm, monkeypatch):
    before = current_descriptor_policy()
    for name in ("per_call", "lru", "owned"):
        with variant(llm, name):
            assert current_descriptor_policy() == name
    assert current_descriptor_policy() == before

    calls = []
    monkeypatch.setattr(variants, "grouped_mm_moe", lambda x_TH, *rest: calls.append(1) or torch.zeros_like(x_TH))
    request = LOAD.requests(llm, Images(None, "blank", "png", 1), 1)[0]
    with variant(llm, "grouped_mm"):
        single_stream(llm, replace(request, output_len=1))
    assert len(calls) == llm.engine.model.config.text.num_layers


def test_the_closed_loop_can_be_compared(llm):
    images, steps = Images(None, "blank", "png", 1), []
    load = replace(LOAD, num_prompts=3, max_concurrency=2)
    rows = compare(llm, images, load, ["reference", "eager"], "closed loop", 2, 1, steps.append)
    assert steps == [f"closed loop, {name}" for name in ("reference", "eager", "eager", "reference")]
    assert all(len(row["samples"]) == 2 * 3 for row in rows.values())


@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_random_weights_with_drawn_routing(plain, routing):
    llm = load_llm(str(plain.published), load_format="dummy", device="cpu", moe="reference", routing=routing)
    assert "RANDOM WEIGHTS: the answers are noise" in report.heading(report.environment(llm))
    layers = llm.engine.model.text.layers
    x_TH = torch.ones(4000, llm.engine.model.config.text.hidden_size, dtype=llm.engine.model.dtype)
    K = llm.engine.model.config.text.experts_per_token
    chosen = [layer.moe.router(x_TH).topk(K).indices for layer in layers[:2]]
    shares = chosen[0].flatten().bincount(minlength=8) / chosen[0].numel()
    if routing == "balanced":  # the standard deviation of a share is below sqrt(1/8 / 8000)
        assert (shares - 1 / 8).abs().max() < 5 * math.sqrt(1 / 8 / 8000)
    else:  # rank 1 is drawn first with probability 1 / H(8) = 0.37, rank 8 with 0.046
        assert shares.max() > 4 * shares.min()
    assert not torch.equal(chosen[0], chosen[1])
    request = LOAD.requests(llm, Images(None, "blank", "png", 1), 1)[0]
    peer = TransformersPeer(llm)
    gate = peer.twin.model.language_model.layers[0].mlp.gate
    assert torch.equal(gate(x_TH)[2], chosen[0])
    assert peer.first_token(request).vision_tokens == single_stream(llm, request).vision_tokens


# --- the program --------------------------------------------------------------------------------------------------


def test_the_program_measures_and_reports(app, tmp_path):
    json_file, plot_file = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [*SMALL, "--sizes", "64x64,96x64", "--text-lens", "16", "--repeats", "4", "--num-prompts", "8"]
    arguments += ["--max-concurrency", "3", "--profile", "--json", str(json_file), "--plot", str(plot_file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "the checkpoint's weights" in done.output
    assert "Serving Benchmark Result" in done.output
    assert plot_file.stat().st_size > 1000

    results = json.loads(json_file.read_text())
    assert {"command", "card", "versions", "commit", "weights"} <= set(results["environment"])
    assert [cell["image"] for cell in results["single"]] == ["64x64", "96x64"]
    for cell in results["single"]:
        assert cell["ttft"]["count"] == len(cell["samples"]) == 4
        assert cell["stages_over_total"] == pytest.approx(1, abs=0.05)
    metrics, samples = results["closed_loop"]["metrics"], results["closed_loop"]["samples"]
    assert metrics["completed"] == len(samples) == 8
    assert metrics["output_tokens"] == sum(sample["output_tokens"] for sample in samples) <= 8 * 6
    assert metrics["input_tokens"] == metrics["input_text_tokens"] + metrics["input_vision_tokens"]
    assert metrics["input_vision_tokens"] == 8 * (20 + 2)  # 128 x 160 pixels, 32 x 32 a token, and the two markers
    assert metrics["itl"]["count"] == metrics["output_tokens"] - 8
    for name in ("e2e", "ttft", "tpot", "itl"):
        found = metrics[name]
        assert 0 < found["median"] <= found["p90"] <= found["p95"] <= found["p99"] <= found["max"]
    assert metrics["concurrency"] <= 3
    cold = results["cold"]
    assert cold["start_to_first_token"] > cold["load_seconds"] + cold["ttft"] > cold["ttft"] > 0
    assert f"to this first token: {cold['start_to_first_token']:.1f} s" in done.output
    assert results["profiler"]["trace_ms"] > 0


def test_videos_are_timed_like_images(app, tmp_path):
    pytest.importorskip("av", reason="videos need PyAV")
    json_file = tmp_path / "out.json"
    arguments = [*SMALL, "--video-frames", "4", "--sizes", "64x64", "--text-lens", "16", "--repeats", "2"]
    arguments += ["--workload", "single", "--json", str(json_file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    [cell] = json.loads(json_file.read_text())["single"]
    assert cell["vision_tokens"] == 2 * (4 + 2)  # two pairs of frames of 2 x 2 tokens, and their markers
    assert cell["stages_over_total"] == pytest.approx(1, abs=0.05)
    compared = [*arguments[:-2], "--compare", "reference", "--against", "transformers", "--rounds", "1"]
    done = CliRunner().invoke(app, compared)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("failing", "kept"), [("run_closed_loop", {"single"}), ("profiler_check", {"single", "closed_loop"})]
)
def test_what_was_measured_is_kept_where_the_rest_fails(app, tmp_path, monkeypatch, failing, kept):
    def fail(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(f"benchmarking.workloads.{failing}", fail)
    json_file = tmp_path / "out.json"
    arguments = [*SMALL, "--sizes", "64x64", "--text-lens", "16", "--repeats", "1", "--num-prompts", "2"]
    done = CliRunner().invoke(app, [*arguments, "--profile", "--json", str(json_file)])
    assert done.exit_code == 2
    assert "error: the device is out of memory" in done.stderr
    assert "Time to first token" in done.stdout
    results = json.loads(json_file.read_text())
    assert results.keys() >= {"cold", *kept}
    assert len(results["single"]) == 1


def test_the_program_compares(app, tmp_path):
    json_file, plot_file = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [*SMALL, "--workload", "single", "--compare", "reference,eager", "--against", "transformers"]
    arguments += ["--rounds", "2", "--repeats", "2", "--json", str(json_file), "--plot", str(plot_file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "speed-up over" in done.output
    assert plot_file.stat().st_size > 1000
    rows = json.loads(json_file.read_text())["comparison"]["single"]
    assert list(rows) == ["reference", "eager", "transformers"]
    assert all(len(row["ttft_ms"]) == 2 and len(row["samples"]) == 4 for row in rows.values())
    assert rows["reference"]["speed_up"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    gain = rows["eager"]["speed_up"]
    assert gain["min"] <= gain["median"] <= gain["max"]
    assert min(rows["eager"]["host_us_per_moe_layer"]) > 0
    assert rows["transformers"]["host_us_per_moe_layer"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "none/such", "--load-format", "fast"], "--load-format 'fast'"),
        ([], "give --model a checkpoint"),
        (["--load-format", "dummy", "--device", "cpu"], "need a GPU"),
        (["--model", "demo", "--workload", "open-loop"], "--workload 'open-loop'"),
        (["--model", "demo", "--num-prompts", "0"], "--num-prompts 0"),
        (["--model", "demo", "--random-range-ratio", "2"], "--random-range-ratio 2"),
        (["--model", "demo", "--image-count", "-1"], "--image-count -1: 0 or more"),
        (["--model", "demo", "--seed", "-2"], "--seed -2: 0 or more"),
        (["--model", "demo", "--temperature", "nan"], "--temperature nan: 0 or more"),
        (["--model", "demo", "--warmup-requests", "-1"], "--warmup-requests -1: 0 or more"),
        (["--model", "demo", "--image-resolution", "big"], "'big'"),
        (["--model", "demo", "--image-format", "tiff"], "'tiff'"),
        (["--model", "demo", "--image-content", "cats"], "'cats'"),
        (["--model", "demo", "--sizes", "64x64,64"], "'64'"),
        (["--model", "demo", "--text-lens", "a"], "--text-lens 'a'"),
        (["--model", "demo", "--images", "no/such/place"], "no/such/place is not a directory"),
        (["--model", "demo", "--images", str(SCRIPTS)], "holds 0 images"),
        (["--model", "demo", "--data-parallel-size", "2"], "--data-parallel-size 2: this program drives one engine"),
        (["--model", "demo", "--video-frames", "-1"], "--video-frames -1: 0 or more"),
        (["--model", "demo", "--video-frames", "2", "--images", str(SCRIPTS)], "no --images beside it"),
        (["--model", "demo", "--compare", "warp"], "'warp' is unknown"),
        (["--model", "demo", "--compare", "eager,eager"], "named twice"),
        (["--model", "demo", "--against", "vllm"], "--against 'vllm'"),
        (["--model", "demo", "--against", "transformers"], "add --workload single"),
        (["--load-format", "dummy", "--device", "abacus"], "device 'abacus' is unknown"),
        (["--load-format", "dummy", "--routing", "wild"], "routing 'wild'"),
        (["--model", "demo", "--json", str(SCRIPTS)], "it is a directory"),
        (["--model", "demo", "--json", "no/such/place.json"], "cannot be written"),
        (["--model", "demo", "--plot", "out.doc"], "out.doc"),
        (["--model", "demo", "--device", "cpu", "--compare", "owned"], "owned is a way of the fused experts"),
        (["--model", "demo", "--device", "cpu", "--compare", "graphs"], "graphs cannot run here"),
    ],
)
def test_bad_options_fail_with_one_line(app, options, said):
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2, done.output
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said in line
    assert "Traceback" not in done.output


def test_out_of_memory_is_one_line(app, monkeypatch):
    def full(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nMore lines.")

    monkeypatch.setattr(sys.modules[app.registered_commands[0].callback.__module__], "load_llm", full)
    done = CliRunner().invoke(app, SMALL)
    assert done.exit_code == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: the device is out of memory")
