"""eval/parity.py: parity holds without a fault, and not with one in experts, routing, rounding or engine."""

import json
import math

import pytest
import torch

import gsm8k
import parity
import problems
import tma_moe
from logprobs import Distance, of_tokens
from peers import VARIANTS, variant_lm
from qwen3vl_moe import LLM
from qwen3vl_moe.engine import runner
from tests.eval.conftest import instance, run_program

SMALL = ("--device", "cpu", "--max-model-len", 256, "--max-num-seqs", 4, "--num-fewshot", 0, "--limit", 2)


@pytest.fixture
def run(plain, problems_dir):
    """Run the program on a checkpoint whose layers do a lot, as those of a trained model do, in bf16."""

    def call(*arguments, model=plain.published):
        fixed = ("--model", model, "--dtype", "bfloat16", "--data", problems_dir, "--max-gen-toks", 8)
        return run_program(parity.app, *fixed, *SMALL, "--variants", "reference,transformers", *arguments)

    return call


def plant(monkeypatch, fault, backend=None):
    """Plant a fault in our experts, for one backend or for all; transformers' own are left alone."""
    monkeypatch.setattr(tma_moe, "unavailable", lambda *_, **__: None)
    route, fused_moe = tma_moe.route, tma_moe.fused_moe

    def faulty_route(logits_TE, k, *, skip_T=None, backend="tma", **rest):
        if fault == "not renormalised" and backend in sick:
            weights_TK, ids_TK = logits_TE.float().softmax(-1).topk(k)
            return ids_TK.int(), weights_TK
        return route(logits_TE, k, skip_T=skip_T, backend="reference", **rest)

    def faulty_moe(x_TH, ids_TK, weights_TK, experts, *, backend="tma", combine=True):
        if fault == "experts swapped" and backend in sick:
            swap = torch.arange(experts.gate_up.shape[0], dtype=ids_TK.dtype)
            swap[0], swap[1] = 1, 0
            ids_TK = swap[ids_TK.long()]
        y_TH = fused_moe(x_TH, ids_TK, weights_TK, experts, backend="reference")
        return rounded(y_TH, fault) if isinstance(fault, int) and backend in sick else y_TH

    sick = {"tma", "reference"} if backend is None else {backend}
    monkeypatch.setattr(tma_moe, "route", faulty_route)
    monkeypatch.setattr(tma_moe, "fused_moe", faulty_moe)


