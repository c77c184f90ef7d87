"""The training loop learns, keeps its schedule, and goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch
import train_demo
from demo_training.batches import TrainingBatches
from demo_training.model import SMALL, build_model, published_config, token_ids
from demo_training.trainer import Recipe, Trainer
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def pair(untrained):
    return TrainingBatches(str(untrained[0] / "tokenizer.json"), [], tokens=400, steps=1, seed=0)[0]


def make_trainer(path, steps: int) -> Trainer:
    model = build_model(published_config(SMALL, token_ids(path)), seed=0, experts="eager")
    recipe = Recipe(minutes=1, steps=steps, learning_rate=3e-3)
    return Trainer(model, recipe, device=torch.device("cpu"), dtype=torch.float32)


def test_a_fixed_batch_is_learned(untrained, pair):
    trainer = make_trainer(untrained[0], 24)
    lines = []
    assert trainer.run([pair] * 25, report=lines.append, every=12)
    assert trainer.progress.step == 24
    for name in ("pictures", "text"):
        assert lines[-1][name] < 0.6 * lines[0][name]
    assert len(trainer.progress.load_LE) == SMALL.layers
    assert trainer.progress.pictures == 24 * len(pair[0].pixels)


def test_a_stopped_run_goes_on_as_if_it_had_not(untrained, pair, tmp_path):
    whole = make_trainer(untrained[0], 4)
    whole.run([pair] * 5)
    first = make_trainer(untrained[0], 4)
    first.run([pair] * 2)
    first.save(tmp_path / "state.pt")
    second = make_trainer(untrained[0], 4)
    second.load(tmp_path / "state.pt")
    assert second.progress.step == 2
    assert second.run([pair] * 5)
    for one, other in zip(whole.master, second.master, strict=True):
        assert torch.equal(one, other)


def test_bf16_weights_keep_fp32_frequencies_and_take_a_step(untrained, pair):
    model = build_model(published_config(SMALL, token_ids(untrained[0])), seed=0, experts="grouped_mm")
    trainer = Trainer(model, Recipe(minutes=1, steps=2), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    before = [copy.clone() for copy in trainer.master]
    trainer.step(pair, 0.5)
    assert all(copy.isfinite().all() for copy in trainer.master)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.master, strict=True))


def test_the_schedule_warms_up_and_decays():
    recipe = Recipe(minutes=1)
    rates = [recipe.rate(n / 100) for n in range(101)]
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=1e-3)
    assert rates[-1] == pytest.approx(recipe.learning_rate * recipe.final)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_program_makes_a_checkpoint_and_records_how(tmp_path):
    options = ["--small", "--steps", "1", "--tokens", "300", "--workers", "0", "--device", "cpu", "--questions", "2"]
    done = CliRunner().invoke(train_demo.app, ["--out", str(tmp_path / "demo"), *options])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "demo" / "training.json").read_text())
    assert record["steps"] == 1
    assert record["final"]["pictures"]["all"]["of"] == 2
    assert len(record["expert_load"]) == SMALL.layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "test.jsonl"], "never trained on"),
        (["--stop-after", "1"], "--state"),
        (["--minutes", "0"], "--minutes"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, options, message):
    done = CliRunner().invoke(train_demo.app, ["--out", str(tmp_path / "demo"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
