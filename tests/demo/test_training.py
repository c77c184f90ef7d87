"""The training loop learns, keeps its schedule, and goes on where it stopped."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import train_demo
from demo_training import padded_experts
from demo_training.batches import Batch, TrainingBatches
from demo_training.model import SMALL, build_model, published_config, token_ids
from demo_training.trainer import Recipe, Trainer
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def parts(untrained):
    path = str(untrained[0] / "tokenizer.json")
    return TrainingBatches(path, [], tokens=400, text_tokens=400, steps=1, seed=0)[0]


def make_trainer(path, steps: int, **recipe) -> Trainer:
    model = build_model(published_config(SMALL, token_ids(path)), seed=0, experts="eager")
    recipe = Recipe(minutes=1, steps=steps, learning_rate=3e-3, **recipe)
    return Trainer(model, recipe, device=torch.device("cpu"), dtype=torch.float32)


def test_a_fixed_batch_is_learned(untrained, parts):
    trainer = make_trainer(untrained[0], 24)
    lines = []
    assert trainer.run([parts] * 25, report=lines.append, every=12)
    assert trainer.progress.step == 24
    for name in ("pictures", "text"):
        assert lines[-1][name] < 0.6 * lines[0][name]
    assert len(trainer.progress.load_LE) == SMALL.layers
    assert trainer.progress.pictures == 24 * sum(len(part.pixels) for part in parts[:2])


def test_a_stopped_run_goes_on_as_if_it_had_not(untrained, parts, tmp_path):
    whole = make_trainer(untrained[0], 4)
    whole.run([parts] * 5)
    first = make_trainer(untrained[0], 4)
    first.run([parts] * 2)
    first.save(tmp_path / "state.pt")
    second = make_trainer(untrained[0], 4)
    second.load(tmp_path / "state.pt")
    assert second.progress.step == 2
    assert second.run([parts] * 5)
    for one, other in zip(whole.weights.master, second.weights.master, strict=True):
        assert torch.equal(one, other)


def test_every_learned_token_counts_alike(untrained, parts):
    """The rows of a batch in two batches of a row and of the rest give the same gradient."""
    text = parts[2]
    assert len(text.ids_BT) > 2

    def rows(part: slice) -> Batch:
        return Batch(text.ids_BT[part], text.labels_BT[part], text.valid_BT[part], text.positions_3BT[:, part], None)

    gradients = []
    for batches in ((text,), (rows(slice(0, 1)), rows(slice(1, None)))):
        trainer = make_trainer(untrained[0], 4, balance=0.0)
        trainer.step(batches, 0.5)
        gradients.append(torch.cat([copy.grad.flatten() for copy in trainer.weights.master if copy.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5 * gradients[0].abs().max().item())


def test_padded_experts_are_the_experts_of_transformers(untrained):
    """Values and all gradients, with experts that get no row, and more rows than one step of the padding."""
    experts = untrained[1].model.language_model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(700, SMALL.hidden, generator=generator).requires_grad_()
    logits = torch.randn(700, SMALL.experts, generator=generator)
    logits[:, 3] = -100.0
    weights, ids = logits.softmax(-1).topk(SMALL.top_k, dim=-1)
    weights.requires_grad_()
    gate_up, down = (p.detach().clone().requires_grad_() for p in (experts.gate_up_proj, experts.down_proj))
    ours = padded_experts.padded_experts(x, ids, weights, gate_up, down)
    eager = copy.deepcopy(experts)
    eager.requires_grad_()
    theirs = type(experts).forward.__wrapped__(eager, x, ids, weights)
    towards = torch.randn(ours.shape, generator=generator)
    mine = torch.autograd.grad((ours * towards).sum(), (x, weights, gate_up, down))
    other = torch.autograd.grad((theirs * towards).sum(), (x, weights, eager.gate_up_proj, eager.down_proj))
    for a, b in zip((ours, *mine), (theirs, *other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_bf16_weights_keep_fp32_frequencies_and_take_a_step(untrained, parts):
    model = build_model(published_config(SMALL, token_ids(untrained[0])), seed=0, experts="grouped_mm")
    trainer = Trainer(model, Recipe(minutes=1, steps=2), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    before = [copy.clone() for copy in trainer.weights.master]
    trainer.step(parts, 0.5)
    assert all(copy.isfinite().all() for copy in trainer.weights.master)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.weights.master, strict=True))


def test_the_schedule_warms_up_and_decays():
    recipe = Recipe(minutes=1)
    rates = [recipe.rate(n / 100) for n in range(101)]
    assert max(rates) == pytest.approx(recipe.learning_rate, rel=1e-3)
    assert rates[-1] == pytest.approx(recipe.learning_rate * recipe.final)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_program_makes_a_checkpoint_and_records_how(tmp_path):
    options = [
        "--size",
        "small",
        "--tower-pictures",
        "8",
        "--tower-steps",
        "2",
        "--steps",
        "1",
        "--tokens",
        "300",
        "--text-tokens",
        "300",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--questions",
        "2",
    ]
    done = CliRunner().invoke(train_demo.app, ["--out", str(tmp_path / "demo"), *options])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "demo" / "training.json").read_text())
    assert record["steps"] == 1
    assert "vision tower alone, step     2" in done.output
    assert record["final"]["pictures"]["all"]["of"] == 2
    assert len(record["expert_load"]) == SMALL.layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "test.jsonl"], "never trained on"),
        (["--stop-after", "1"], "--state"),
        (["--minutes", "0"], "--minutes"),
        (["--device", "tpu"], "--device tpu"),
        (["--dtype", "fp8"], "--dtype fp8"),
        (["--size", "huge"], "--size huge"),
        (["--tower-pictures", "0"], "--tower-pictures"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, options, message):
    done = CliRunner().invoke(train_demo.app, ["--out", str(tmp_path / "demo"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
