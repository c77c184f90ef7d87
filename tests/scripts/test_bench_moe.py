"""The timing programs: routings, floors, the baseline, the flow of both programs with a fake timer, their errors."""

import contextlib
import json
import math
import types

import pytest
import torch
import typer
from typer.testing import CliRunner

import tma_moe
from benchmarking import card, hf_stack, moe, moe_layer
from benchmarking.card import Ceilings
from benchmarking.moe import Candidate, CudaTimer, MoeShape, draw_routing, floor_us, grouped_mm_moe
from scripts import bench_hf, bench_moe
from tma_moe.descriptor_policies import current_descriptor_policy

TINY = MoeShape(num_experts=6, experts_per_token=2, hidden_size=16, expert_width=8)


class FakeTimer:
    """Runs every candidate once and makes the times up; what the programs do around it is real."""

    def __init__(self):
        self.calls: dict[tuple[str, str], int] = {}

    def card(self):
        return {"name": "fake card"}

    def ceilings(self):
        return Ceilings(bytes_per_second=1e9, flops_per_second=1e12)

    def graph_us(self, candidates):
        for name, candidate in candidates.items():
            candidate.run()
            self.calls["graph", name] = candidate.num_calls
        return {name: [20.0, 10.0, 30.0] for name in candidates}

    def eager_us(self, candidates, seconds=1.0):
        for name, candidate in candidates.items():
            candidate.run()
            self.calls["eager", name] = candidate.num_calls
        return {name: {"total": [50.0, 60.0], "host": [40.0, 41.0]} for name in candidates}

    def replayed(self, call):
        return call()