def rounded(x, bits):
    """``x`` with that many bits of mantissa; bf16 has 8, the hidden one included."""
    mantissa, exponent = torch.frexp(x.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(x.dtype)


def test_parity_holds_without_a_fault(run, tmp_path):
    done = run("--output", tmp_path)
    assert done.code == 0, done.out + done.err
    assert "parity holds" in done.out
    assert "random" not in done.out
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["accuracy_counts"]
    assert [row["verdict"] for row in report["logits"]] == ["right", "a peer"]
    assert [row["verdict"] for row in report["engine"]] == ["right", "a peer"]
    ours, peer = report["logits"]
    assert ours["tokens"] == peer["tokens"] > 100
    assert all(0 < row["median"] <= row["mean"] <= row["largest"] and 0 < row["kl"] < 1 for row in (ours, peer))
    assert 0.5 < ours["top1"] <= 1
    assert len(list(tmp_path.rglob("samples_gsm8k_*.jsonl"))) == 2


@pytest.mark.parametrize("fault", ["experts swapped", "not renormalised"])
def test_a_fault_is_reported(run, monkeypatch, fault):
    plant(monkeypatch, fault)
    done = run("--max-gen-toks", 4)
    assert done.code == 1, done.out
    assert "NO PARITY" in done.out
    assert "WRONG" in done.out


def test_a_fault_in_the_fast_path_alone(run, monkeypatch, tmp_path):
    """``tma`` stands for a kernel with a fault; the other backend is found right."""
    plant(monkeypatch, "experts swapped", backend="tma")
    done = run("--variants", "tma,reference", "--output", tmp_path, "--limit", 1, "--max-gen-toks", 24)
    assert done.code == 1, done.out
    report = json.loads((tmp_path / "parity.json").read_text())
    assert {row["variant"]: row["verdict"].split(":")[0] for row in report["logits"]} == {
        "tma": "WRONG",
        "reference": "right",
        "transformers": "a peer",
    }
    assert [(row["variant"], row["verdict"].split(":")[0]) for row in report["engine"]] == [
        ("tma", "WRONG"),
        ("- transformers", "a peer"),
        ("- reference", "a peer"),
        ("reference", "right"),
        ("- transformers", "a peer"),
    ]
    (between,) = report["between"]
    ours = report["logits"][0]
    assert between["mean"] == pytest.approx(ours["mean"], rel=0.5), "nearly all of the error is the fault"


def test_no_fault_in_the_fast_path(run, monkeypatch):
    plant(monkeypatch, None)
    done = run("--variants", "tma,reference", "--limit", 1, "--max-gen-toks", 4)
    assert done.code == 0, done.out
    assert "1 of 1 answers identical" in done.out


def test_a_rounding_bug_of_growing_size(plain, demo, monkeypatch):
    """Bits are taken away one after the other: the error grows, and the verdict turns."""
    model = LLM(str(plain.published), device="cpu", dtype="bfloat16", max_model_len=256, progress=False).engine.model
    ids = torch.randint(0, 256, (4, 100), generator=torch.Generator().manual_seed(0))
    from lm import Answer

    answers = [Answer(tuple(row[:90].tolist()), tuple(row[90:].tolist()), "", False, 0, (0.0,) * 10) for row in ids]
    errors, verdicts = [], []
    for bits in (8, 7, 6, 5, 4, 3):
        with monkeypatch.context() as patched:
            plant(patched, bits, backend="tma")
            rows = {row["variant"]: row for row in parity.token_report(model, {"tma": answers})["logits"]}
        errors.append(rows["tma"]["median_kl"] / rows["reference"]["median_kl"])
        verdicts.append(rows["tma"]["verdict"].split(":")[0])
    assert verdicts[0] == "right", "8 bits are bf16's own"
    assert errors[0] == 1, "so nothing is rounded that was not"
    assert verdicts[-2:] == ["WRONG", "WRONG"]
    assert verdicts == sorted(verdicts, reverse=True), "once wrong, always wrong"
    assert min(errors[1:]) > errors[0]
    assert errors[2:] == sorted(errors[2:]), "7 and 6 bits differ by less than these few tokens can tell"


def test_a_fault_of_the_engine_alone(run, monkeypatch, tmp_path):
    """The model's logits are right, what the engine makes of them while it decodes is not."""
    token_logprobs = runner.token_logprobs
    monkeypatch.setattr(runner, "token_logprobs", lambda logits_RV, *rest: token_logprobs(logits_RV * 1.05, *rest))
    done = run("--output", tmp_path)
    assert done.code == 1
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["logits"][0]["verdict"] == "right"
    assert report["engine"][0]["verdict"].startswith("WRONG")


def test_what_was_measured_is_kept_where_the_rest_fails(run, monkeypatch, tmp_path):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no room for the logits")

    monkeypatch.setattr(parity, "token_report", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run("--output", tmp_path, "--max-gen-toks", 2)
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["parity"] is None
    assert report["accuracy"].keys() == {"reference", "transformers"}
    assert report["pairs"]["transformers"]["p_value"] == 1


def test_answers_that_spell_an_images_tokens(plain):
    """Random weights write them: to every way of computing they are text."""
    model = LLM(str(plain.published), device="cpu", dtype="bfloat16", max_model_len=256, progress=False).engine.model
    config = model.config
    special = [config.vision_start_token_id, config.image_token_id, config.image_token_id, config.video_token_id]
    from lm import Answer

    answers = [Answer((9, 8, 7), (*special, 5), "", False, 0, (0.0,) * 5)]
    (ours, peer) = parity.token_report(model, {"reference": answers})["logits"]
    assert ours["tokens"] == peer["tokens"] == 7
    assert ours["kl"] < 0.1


@pytest.mark.parametrize("random_weights", [False, True])
def test_accuracy_counts_only_for_trained_weights(run, monkeypatch, random_weights):
    pair = {"identical": 0, "first_divergences": [3], "right_to_wrong": 9, "wrong_to_right": 1, "p_value": 0.02}
    monkeypatch.setattr(parity, "accuracy_pair", lambda first, other: pair)
    if random_weights:
        settings = LLM.settings.fget
        monkeypatch.setattr(LLM, "settings", property(lambda self: settings(self) | {"random_weights": True}))
    done = run("--limit", 1, "--max-gen-toks", 2)
    assert done.code == (0 if random_weights else 1)
    assert ("The weights are random" in done.out) == random_weights
    # Answers of random weights say nothing: only our own variant has any, to compare its log-probabilities on.
    assert ("9 right -> wrong, 1 wrong -> right by reference, exact McNemar p = 0.02" in done.out) != random_weights


def test_mcnemar():
    assert parity.mcnemar(0, 0) == parity.mcnemar(4, 4) == 1
    assert parity.mcnemar(0, 5) == 0.0625
    assert parity.mcnemar(6, 0) == 0.03125
    assert parity.mcnemar(1, 8) == pytest.approx(20 / 512)


def test_flips_and_divergence():
    from lm import Answer

    def answers(*tokens):
        return [Answer((1,), each, str(each), False, 0, None) for each in tokens]

    first = parity.Run(answers((1, 2), (1, 2, 3), (5,)), {"flexible-extract": [True, False, False]})
    other = parity.Run(answers((1, 2), (1, 2), (4,)), {"flexible-extract": [False, True, True]})
    assert parity.accuracy_pair(first, other) == {
        "identical": 1,
        "first_divergences": [2, 0],
        "right_to_wrong": 2,
        "wrong_to_right": 1,
        "p_value": 1.0,
    }


def test_distance():
    torch.manual_seed(0)
    exact, other = torch.randn(300, 11).double(), torch.randn(300, 11).double()
    targets = torch.randint(0, 11, (300,))
    distance = Distance()
    distance.add_logits(exact[:290], other[:290], targets[:290])
    distance.add_logits(exact[290:], other[290:], targets[290:])
    log_p, log_q = exact.log_softmax(-1), other.log_softmax(-1)
    own = -torch.nn.functional.nll_loss(log_q, targets, reduction="none")
    deltas = own + torch.nn.functional.nll_loss(log_p, targets, reduction="none")
    assert torch.equal(of_tokens(other, targets), own)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert distance.figures() == pytest.approx(
        {
            "tokens": 300,
            "median": float(deltas.abs().median()),
            "mean": float(deltas.abs().mean()),
            "largest": float(deltas.abs().max()),
            "median_kl": float(kl.median()),
            "kl": float(kl.mean()),
            "top1": float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
        }
    )


def test_the_bound_is_twice_the_peers_error():
    def distance(*errors):
        made = Distance()
        made.add(torch.tensor(errors))
        return made

    peer = distance(*[0.1, -0.1] * 500)
    assert distance(*[0.19] * 1000).too_far(peer) == []
    assert distance(*[0.21] * 1000).too_far(peer) == ["|Δ log p| of most tokens", "mean |Δ log p|"]
    # A token or two that went to another expert may be chance, many are not, unless as many of the peer's did.
    assert distance(*[0.1] * 998, 200.0, 200.0).too_far(peer) == []
    assert distance(*[0.1] * 970, *[20.0] * 30).too_far(peer) == ["mean |Δ log p|"]
    assert distance(*[0.1] * 970, *[20.0] * 30).too_far(distance(*[20.0] * 30, *[0.1] * 970)) == []
    assert distance(*[0.01] * 999, math.nan).too_far(peer) == ["mean |Δ log p|"]
    assert distance(*[0.01] * 999, math.inf).too_far(peer) == ["mean |Δ log p|"]


def test_the_bound_of_the_divergence_is_that_of_twice_the_error():
    """It grows with the square of an error."""

    def distance(divergence):
        return Distance([torch.full((1000,), 0.1)], [torch.full((1000,), divergence)], [torch.ones(1000)])

    peer = distance(1e-3)
    assert distance(3.9e-3).too_far(peer) == []
    assert distance(4.1e-3).too_far(peer) == ["KL of most tokens", "mean KL"]


def test_transformers_variant_answers_as_the_engine_does(demo):
    """In fp32 both give the same tokens, texts and ends."""
    llm = LLM.from_parts(demo.llm.engine.model, demo.llm.processor, demo.llm.engine.defaults, max_model_len=64)
    kwargs = {"until": ["Question:"], "max_gen_toks": 6}
    engine, twin = variant_lm(llm, "reference"), variant_lm(llm, "transformers")
    # Turns of a chat: transformers also heeds a stop string that begins in the prompt and ends in the answer.
    chats = [[{"role": "user", "content": text}] for text in ("Hello, how are you", "The answer is")]
    requests = [instance(engine.apply_chat_template(chat), kwargs) for chat in chats]
    assert engine.generate_until(requests) == twin.generate_until(requests)
    stop = next(text[2:4] for text in engine.generate_until(requests) if len(text) > 4)
    for request in requests:
        request.args[1]["until"] = [stop]
    assert engine.generate_until(requests) == twin.generate_until(requests)
    assert [(a.token_ids, a.truncated) for a in engine.answers] == [(a.token_ids, a.truncated) for a in twin.answers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--variants", "fast"), f"--variants fast: choose from {', '.join(VARIANTS)}"),
        (("--variants", "fast", "--data", "nowhere"), "--variants fast: choose from"),  # before any data is looked for
        (("--variants", "transformers,reference"), "tma or reference first"),
        (("--variants", "reference,reference"), "each once"),
        (("--variants", "tma,reference"), "moe='tma' cannot run here"),
        (("--dtype", "float32"), "--dtype must be bfloat16 or float16"),
        (("--data", "nowhere"), "nowhere/test.jsonl is missing"),
        (("--split", "dev"), "--split dev"),
        (("--logprob-problems", 0), "--logprob-problems 0: 1 or more"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_the_published_problems_through_the_demo(shared_dir, tmp_path):
    if not (shared_dir / "gsm8k").is_dir():
        pytest.skip("the shared folder holds no gsm8k")
    fixed = ("--data", shared_dir / "gsm8k", "--device", "cpu", "--max-num-seqs", 4, "--max-gen-toks", 4)
    done = run_program(gsm8k.app, *fixed, "--limit", 1, "--num-fewshot", 1, "--output", tmp_path)
    assert done.code == 0, done.err
    (samples,) = tmp_path.rglob("samples_gsm8k_*.jsonl")
    (first,) = problems.read_problems(shared_dir / "gsm8k" / "test.jsonl")[:1]
    assert json.loads(samples.read_text().splitlines()[0])["doc"] == first


def test_a_variant_on_two_ranks(run, tmp_path):
    done = run("--variants", "reference,reference@2", "--limit", 1, "--max-gen-toks", 24, "--output", tmp_path)
    assert done.code == 0, done.out + done.err
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["variants"] == ["reference", "reference@2"]
    assert [row["variant"] for row in report["logits"]] == ["reference", "transformers"]
    assert [row["variant"] for row in report["engine"]] == [
        "reference",
        "- transformers",
        "reference@2",
        "- transformers",
    ]
