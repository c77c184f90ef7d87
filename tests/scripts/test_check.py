"""The program that looks at a machine: what it says with no GPU, and that it finds what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from checking import machine, right
from qwen3vl_moe import ops
from scripts import check
from tests.interpreted import INTERPRETED, ON_GPU, run_in_interpreter

APP = typer.Typer()
APP.command()(check.main)


def run(*options: str):
    return CliRunner().invoke(APP, ["--device", "cpu", *options])


compiled_or_plain = pytest.mark.skipif(INTERPRETED, reason="runs outside of the interpreter")


@compiled_or_plain
def test_a_machine_without_a_gpu(tmp_path):
    path = tmp_path / "check.json"
    done = run("--json", str(path))
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found["kernels"]["experts, FP8"] == "reference (a CUDA GPU is needed, the device is cpu)"
    assert found["kernels"]["CUDA graphs"] == "no"
    assert len(found["right"]) >= 16
    assert all(row["right"] for row in found["right"])
    assert all(min(row["took"].values()) > row["floor"] > 0 for row in found["fast"]["layers"])
    for title in ("This machine", "What runs as what", "Right?", "How fast", "One MoE layer", "What fits"):
        assert title in done.output


@compiled_or_plain
def test_a_wrong_operation_is_named_and_ends_the_program_with_status_1(monkeypatch):
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *operands, causal: attention(*operands, causal=not causal))

    def broken(*operands, **options):
        raise RuntimeError("out of resource: shared memory\nin two lines")

    monkeypatch.setattr(ops, "cached_attention", broken)
    done = run("--no-timing")
    assert done.exit_code == 1
    assert "WRONG" in done.output
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("error: wrong results: attention, decoder by torch; attention, vision tower by torch; ")
    assert last.endswith("attention by RuntimeError: out of resource: shared memory")


@compiled_or_plain
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "/no/such/folder/check.json"], "the folder /no/such/folder does not exist"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_bad_options(options, message):
    done = run(*options)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("gigabytes", "fitting"),
    [
        (24, {("bf16", 4), ("bf16", 8), ("FP8", 2), ("FP8", 4), ("FP8", 8)}),
        (48, {("bf16", 2), ("bf16", 4), ("bf16", 8), ("FP8", 1), ("FP8", 2), ("FP8", 4), ("FP8", 8)}),
        (80, {(name, cards) for name in ("bf16", "FP8") for cards in machine.CARDS}),
        (4, set()),
    ],
)
def test_what_fits(gigabytes, fitting):
    found = list(machine.fits(gigabytes * 10**9))
    assert {(fit.checkpoint, fit.cards) for fit in found if fit.fits} == fitting
    assert found[0].weights == 62_141_508_064


@compiled_or_plain
def test_a_limit_stands_for_a_card():
    done = run("--no-timing", "--memory-limit", "48")
    assert done.exit_code == 0
    assert "with 48.0 GB of memory a card" in " ".join(done.output.split())


def test_in_the_interpreter():
    if INTERPRETED or ON_GPU:
        pytest.skip("these tests run here already")
    run_in_interpreter(Path(__file__), at_least=2)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
@pytest.mark.parametrize("wrong", [False, True], ids=["sound", "planted"])
def test_a_wrong_kernel_is_found(wrong, monkeypatch):
    """SwiGLU with gate and up exchanged, in the portable kernel alone."""
    from tma_moe.portable import products

    if wrong:
        sound = products.silu_times
        monkeypatch.setattr(products, "silu_times", lambda gate, up: sound(up, gate))
    monkeypatch.setattr(right, "_rotation", lambda device, dtype: iter(()))
    monkeypatch.setattr(right, "_attention", lambda device, dtype: iter(()))
    done = run("--no-timing")
    assert done.exit_code == wrong, done.output
    if wrong:
        assert "error: wrong results: experts, float16, 18 tokens by triton\n" in done.output