def run_tiny(**changes):
    options = {"tokens": [1, 5], "routings": ("uniform", "zipf"), "num_layers": 5, "timer": FakeTimer()} | changes
    return moe_layer.run(TINY, **options, backend="reference", device="cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_routing_gives_distinct_experts_and_weights_that_sum_to_one(kind):
    shape = MoeShape(num_experts=7, experts_per_token=7)
    topk_ids_TK, topk_weights_TK = draw_routing(kind, 50, shape, seed=3)
    assert topk_ids_TK.dtype == torch.int32
    assert torch.equal(topk_ids_TK.sort(dim=1).values, torch.arange(7, dtype=torch.int32).expand(50, 7))
    torch.testing.assert_close(topk_weights_TK.sum(1), torch.ones(50))
    again = draw_routing(kind, 50, shape, seed=3)
    assert torch.equal(again[0], topk_ids_TK)
    assert not torch.equal(draw_routing(kind, 50, shape, seed=4)[0], topk_ids_TK)


def test_uniform_routing_is_even_and_zipf_is_not():
    shape = MoeShape(num_experts=32, experts_per_token=1)
    loads = {}
    for kind in ("uniform", "zipf"):
        loads[kind] = draw_routing(kind, 32000, shape, seed=0)[0].flatten().bincount(minlength=32).float()
    # A binomial count with mean 1000 has a standard deviation of 31; six of them.
    assert (loads["uniform"] - 1000).abs().max() < 6 * math.sqrt(1000)
    harmonic = sum(1 / rank for rank in range(1, 33))
    expected = 32000 / harmonic / torch.arange(1, 33)
    assert torch.all((loads["zipf"].sort(descending=True).values - expected).abs() < 6 * expected.sqrt())


def test_unknown_routing_is_named():
    with pytest.raises(ValueError, match="'normal' is unknown: choose uniform or zipf"):
        draw_routing("normal", 1, TINY, seed=0)


def test_floor_counts_touched_experts_once():
    shape = MoeShape()
    assert shape.expert_bytes(2) == 9_437_184
    assert shape.flops(1) == 75_497_472
    ceilings = Ceilings(bytes_per_second=3.0e12, flops_per_second=798e12)
    one_token = torch.arange(8, dtype=torch.int32)[None]
    us, limit = floor_us(shape, one_token, ceilings)
    assert (round(us, 1), limit) == (25.2, "memory")
    # three tokens of the same experts read the same bytes
    assert floor_us(shape, one_token.expand(3, 8), ceilings)[0] == us, (
        "three tokens of the same experts read the same bytes"
    )
    all_experts = torch.arange(16384 * 8, dtype=torch.int32).view(16384, 8) % 128
    us, limit = floor_us(shape, all_experts, ceilings)
    assert (round(us), limit) == (1550, "math")


def test_grouped_mm_baseline_equals_the_reference():
    torch.manual_seed(0)
    # grouped_mm wants rows of whole 16 bytes; expert 0 stays empty.
    experts = tma_moe.ExpertWeights.from_checkpoint(torch.randn(5, 32, 24), torch.randn(5, 24, 16), "transformers5")
    x_TH, topk_weights_TK = torch.randn(9, 24), torch.rand(9, 2)
    topk_ids_TK = torch.stack([1 + torch.randperm(4)[:2] for _ in range(9)]).int()
    out = grouped_mm_moe(x_TH, topk_ids_TK, topk_weights_TK, experts.gate_up, experts.down)
    expected = tma_moe.fused_moe(x_TH, topk_ids_TK, topk_weights_TK, experts, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_the_portable_kernels_stand_beside_those_for_hopper(monkeypatch):
    fused_moe, asked = tma_moe.fused_moe, []

    def recorded(*operands, backend):
        asked.append(backend)
        return fused_moe(*operands, backend="reference") * (1.5 if wrong and backend == "triton" else 1.0)

    monkeypatch.setattr(tma_moe, "fused_moe", recorded)
    options = {"tokens": [5], "routings": ("uniform",), "num_layers": 4, "timer": FakeTimer()}
    for wrong in (False, True):
        [row] = moe_layer.run(TINY, **options, backend="tma", device="cpu", dtype=torch.bfloat16)["points"]
        assert row["graph"].keys() == {"fused_moe", "triton", "grouped_mm"}
        assert row["correct"] == (not wrong)
    assert {"tma", "triton"} <= set(asked)
    row["graph"]["triton"] = [1234.5]
    with moe_layer.console.capture() as captured:
        moe_layer.console.print(moe_layer.graph_table({"points": [row]}))
    assert "1234.5" in captured.get()


def test_the_first_backend_that_runs(monkeypatch):
    monkeypatch.setattr(tma_moe, "unavailable", lambda *_, backend: None if backend == "triton" else "no Hopper")
    assert moe.first_that_runs("auto") == ("triton", None)
    assert moe.first_that_runs("tma") == ("tma", "no Hopper")
    with pytest.raises(ValueError, match="'cuda' is unknown: choose auto, tma or triton"):
        moe.first_that_runs("cuda")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("128,8,2048", "not four positive integers"),
        ("a,b,c,d", "not four"),
        ("8,9,64,64", "9 experts per token"),
        ("8,0,64,64", "not four"),
    ],
)
def test_bad_shapes(text, message):
    with pytest.raises(ValueError, match=message):
        MoeShape.parse(text)


def test_shape_round_trip_and_tokens():
    assert str(MoeShape.parse("128,8,2048,768")) == "128,8,2048,768"
    assert moe.parse_tokens("32,1,32") == [1, 32]
    for text in ("", "0,1", "x"):
        with pytest.raises(ValueError, match="not a list of positive integers"):
            moe.parse_tokens(text)


def test_spread_and_relative_error():
    assert moe.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert moe.spread([7.0])["p80"] == 7.0
    one = torch.ones(4)
    assert moe.relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert moe.relative_error(one * float("nan"), one) == float("inf")


