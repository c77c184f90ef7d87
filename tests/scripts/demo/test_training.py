"""The training loop learns, keeps its schedule, and goes on where it stopped."""

from __future__ import annotations

import copy
import json
import multiprocessing
import signal

import pytest
import torch
from typer.testing import CliRunner

import train_demo
from demo_training.batched_experts import experts
from demo_training.batches import DATA_VERSION, Budget, TrainingBatches
from demo_training.model import SMALL, build_model, published_config, token_ids
from demo_training.tower import TowerHeads
from demo_training.trainer import Trainer, TrainingRecipe


@pytest.fixture(scope="module")
def batch(untrained):
    path = str(untrained[0] / "tokenizer.json")
    return TrainingBatches(path, None, budget=Budget(512, 512), steps=1, seed=0)[0]


def make_trainer(path, steps: int, seed: int = 0, **recipe) -> Trainer:
    model = build_model(published_config(SMALL, token_ids(path)), seed=0)
    recipe = TrainingRecipe(minutes=1, steps=steps, learning_rate=3e-3, **recipe)
    torch.manual_seed(0)
    heads = TowerHeads(model.model.visual)
    return Trainer(model, heads, recipe, device=torch.device("cpu"), dtype=torch.float32, seed=seed)


def test_a_fixed_batch_is_learned(untrained, batch):
    trainer = make_trainer(untrained[0], 24)
    lines = []
    assert trainer.run([batch] * 25, report=lines.append, every=12)
    assert trainer.progress.step == 24
    for name in ("pictures", "text"):
        assert lines[-1][name] < 0.6 * lines[0][name]
    assert lines[-1]["pictures_right"] > lines[0]["pictures_right"]
    assert len(trainer.progress.load_LE) == SMALL.layers
    assert trainer.progress.tokens == 24 * batch.valid_N.sum()


def test_a_stopped_run_goes_on_as_if_it_had_not(untrained, batch, tmp_path):
    whole = make_trainer(untrained[0], 4, blur_from=0.4)
    whole.run([batch] * 5)
    first = make_trainer(untrained[0], 4, blur_from=0.4)
    first.run([batch] * 2)
    first.save(tmp_path / "state.pt")
    second = make_trainer(untrained[0], 4, blur_from=0.4)
    second.load(tmp_path / "state.pt")
    assert second.progress.step == 2
    assert second.run([batch] * 5)
    for one, other in zip(whole.weights.master, second.weights.master, strict=True):
        assert torch.equal(one, other)


def test_the_file_to_go_on_from_is_kept_up_to_date(untrained, batch, tmp_path, monkeypatch):
    """Every minute of the clock, so that a run that is killed loses no more; and at the end."""
    clock = iter(range(0, 100_000, 7))  # some readings a step
    monkeypatch.setattr("demo_training.trainer.time.monotonic", lambda: next(clock))
    kept = []
    trainer = make_trainer(untrained[0], 8)
    save = trainer.save
    monkeypatch.setattr(trainer, "save", lambda path: (kept.append(trainer.progress.step), save(path)))
    trainer.run([batch] * 9, keep=tmp_path / "deep" / "state.pt")
    assert 2 <= len(kept) < 8
    assert kept == sorted(set(kept))
    assert kept[-1] == 8
    again = make_trainer(untrained[0], 8)
    again.load(tmp_path / "deep" / "state.pt")
    assert again.progress.step == 8
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["state.pt"]


def test_the_tower_is_slow_at_first_and_less_slow_later(untrained, batch):
    trainer = make_trainer(untrained[0], 100, tower=0.1, tower_later=0.3)
    assert [round(trainer.recipe.tower_share(p), 3) for p in (0, 0.1, 0.15, 0.2, 1)] == [0.1, 0.1, 0.2, 0.3, 0.3]
    trainer.weights.set_rate(1e-3, 0.1)
    rates = {}
    for group in trainer.weights.optimizer.param_groups:
        for copy_of in group["params"]:
            rates[id(copy_of)] = float(group["lr"])
    names = [f"model.{name}" for name, _ in trainer.model.named_parameters()]
    for name, master in zip(names, trainer.weights.master, strict=False):
        assert rates[id(master)] == pytest.approx(1e-4 if name.startswith("model.model.visual.") else 1e-3)


def test_workers_end_with_the_batches(untrained):
    path = str(untrained[0] / "tokenizer.json")
    data = TrainingBatches(path, None, budget=Budget(512, 512), steps=10_000, seed=0)
    batches = train_demo._batches(data, 5, 2, torch.device("cpu"))
    first = next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    watched = signal.getsignal(signal.SIGCHLD)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)
    assert signal.getsignal(signal.SIGCHLD) == watched
    assert all(torch.equal(one, other) for one, other in zip(first.flat(), data[5].flat(), strict=True))


