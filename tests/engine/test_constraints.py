"""Tokens ruled out or made likelier: biases, allowed tokens, bad words, shortest answers; alone and in company."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.constraints import Constraints, tokens_of_bad_words
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.inputs.tokenizer import load_tokenizer
from tests.engine.conftest import PROMPTS, check_leaks

TEXT = "Hello, how are you today?"
VOCABULARY = 50


def answer(llm, prompt=TEXT, **params):
    (output,) = llm.generate(prompt, SamplingParams(**{"temperature": 0, "max_tokens": 24} | params))
    return output.outputs[0]


def changed(logits_V, answer=(), bad_words=(), ending=(), suppressed=(), **params):
    complete = GenerationDefaults().complete(SamplingParams(**params))
    logits_V = logits_V.clone()
    Constraints(complete, ending, suppressed, bad_words).apply(logits_V, list(answer))
    return logits_V


@pytest.fixture
def logits_V():
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))


def test_biases_are_added(logits_V):
    bias = {3: 5.0, 7: -100.0, 49: 0.5}
    expected = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    assert torch.equal(changed(logits_V, logit_bias=bias), expected(torch.tensor([[1]]), logits_V[None])[0])


@pytest.mark.parametrize("answer", [[], [5], [5, 6], [6, 5], [5, 6, 7], [1, 5, 6]])
def test_bad_words_are_those_of_transformers(logits_V, answer):
    bad = [(4,), (5, 6), (5, 6, 7), (8, 9)]
    expected = NoBadWordsLogitsProcessor([list(words) for words in bad])(torch.tensor([answer]).long(), logits_V[None])
    assert torch.equal(changed(logits_V, answer, bad), expected[0])


@pytest.mark.parametrize("length", range(5))
def test_shortest_answers_are_those_of_transformers(logits_V, length):
    processor = MinNewTokensLengthLogitsProcessor(0, 3, [7, 8], device="cpu")
    expected = processor(torch.zeros(1, length, dtype=torch.int64), logits_V[None])[0]
    assert torch.equal(changed(logits_V, [0] * length, ending=[7, 8], min_tokens=3), expected)


def test_allowed_tokens_stay_as_they_are(logits_V):
    found = changed(logits_V, allowed_token_ids=[3, 8, 9], logit_bias={3: 1, 4: 50}, suppressed=[9])
    assert found.isfinite().nonzero().flatten().tolist() == [3, 8]
    assert found[8] == logits_V[8]
    assert found[3] == logits_V[3] + 1


# Whole answers


def test_only_allowed_tokens_come(llm):
    allowed = [40, 41, 42]
    assert set(answer(llm, allowed_token_ids=allowed).token_ids) <= set(allowed)
    assert set(answer(llm, allowed_token_ids=allowed, temperature=5.0, seed=1).token_ids) == set(allowed)


def test_a_bias_decides(llm):
    assert answer(llm, logit_bias={77: 100}).token_ids == [77] * 24
    whole = answer(llm, ignore_eos=True).token_ids
    without = answer(llm, ignore_eos=True, logit_bias={whole[0]: -100}).token_ids
    assert whole[0] not in without


def test_suppressed_tokens_never_come(llm):
    whole = answer(llm, ignore_eos=True).token_ids
    llm.engine.defaults = GenerationDefaults(suppressed=tuple(whole))
    assert not set(whole) & set(answer(llm).token_ids)


@pytest.mark.parametrize("span", [slice(0, 1), slice(3, 4), slice(0, 2), slice(5, 8)])
def test_bad_words_do_not_come(llm, span, monkeypatch):
    whole = answer(llm, ignore_eos=True).token_ids
    bad = tuple(whole[span])
    monkeypatch.setattr(
        "qwen3vl_moe.engine.engine.tokens_of_bad_words", lambda tokenizer, words: [bad] if words else []
    )
    found = answer(llm, ignore_eos=True, bad_words=["it"]).token_ids
    assert found[: span.stop - 1] == whole[: span.stop - 1]
    assert all(tuple(found[at : at + len(bad)]) != bad for at in range(len(found)))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cat", [" cat", "cat"]),
        ("  cat", [" cat", "cat"]),
        ("Hello there", None),
    ],
)
def test_bad_words_are_tokens_at_a_beginning_and_after_a_space(shared_dir, word, expected):
    tokenizer = load_tokenizer(shared_dir / "qwen3vl-tokenizer")
    found = tokens_of_bad_words(tokenizer, [word])
    texts = sorted(tokenizer.decode(tokens) for tokens in found)
    assert texts == sorted(expected or [word, f" {word}"])


@pytest.mark.parametrize("kind", ["end of text", "stop token", "stop string"])
@pytest.mark.parametrize("least", [1, 5, 6, 24])
def test_an_answer_is_not_too_short(llm, kind, least):
    """Whatever would end it early does so only after ``min_tokens``."""
    whole = answer(llm, ignore_eos=True)
    token, text = whole.token_ids[3], whole.text
    llm.engine.defaults = GenerationDefaults(frozenset({token} if kind == "end of text" else ()))
    params = {"stop token": {"stop_token_ids": [token]}, "stop string": {"stop": text[3]}}.get(kind, {})
    assert len(answer(llm, **params).token_ids) <= 4 or kind == "stop string"
    found = answer(llm, min_tokens=least, **params)
    assert len(found.token_ids) >= least
    if kind != "stop string":
        assert token not in found.token_ids[:least]
    assert answer(llm, min_tokens=0, **params).token_ids == answer(llm, **params).token_ids


def test_nothing_left_to_choose_is_an_error_of_the_request(llm):
    dead = SamplingParams(allowed_token_ids=[5], logit_bias={5: 1}, max_tokens=9, temperature=0)
    llm.engine.defaults = GenerationDefaults(suppressed=(5,))
    good = SamplingParams(max_tokens=9, ignore_eos=True)
    results = dict(llm.as_completed([TEXT, TEXT], [dead, good], return_exceptions=True))
    assert isinstance(results[0], OptionError)
    assert "rule out all" in str(results[0])
    assert len(results[1].outputs[0].token_ids) == 9
    check_leaks(llm)


MANY = [
    {"logit_bias": {5: 2.5, 9: -3}, "temperature": 0.9, "seed": 1},
    {"allowed_token_ids": list(range(40, 200))},
    {"min_tokens": 7, "stop_token_ids": list(range(100, 300))},
    {"bad_words": ["a", "th", "e d", "\n"], "temperature": 1.2, "seed": 2},
    {"ignore_eos": True},
    {"temperature": 1.0, "seed": 3, "top_k": 30, "min_tokens": 3},
    {"min_tokens": 12, "stop": ["e", "a", "o"], "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 3}, {"block_size": 4, "num_blocks": 40}])
def test_company_and_launching_ahead_change_nothing(plain, make_llm, options):
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 20} | each) for each in MANY]
    prompts = [TEXT, PROMPTS["one image"], TEXT, TEXT, PROMPTS["text"], TEXT, TEXT]
    alone = make_llm(plain, async_scheduling=False)
    expected = [alone.generate(prompt, each)[0].outputs[0] for prompt, each in zip(prompts, params, strict=True)]
    for ahead in (False, True):
        llm = make_llm(plain, async_scheduling=ahead, **options)
        found = [output.outputs[0] for output in llm.generate(prompts, params)]
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert [each.text for each in found] == [each.text for each in expected]
        check_leaks(llm)