def test_run_measures_every_point():
    timer = FakeTimer()
    results = run_tiny(timer=timer)
    assert [(row["routing"], row["tokens"]) for row in results["points"]] == [
        ("uniform", 1),
        ("uniform", 5),
        ("zipf", 1),
        ("zipf", 5),
    ]
    assert timer.calls == {("graph", name): 4 for name in ("fused_moe", "grouped_mm")} | {
        ("eager", name): 5 for name in ("per_call", "lru", "owned", "grouped_mm")
    }
    first, last = results["points"][0], results["points"][-1]
    assert first["floor_us"] == pytest.approx(2 * TINY.expert_bytes(2) / 1e9 * 1e6)
    assert first["correct"]
    assert set(first["eager"]) == {"per_call", "lru", "owned", "grouped_mm"}
    assert set(first["descriptors"]) == {"per_call", "lru", "owned"}
    assert "eager" not in last, "host work does not depend on the routing"
    assert json.loads(json.dumps(results))["shape"] == "6,2,16,8"


def test_what_was_measured_is_there_after_an_error():
    class Failing(FakeTimer):
        def graph_us(self, candidates):
            if len(results["points"]) == 2:
                raise torch.OutOfMemoryError("no room for a third")
            return super().graph_us(candidates)

    results = {}
    with pytest.raises(torch.OutOfMemoryError):
        run_tiny(timer=Failing(), results=results)
    assert [row["tokens"] for row in results["points"]] == [1, 5]
    moe_layer.graph_table(results)


def test_report_writes_json_and_plot_and_the_tables_show_the_numbers(tmp_path, capsys):
    results = run_tiny()
    bench_moe.report(results, tmp_path / "out.json", tmp_path / "out.png")
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "20.0" in printed, "the median of replay"
    assert "55.0 (40.5)" in printed, "the medians of eager launches"
    shown = CliRunner().invoke(
        app(bench_moe.main), ["--load", str(tmp_path / "out.json"), "--plot", str(tmp_path / "b.png")]
    )
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_a_wrong_result_fails_the_program(monkeypatch, capsys):
    right = tma_moe.fused_moe

    def wrong(x_TH, *args, **kwargs):
        y_TH = right(x_TH, *args, **kwargs)
        if x_TH.shape[0] == 5 and current_descriptor_policy() == "lru":
            y_TH[2, 3] = float("nan")
        return y_TH

    monkeypatch.setattr(tma_moe, "fused_moe", wrong)
    results = run_tiny(routings=("uniform",))
    assert [row["correct"] for row in results["points"]] == [True, False]
    with pytest.raises(typer.Exit) as stopped:
        bench_moe.report(results, None, None)
    assert stopped.value.exit_code == 1
    assert "wrong results at uniform T=5" in capsys.readouterr().err


def app(main):
    program = typer.Typer()
    program.command()(main)
    return program


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (bench_moe, ["--shape", "1,2"], "not four positive integers"),
        (bench_moe, ["--tokens", "0"], "not a list of positive integers"),
        (bench_moe, ["--routing", "zipf,odd"], "choose uniform, zipf"),
        (bench_moe, ["--json", "/no/such/folder/x.json"], "/no/such/folder does not exist"),
        (bench_moe, ["--load", "/no/such/file"], "not a results file"),
        (bench_hf, ["--tokens", "one"], "not a list of positive integers"),
        (bench_hf, ["--json", "/no/such/folder/x.json"], "/no/such/folder does not exist"),
    ],
)
def test_option_errors_are_one_line(program, arguments, message):
    outcome = CliRunner().invoke(app(program.main), arguments)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert message in outcome.stderr


@pytest.mark.parametrize("program", [bench_moe, bench_hf])
def test_a_machine_without_hopper_is_told_so(program):
    reason = tma_moe.unavailable("cuda", torch.bfloat16)
    if reason is None:
        pytest.skip("this machine has a Hopper GPU")
    outcome = CliRunner().invoke(app(program.main), [])
    assert outcome.exit_code == 2
    assert outcome.stderr == f"error: nothing to measure here: {reason}\n"