def test_experts_are_those_of_transformers(untrained):
    """Values and all gradients, with experts that get no row."""
    theirs = untrained[1].model.language_model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, SMALL.hidden, generator=generator).requires_grad_()
    logits = torch.randn(70, SMALL.experts, generator=generator)
    logits[:, 3] = -100.0
    weights, ids = logits.softmax(-1).topk(SMALL.top_k, dim=-1)
    weights.requires_grad_()
    gate_up, down = (p.detach().clone().requires_grad_() for p in (theirs.gate_up_proj, theirs.down_proj))
    ours = experts(x, ids, weights, gate_up, down)
    eager = copy.deepcopy(theirs)
    eager.requires_grad_()
    theirs = type(theirs).forward.__wrapped__(eager, x, ids, weights)
    towards = torch.randn(ours.shape, generator=generator)
    mine = torch.autograd.grad((ours * towards).sum(), (x, weights, gate_up, down))
    other = torch.autograd.grad((theirs * towards).sum(), (x, weights, eager.gate_up_proj, eager.down_proj))
    for a, b in zip((ours, *mine), (theirs, *other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


@pytest.mark.gpu
def test_a_repeated_step_learns_like_one_that_is_not(untrained):
    """As a CUDA graph, compiled or not, and launched one by one: the same losses within what bf16 and the order of sums
    allow."""
    path = str(untrained[0] / "tokenizer.json")
    data = TrainingBatches(path, None, budget=Budget(2048, 1024), steps=8, seed=0)
    losses = []
    for graphs, compiled in ((False, False), (True, False), (True, True)):
        model = build_model(published_config(SMALL, token_ids(untrained[0])), seed=0)
        torch.manual_seed(0)
        heads = TowerHeads(model.model.visual)
        how = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "graphs": graphs, "compiled": compiled}
        trainer = Trainer(model, heads, TrainingRecipe(minutes=1), **how)
        for step in [0] * (1 if graphs else 4) + list(range(1, 8)):
            trainer.progress.step = step  # the noise is that of the step, whatever came before
            figures = trainer.step(data[step], 0.0 if step == 0 else 0.1 if step < 5 else 0.9)
        losses.append(float(figures["pictures"]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02)


def test_late_in_the_schedule_the_decoder_gets_a_blurred_picture(untrained, batch):
    """Noise of the step, by the seed, and none before."""

    def loss(at: float, step: int = 0, seed: int = 0) -> float:
        trainer = make_trainer(untrained[0], 4, seed=seed)
        trainer.progress.step = step
        return float(trainer.step(batch, at)["pictures"])

    assert loss(0.1) == loss(0.79, step=1) == loss(0.1, seed=1)
    assert loss(0.8) == loss(0.99)
    assert len({loss(0.1), loss(0.9), loss(0.9, step=1), loss(0.9, seed=1)}) == 4


def test_bf16_weights_keep_fp32_frequencies_and_take_a_step(untrained, batch):
    model = build_model(published_config(SMALL, token_ids(untrained[0])), seed=0)
    heads = TowerHeads(model.model.visual)
    trainer = Trainer(
        model, heads, TrainingRecipe(minutes=1, steps=2), device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    before = [copy.clone() for copy in trainer.weights.master]
    trainer.step(batch, 0.5)
    assert all(copy.isfinite().all() for copy in trainer.weights.master)
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.weights.master, strict=True))


def test_the_schedule_warms_up_and_decays():
    recipe = TrainingRecipe(minutes=1)
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
        "512",
        "--text-tokens",
        "512",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--questions",
        "2",
        "--new",
        "2",
    ]
    done = CliRunner().invoke(train_demo.app, ["--out", str(tmp_path / "demo"), *options])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "demo" / "training.json").read_text())
    assert record["steps"] == 1
    assert "vision tower alone, step     2" in done.output
    assert record["final"]["pictures"]["all"]["of"] == record["final"]["new"]["all"]["of"] == 2
    assert record["data"] == DATA_VERSION
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
        (["--moved", "2"], "--moved"),
        (["--tower-pictures", "0"], "--tower-pictures"),
        (["--text-tokens", "100"], "--text-tokens"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, options, message):
    done = CliRunner().invoke(train_demo.app, ["--out", str(tmp_path / "demo"), *options])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
