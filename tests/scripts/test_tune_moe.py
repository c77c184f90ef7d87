"""The tuner: what it tries, what it rejects, what it finds with a made-up cost, and the file it writes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import typer
from typer.testing import CliRunner

import tma_moe
from benchmarking import moe, tile_output, tile_search, tile_tuning
from benchmarking.moe import Candidate, MoeShape, parse_tokens
from benchmarking.tile_search import ROLES, Resources, families, same_kernel
from scripts import tune_moe
from tests.interpreted import INTERPRETED, run_in_interpreter
from tma_moe import support
from tma_moe import tiles as tile_files
from tma_moe.gemm.product import Sizes, product
from tma_moe.portable.rule import portable_default_choices
from tma_moe.portable.targets import shared_memory
from tma_moe.recipe import make_recipe
from tma_moe.tiles import Choice, Tiles

SHAPE, FP8_SHAPE = MoeShape(), MoeShape(fp8=True)
SMALL = MoeShape(num_experts=8, experts_per_token=2, hidden_size=256, expert_width=128)
CURRENT = tile_files.default_choices(128, 8, 2048, 768)


def cost(choice: Choice) -> float:
    """Fastest: 64 rows, wide columns, most stages; each role counts."""
    return sum(100 + abs(t.rows - 64) - t.cols / 16 - t.stages - t.ctas_per_sm for t in (choice.up, choice.down))


class FakeOp:
    def __init__(self, wrong=(), unlaunchable=()):
        self.wrong, self.unlaunchable, self.launched = set(wrong), set(unlaunchable), set()

    def candidate(self, choice, num_tokens):
        def run():
            if {choice.up, choice.down} & self.unlaunchable:
                raise RuntimeError("out of resource: shared memory")
            self.launched.add(choice)

        return Candidate(run, 4)

    def error(self, choice, num_tokens):
        return 3.0 if {replace(tiles, keep=False) for tiles in (choice.up, choice.down)} & self.wrong else 0.4


class FakeTimer:
    def graph_us(self, candidates):
        assert len(candidates) <= tile_tuning.AT_ONCE
        return {choice: [cost(choice)] * 3 for choice in candidates}


def search(op=None, rejected=None, seconds=1000.0) -> tile_tuning.Search:
    return tile_tuning.Search(SHAPE, op or FakeOp(), FakeTimer(), rejected or {}, time.monotonic() + seconds)


def fastest(num_tokens: int, role: str) -> Tiles:
    together = families(SHAPE, num_tokens)[-1][role]
    return min(together, key=lambda tiles: cost(Choice(None, tiles, tiles)))


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 450, 512, 16384])
def test_candidates_fit_the_machine_and_the_load(num_tokens):
    found = families(SHAPE, num_tokens)
    kernels = [{tiles.kernel for role in ROLES for tiles in family[role]} for family in found]
    expected = [{"gemv"}] if num_tokens <= 16 else []
    expected.append({"weights_m"} if num_tokens < 512 else {"weights_m", "tokens_m_ws", "weights_m_ws"})
    assert kernels == expected
    for family in found:
        for role in ROLES:
            assert len(family[role]) == len(set(family[role])) > 0
            for tiles in family[role]:
                weight_rows = tiles.cols * (2 if role == "up" else 1)
                if tiles.kernel != "gemv":
                    assert tiles.stages * (weight_rows + tiles.rows) * tiles.block_k * 2 <= 232_448
                    # The Gluon kernels' warps are those of one of their two consumers.
                    warps = tiles.warps * (2 if tiles.kernel in support.GLUON_PRODUCTS else 1)
                    accumulators = (
                        144 if tiles.kernel == "weights_m_ws" else 128
                    )  # its producer leaves it more registers
                    assert weight_rows * tiles.rows <= accumulators * 32 * warps


def test_candidates_include_what_is_shipped_by_default():
    tried = {
        (role, same_kernel(tiles))
        for num_tokens in (1, 128, 256, 512, 1024, 8192)
        for family in families(SHAPE, num_tokens)
        for role in ROLES
        for tiles in family[role]
    }
    assert ("up", Tiles("weights_m", 64, 64, 64, 4, 4)) in tried
    assert ("up", tile_files.MANY_UP) in tried
    assert ("down", tile_files.MANY_DOWN) in tried
    assert ("down", same_kernel(Tiles("tokens_m_ws", 128, 256, 64, 4, 4, 1))) in tried
    assert ("up", same_kernel(Tiles("weights_m_ws", 288, 64, 64, 4, 4, 1))) in tried


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 450, 16384])
def test_fp8_has_candidates_of_its_own(num_tokens):
    found = families(FP8_SHAPE, num_tokens)
    kernels = [{tiles.kernel for role in ROLES for tiles in family[role]} for family in found]
    assert kernels == [{"fp8_gemv"}] * (num_tokens <= 16) + [{"fp8_weights_m"}, {"fp8_tokens_m_ws"}]
    assert len(families(replace(FP8_SHAPE, expert_width=80), num_tokens)) == len(found) - 1


@pytest.mark.parametrize("shape", [SHAPE, FP8_SHAPE], ids=str)
@pytest.mark.parametrize("num_tokens", [8, 4096])
def test_the_kernels_take_every_candidate(num_tokens, shape):
    """With and without keep. One that its kernel refuses would silently count as one that does not compile."""
    sizes = Sizes(SHAPE.num_experts, SHAPE.experts_per_token, SHAPE.hidden_size, SHAPE.expert_width, 132)
    for family in families(shape, num_tokens):
        for role in ROLES:
            for tiles in family[role]:
                for choice in tile_tuning.keeping(Choice(None, tiles, tiles)):
                    product(role, choice.up, sizes)


@pytest.mark.parametrize("card", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, FP8_SHAPE], ids=str)
def test_candidates_of_the_portable_kernels(shape, card):
    """Few enough to be timed in three minutes, what is shipped among them, and each is one that its kernel takes."""
    sizes = Sizes(*(shape.num_experts, shape.experts_per_token, shape.hidden_size, shape.expert_width), 132)
    sizes = replace(sizes, a8=card >= (8, 9))
    kernels, timed = set(), 0
    for num_tokens in parse_tokens(tune_moe.DEFAULT_TOKENS["triton"]):
        for family in families(shape, num_tokens, "triton", card):
            assert family["up"]
            assert family["down"]
            timed += sum(map(len, family.values()))
            kernels |= {(role, tiles) for role in ROLES for tiles in family[role]}
    assert timed <= 800
    for role, tiles in kernels:
        if not tiles.kernel.endswith("gemv"):
            product(role, tiles, sizes)
    default = portable_default_choices(128, 8, shape.fp8, card >= (8, 9), shared_memory(card))
    assert ("down", default[1].down) in kernels


def test_a_portable_candidate_compiles_for_its_card():
    tiles = Tiles("fp8_portable", 16, 64, 128, 4, 3, weights_m=True)
    assert tile_search.compile_tiles("up", tiles, replace(SMALL, fp8=True), card=(8, 6)).problem() is None
    assert tile_search.compile_tiles("up", tiles, replace(SMALL, fp8=True), card=(8, 6)).allowed == 101_376
    reason = tile_search.compile_or_reason("up", tiles, replace(SMALL, fp8=True), (8, 9))
    assert "128 columns where it quantises h" in reason


def test_compiled_resources_decide():
    assert Resources(232_448, 255, 0).problem() is None
    assert "233000 bytes of shared memory" in Resources(233_000, 200, 0).problem()
    assert "16 bytes spilled" in Resources(1000, 255, 16).problem()


def test_candidates_compile_for_hopper_in_worker_processes(monkeypatch):
    good, spilling = Tiles("weights_m", 16, 64, 64, 4, 3), Tiles("weights_m", 128, 128, 64, 4, 3)
    monkeypatch.setattr(tile_tuning, "families", lambda *_: [{"up": [good, spilling], "down": [good]}])
    rejected = tile_tuning.compile_all(SMALL, [16, 32], 2, "tma", (9, 0))
    assert set(rejected) == {("up", spilling)}
    assert "bytes spilled" in rejected["up", spilling]


def test_a_kernel_that_does_not_compile_is_a_reason_not_a_crash(monkeypatch):
    monkeypatch.setattr(tile_search, "compile_tiles", lambda *args, **card: 1 / 0)
    reason = tile_search.compile_or_reason("up", Tiles("weights_m", 16, 64, 64, 4, 3), SMALL)
    assert reason == "does not compile (ZeroDivisionError: division by zero)"


@pytest.mark.parametrize("num_tokens", [8, 512])
def test_search_finds_the_fastest(num_tokens):
    row = search().best(num_tokens, tile_tuning.in_use(CURRENT, num_tokens))
    assert row["choice"] == Choice(None, fastest(num_tokens, "up"), fastest(num_tokens, "down"))
    assert row["us"] == cost(row["choice"]) < row["current_us"]


@pytest.mark.parametrize("gain", [1, -1])
def test_whether_l2_keeps_what_is_stored_is_tried_for_the_fastest(monkeypatch, gain):
    plain, current = cost, tile_tuning.in_use(CURRENT, 8)
    monkeypatch.setitem(globals(), "cost", lambda choice: plain(choice) - gain * (choice.up.keep - choice.down.keep))
    found = search().best(8, current)["choice"]
    assert (found.up.keep, found.down.keep) == (gain > 0, gain < 0)
    assert "keep" in tile_tuning.show(found)
    tokens_m_ws = Tiles("tokens_m_ws", 128, 128, 64, 4, 4, 1)
    both = tile_tuning.keeping(Choice(None, tokens_m_ws, found.down))  # of which one alone can keep
    assert [(choice.up.keep, choice.down.keep) for choice in both] == [(False, False), (False, True)]


def test_rejected_and_unlaunchable_tiles_are_passed_over():
    best = fastest(512, "up")
    op = FakeOp()
    row = search(op, {("up", same_kernel(best)): "64 bytes spilled"}).best(512, tile_tuning.in_use(CURRENT, 512))
    assert same_kernel(row["choice"].up) != same_kernel(best)
    assert all(same_kernel(choice.up) != same_kernel(best) for choice in op.launched)
    row = search(FakeOp(unlaunchable=[best])).best(512, tile_tuning.in_use(CURRENT, 512))
    assert row["choice"].up != best


def test_a_fast_wrong_answer_loses(capsys):
    current = tile_tuning.in_use(CURRENT, 512)
    row = search(FakeOp(wrong=[fastest(512, "down")])).best(512, current)
    assert row["choice"] == Choice(None, current.up, current.down)
    assert "wrong result (3.00 of the allowed error)" in capsys.readouterr().out
    everything = {tiles for family in families(SHAPE, 512) for role in ROLES for tiles in family[role]}
    with pytest.raises(RuntimeError, match="no tiles give a right result at 512 tokens"):
        search(FakeOp(wrong=everything | {current.up, current.down})).best(512, current)


def test_a_full_run_writes_a_file_that_the_op_reads(tmp_path, monkeypatch):
    output = tmp_path / "card.json"
    rows, complete = tile_tuning.tune(search(), [8, 512, 8192], CURRENT, output, "Some Card")
    assert complete
    assert not (tmp_path / "card.json.partial").exists()
    monkeypatch.setattr(tile_files, "CONFIG_DIR", tmp_path)
    tile_files._files.cache_clear()
    try:
        read = tile_files.choices_for("Some Card", triton.__version__, 128, 8, 2048, 768)
        other = tile_files.choices_for("Some Card", triton.__version__, 8, 2, 256, 128)
    finally:
        tile_files._files.cache_clear()
    for count in (8, 512, 8192):
        found = tile_tuning.in_use(read, count)
        assert (found.up, found.down) == (rows[count]["choice"].up, rows[count]["choice"].down)
    assert read[-1].up == rows[8192]["choice"].up, "the largest count was tuned in the open-ended bucket"
    assert other == tile_files.default_choices(8, 2, 256, 128)
    assert "512" in render(tile_tuning.table(rows))


def render(table) -> str:
    with tile_tuning.console.capture() as captured:
        tile_tuning.console.print(table)
    return captured.get()


def test_a_second_shape_joins_the_file(tmp_path):
    output = tmp_path / "card.json"
    tile_tuning.write_config(output, "Card", SHAPE, CURRENT)
    tile_tuning.write_config(output, "Card", SMALL, CURRENT[-1:])
    tile_tuning.write_config(output, "Twin Card", SHAPE, CURRENT[-1:])
    loaded = tile_files.load(output)
    assert loaded["devices"] == ["Card", "Twin Card"]
    assert loaded["shapes"] == [((8, 2, 256, 128), CURRENT[-1:]), ((128, 8, 2048, 768), CURRENT[-1:])]
    assert json.loads(output.read_text())["measured_on"] == "Card"


def test_a_run_out_of_time_goes_on_later(tmp_path):
    output = tmp_path / "card.json"
    first = search()
    done, complete = tile_tuning.tune(first, [8], CURRENT, output, "Card")
    assert complete
    stopping = search()

    class StopAfterOne(FakeOp):
        def error(self, choice, num_tokens):
            stopping.deadline = 0.0
            return 0.4

    stopping.op = StopAfterOne()
    rows, complete = tile_tuning.tune(stopping, [16, 512], CURRENT, output, "Card")
    assert (list(rows), complete) == ([16], False)
    assert tile_tuning.in_use(tile_files.load(output)["shapes"][0][1], 16384) == CURRENT[-1], (
        "untuned sizes keep their tiles"
    )
    op = FakeOp()
    rows, complete = tile_tuning.tune(search(op), [16, 512], CURRENT, output, "Card")
    assert (sorted(rows), complete) == ([16, 512], True)
    assert all(choice.up.kernel != "gemv" for choice in op.launched), "16 tokens were tuned again"
    assert done[8]["us"] > 0


def test_notes_of_another_card_are_not_used_and_broken_ones_are_named(tmp_path):
    notes = tmp_path / "x.partial"
    notes.write_text(json.dumps({"key": "other card", "rows": {}}))
    assert tile_tuning.load_partial(notes, "this card") == {}
    notes.write_text("{")
    with pytest.raises(ValueError, match=r"x\.partial: not notes of an earlier run .*delete it"):
        tile_tuning.load_partial(notes, "this card")


def test_no_time_at_all_writes_nothing(tmp_path):
    rows, complete = tile_tuning.tune(search(seconds=-1), [8], CURRENT, tmp_path / "card.json", "Card")
    assert (rows, complete, list(tmp_path.iterdir())) == ({}, False, [])


def plain_choice(limit: int | None, rows: int) -> Choice:
    return Choice(limit, Tiles("weights_m", rows, 64, 64, 4, 3), Tiles("weights_m", rows, 64, 64, 4, 3))


@pytest.mark.parametrize(
    ("tuned", "expected"),
    [
        # within 8..300 the table's own limit of 100 is gone, outside it stays in force
        ({8: 64, 300: 128}, [(8, 64), (300, 128), (400, 32), (None, 256)]),
        # in the open-ended bucket: serves all larger calls
        ({2000: 64}, [(100, 16), (400, 32), (None, 64)]),
        # equal neighbours are one bucket
        ({8: 64, 16: 64, 400: 128}, [(16, 64), (400, 128), (None, 256)]),
        # smaller than all of the table's
        ({1: 64}, [(1, 64), (100, 16), (400, 32), (None, 256)]),
    ],
)
def test_tuned_counts_are_put_into_the_table(tuned, expected):
    current = (plain_choice(100, 16), plain_choice(400, 32), plain_choice(None, 256))
    choices = tile_tuning.with_buckets(current, {count: plain_choice(None, rows) for count, rows in tuned.items()})
    assert [(choice.max_tokens, choice.up.rows) for choice in choices] == expected


def test_file_names_follow_the_card_and_triton(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_files, "CONFIG_DIR", tmp_path)
    expected = tmp_path / f"nvidia-h200-triton-{triton.__version__}.json"
    assert tile_output.config_path("NVIDIA H200") == expected
    tile_tuning.write_config(tmp_path / "hopper.json", "NVIDIA H200", SHAPE, CURRENT)
    assert tile_output.config_path("NVIDIA H200") == tmp_path / "hopper.json"
    assert tile_output.config_path("Card") != tmp_path / "hopper.json"


def test_output_of_another_triton_is_refused(tmp_path):
    path = tmp_path / "old.json"
    tile_tuning.write_config(path, "Card", SHAPE, CURRENT)
    tile_output.check_output(path)
    path.write_text(path.read_text().replace(f'"{triton.__version__}"', '"3.1.0"'))
    with pytest.raises(ValueError, match=r"old.json was measured with triton 3\.1\.0"):
        tile_output.check_output(path)
    with pytest.raises(ValueError, match="the folder /no/such does not exist"):
        tile_output.check_output(Path("/no/such/x.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "8,9,64,64"], "asks for 9 experts per token"),
        (["--tokens", "-1"], "not a list of positive integers"),
    ],
)
def test_option_errors_are_one_line(arguments, message):
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert message in outcome.stderr


def test_a_machine_without_hopper_is_told_so():
    reason = tma_moe.unavailable("cuda", torch.bfloat16)
    if reason is None:
        pytest.skip("this machine has a Hopper GPU")
    outcome = invoke()
    assert outcome.exit_code == 2
    assert outcome.stderr == f"error: nothing to tune here: {reason}\n"


def invoke(*arguments):
    program = typer.Typer()
    program.command()(tune_moe.main)
    return CliRunner().invoke(program, list(arguments))


@pytest.mark.skipif(INTERPRETED, reason="this process runs the kernels itself")
def test_the_real_op_in_the_interpreter():
    run_in_interpreter(f"{__file__}::test_interpreted_op_runs_given_tiles_and_sees_their_error", at_least=2)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
@pytest.mark.parametrize(
    "choice",
    [
        Choice(None, Tiles("gemv", 1, 8, 16, 4, 1), Tiles("gemv", 1, 16, 8, 4, 1)),
        Choice(None, Tiles("weights_m", 16, 8, 16, 4, 1), Tiles("weights_m", 16, 16, 16, 4, 1)),
    ],
)
def test_interpreted_op_runs_given_tiles_and_sees_their_error(choice, monkeypatch):
    op = tile_tuning.GpuOp(MoeShape(2, 1, 16, 8), "cpu", torch.float16)
    candidate = op.candidate(choice, 2)
    candidate.run()
    assert candidate.num_calls == len(op.experts) == 4
    assert 0 < op.error(choice, 2) <= 1

    def wrong(*args):
        recipe = make_recipe(*args)
        right = recipe.run
        recipe.run = lambda *operands: 1.5 * right(*operands)
        return recipe

    monkeypatch.setattr(tile_tuning, "make_recipe", wrong)
    assert op.error(choice, 2) > 1


@pytest.mark.parametrize(("backend", "card"), [("tma", (9, 0)), ("triton", (8, 6))])
def test_the_whole_program_with_a_fake_gpu(tmp_path, monkeypatch, backend, card):
    def unavailable(*_, backend="tma", **__):
        return "no Hopper" if backend == "tma" and card < (9, 0) else None

    tile_files._warn_untimed.cache_clear()
    monkeypatch.setattr(tma_moe, "unavailable", unavailable)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake Card")
    monkeypatch.setattr(tile_tuning, "compile_all", lambda *_: {})
    monkeypatch.setattr(moe, "CudaTimer", lambda **options: FakeTimer())

    class Op(FakeOp):
        def __init__(self, shape):
            super().__init__()
            self.sizes = (shape.num_experts, shape.experts_per_token, shape.hidden_size, shape.expert_width)

    monkeypatch.setattr(tile_tuning, "GpuOp", Op)
    output = tmp_path / "card.json"
    with pytest.warns(UserWarning, match="no measured tiles for 'Fake Card'"):
        outcome = invoke("--tokens", "8,512", "--output", str(output))
    assert outcome.exit_code == 0, outcome.output
    assert f"wrote {output}" in outcome.stdout.replace("\n", "")
    written = tile_files.load(output)
    assert written["devices"] == ["Fake Card"]
    assert (written["portable"], written["capability"], written["timed"]) == (backend == "triton", card, True)
    assert "please send it" in outcome.stdout