def test_transformers_bench_runs_and_tables(capsys):
    widths = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts": 6}
    widths |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 16}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    with torch.inference_mode():
        model = hf_stack.text_stack(2, widths, rope, "cpu", torch.bfloat16)
        assert next(model.parameters()).dtype == torch.bfloat16
        results = hf_stack.run(model, [1, 450], FakeTimer(), ours="tma_moe_reference", rounds=2)
    assert results["correct"], results["errors"]
    assert [sorted(point["ms"]) for point in results["points"]] == [
        ["batched_mm", "grouped_mm", "tma_moe_reference"],
        ["eager", "grouped_mm", "tma_moe_reference"],
    ]
    assert results["points"][0]["ms"]["grouped_mm"] == [0.05, 0.06] * 2
    hf_stack.console.print(hf_stack.table(results, "tma_moe_reference"))
    assert "1.00x" in capsys.readouterr().out


@pytest.fixture
def fake_cuda(monkeypatch):
    """A torch.cuda that checks how it is used, on a clock that goes on only when a test adds to `state["now"]`."""
    state = {"now": 0.0, "recording": None}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = state["now"]

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    class Graph:
        def replay(self):
            for run in self.runs:
                run()

    @contextlib.contextmanager
    def graph(captured):
        captured.runs = state["recording"] = []
        yield
        state["recording"] = None

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(moe, "time", types.SimpleNamespace(perf_counter=lambda: state["now"]))
    return state


def test_cuda_timer_divides_by_the_calls(fake_cuda):
    """Every call takes a known time: what the timer says per call must be just that."""

    def candidate(seconds):
        def work():
            fake_cuda["now"] += seconds

        def run():
            for _ in range(4):
                if fake_cuda["recording"] is not None:
                    fake_cuda["recording"].append(work)
                else:
                    work()

        return Candidate(run, 4)

    timer = CudaTimer(samples=5, sample_us=8000)
    candidates = {"fast": candidate(0.001), "slow": candidate(0.003)}
    eager = timer.eager_us(candidates)
    for samples in (
        timer.graph_us(candidates),
        *({n: s[kind] for n, s in eager.items()} for kind in ("total", "host")),
    ):
        assert samples == {"fast": pytest.approx([1000] * 5), "slow": pytest.approx([3000] * 5)}


def test_replayed_is_what_the_graph_computes(fake_cuda):
    out = torch.zeros(3)

    def call():
        if fake_cuda["recording"] is not None:
            fake_cuda["recording"].append(lambda: out.fill_(2.0))
        return out

    assert torch.equal(CudaTimer().replayed(call), torch.full((3,), 2.0))


def test_clocks_come_from_nvidia_smi_and_its_absence_is_no_error(monkeypatch, tmp_path):
    def properties(device):
        number = 2 if device.index is None else device.index  # the current one
        return types.SimpleNamespace(uuid=f"0000-{number}", name=f"some card {number}")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "card of $3, 580.1, 1980 MHz, 1980 MHz, 3201 MHz, 700.00 W, 40"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = CudaTimer().card()
    assert found["clocks.sm"] == "1980 MHz"
    assert found["name"] == "card of --id=GPU-0000-2", "a machine of several cards is asked about the current one"
    assert card.card("cuda:1")["name"] == "card of --id=GPU-0000-1"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert CudaTimer().card() == {"name": "some card 2"}
    tool.write_text("#!/bin/sh\necho 'too, few, fields'\n")
    assert CudaTimer().card() == {"name": "some card 2"}


def test_a_cpu_has_a_name_and_ceilings_too():
    assert list(card.card("cpu")) == ["name"]
    found = card.ceilings("cpu")
    # Some machine's: a copy of memory and a product of matrices, far from zero and from what nothing can do.
    assert 1e8 < found.bytes_per_second < 1e14
    assert 1e8 < found.flops_per_second < 1e17


def test_ceilings_count_bytes_both_ways_and_two_operations_a_product(monkeypatch):
    monkeypatch.setattr(card, "median_seconds", lambda run, device: (run(), 0.5)[1])
    found = card.ceilings("cpu")
    assert found.bytes_per_second == 2 * 4 * 2**23 / 0.5
    assert found.flops_per_second == 2 * 512**3 / 0.5
