"""Logits that are not finite end their request by name; all others go on as if nothing had been."""

import pytest
import torch

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.errors import NumbersError
from tests.engine.conftest import check_leaks, mixed_prompt

TEXT = "Hello, how are you today?"
BAD = 7  # a token whose embedding is damaged
KINDS = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.0, "seed": 1},
    "truncated": {"temperature": 0.8, "seed": 2, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "constrained": {"temperature": 1.0, "seed": 3, "logit_bias": {4: 1}, "bad_words": ["x"], "min_tokens": 3},
    "log-probabilities": {"temperature": 0, "logprobs": 2},
}


def params(**more):
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | more)


@pytest.fixture
def poison(monkeypatch):
    """``poison(llm, value, call, row)``: that many calls later, one logit of one row of the model's is ``value``."""

    def poisoned(llm, value, call, row):
        calls, compute = [], llm.engine.model.compute_logits

        def wrong(*args, **kwargs):
            logits_RV = compute(*args, **kwargs)
            calls.append(len(logits_RV))
            if len(calls) == call:
                logits_RV = logits_RV.clone()
                logits_RV[row, 11] = value
            return logits_RV

        monkeypatch.setattr(llm.engine.model, "compute_logits", wrong)

    return poisoned


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_ends_and_the_others_go_on(plain, make_llm, poison, kind, value, ahead):
    prompts = [TEXT, mixed_prompt((40, 30)), TEXT]
    asked = [params(temperature=0), params(**KINDS[kind]), params(temperature=1.0, seed=9)]
    llm = make_llm(plain, async_scheduling=ahead)
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, asked)]
    poison(llm, value, call=5, row=1)
    results = dict(llm.as_completed(prompts, asked, return_exceptions=True))
    assert isinstance(results[1], NumbersError)
    assert "token 5 of the answer: its logits are not finite" in str(results[1])
    assert [results[number].outputs[0].token_ids for number in (0, 2)] == [expected[0], expected[2]]
    check_leaks(llm)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_without_the_option_it_is_raised(llm, poison, call):
    poison(llm, float("nan"), call=3, row=0)
    with pytest.raises(NumbersError, match="token 3 of the answer"):
        list(getattr(llm, call)(TEXT, params(temperature=0)))
    check_leaks(llm)


def test_of_several_requests_the_number_is_named(llm, poison):
    poison(llm, float("nan"), call=2, row=1)
    with pytest.raises(NumbersError, match=r"^prompt 1: token 2 of"):
        llm.generate([TEXT] * 3, params(temperature=0))
    check_leaks(llm)


def test_one_answer_of_several_ends_the_request(llm, poison):
    poison(llm, float("nan"), call=4, row=1)
    results = dict(llm.as_completed([TEXT, TEXT], params(n=3, temperature=1.0, seed=1), return_exceptions=True))
    assert sorted(isinstance(result, NumbersError) for result in results.values()) == [False, True]
    check_leaks(llm)


@pytest.mark.parametrize("more", [{}, {"prompt_logprobs": 0}])
def test_a_damaged_weight_ends_what_meets_it(llm, more):
    good, bad = [[20, 21, 22, 23]] * 2, [[20, 21, BAD, 23, 24]]
    expected = [output.outputs[0].token_ids for output in llm.generate(good, params(temperature=0))]
    weight = llm.engine.model.text.embed.weight
    with torch.no_grad():
        sound = weight[BAD].clone()
        weight[BAD] = torch.nan
    try:
        results = dict(llm.as_completed([*good, *bad, *good], params(temperature=0, **more), return_exceptions=True))
    finally:
        weight.data[BAD] = sound
    assert isinstance(results[2], NumbersError)
    assert ("the prompt's first 5 tokens" if more else "token 1 of the answer") in str(results[2])
    assert [results[number].outputs[0].token_ids for number in (0, 1, 3, 4)] == expected * 2
    check_leaks(llm)
    assert [output.outputs[0].token_ids for output in llm.generate(good, params(temperature=0))] == expected
