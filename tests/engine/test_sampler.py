"""Choosing tokens: penalties and truncation against transformers' logits processors, draws by their distribution."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.engine.sampler import SamplingPlan, readable, sample, token_logprobs

VOCABULARY = 50


def sequence(prompt=(1, 2, 3), answer=(), seed=None, constraints=None, **params):
    """What the sampler reads of a sequence."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    complete = GenerationDefaults().complete(SamplingParams(**params))
    tokens = [*prompt, *answer]
    return SimpleNamespace(
        params=complete,
        token_ids=tokens,
        num_prompt_tokens=len(prompt),
        output_ids=list(answer),
        generator=generator,
        constraints=constraints,
    )


def draw(logits, rows, seed=0):
    return sample(logits, SamplingPlan.of(rows, "cpu"), torch.Generator().manual_seed(seed))[0].tolist()


@pytest.fixture
def logits():
    return 3 * torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))


def check_draws(logits_V, expected_V, count=4000, **arguments):
    """Frequencies of many draws against the probabilities that they should have."""
    drawn = Counter(draw(logits_V.expand(count, -1), [sequence(**arguments)] * count))
    frequency_V = torch.tensor([drawn[token] / count for token in range(VOCABULARY)])
    assert not frequency_V[expected_V == 0].any()
    # Five standard deviations of a binomial frequency: the chance of one of 50 tokens to be outside is 3e-5.
    assert ((frequency_V - expected_V).abs() <= 5 * (expected_V * (1 - expected_V) / count).sqrt() + 1 / count).all()


def warped(logits_V, *processors, tokens=(1, 2, 3)):
    return LogitsProcessorList(processors)(torch.tensor([list(tokens)]), logits_V[None].clone())[0].softmax(-1)


TRUNCATIONS = {
    "temperature": ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
    "cold": ({"temperature": 0.3}, [TemperatureLogitsWarper(0.3)]),
    "top_k": ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
    "top_k of one": ({"temperature": 1.0, "top_k": 1}, [TopKLogitsWarper(1)]),
    "top_k beyond the vocabulary": ({"temperature": 1.0, "top_k": 10**6}, []),
    "top_p": ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "small top_p": ({"temperature": 1.0, "top_p": 0.01}, [TopPLogitsWarper(0.01)]),
    "min_p": ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "all of the published defaults": (
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
    ),
    "min_p before top_k before top_p": (
        {"temperature": 1.5, "min_p": 0.05, "top_k": 9, "top_p": 0.9},
        [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.05), TopKLogitsWarper(9), TopPLogitsWarper(0.9)],
    ),
}


@pytest.mark.parametrize("name", list(TRUNCATIONS))
def test_draws_follow_the_truncated_distribution(logits, name):
    params, processors = TRUNCATIONS[name]
    expected = warped(logits[0], *processors)
    check_draws(logits[0], expected, **params)


def test_greedy_is_argmax_and_draws_nothing(logits):
    rows = [sequence(temperature=0) for _ in logits]
    assert sample(logits, SamplingPlan.of(rows, "cpu"), generator=None)[0].tolist() == logits.argmax(-1).tolist()


def test_repetition_penalty_is_that_of_transformers(logits):
    """Over prompt and answer, once per token however often it is there."""
    row = sequence(prompt=range(20), answer=[20, 20, 21], temperature=0, repetition_penalty=1.6)
    untouched = logits.clone()
    for shift in range(-3, 4):  # several alignments of positive and negative logits
        shifted = logits + shift
        expected = warped(shifted[0], RepetitionPenaltyLogitsProcessor(1.6), tokens=row.token_ids)
        assert draw(shifted[:1], [row]) == [expected.argmax().item()]
    expected = warped(logits[0], RepetitionPenaltyLogitsProcessor(1.6), tokens=row.token_ids)
    check_draws(logits[0], expected, prompt=range(20), answer=[20, 20, 21], temperature=1.0, repetition_penalty=1.6)
    assert torch.equal(logits, untouched), "raw logits are needed for log-probabilities"


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-1.0, 0.4)])
def test_presence_and_frequency_penalties(logits, presence, frequency):
    """By their definition: over the answer only, once per token and once per occurrence."""
    first, *prompt = logits[0].topk(4).indices.tolist()  # likely ones: a penalty for them would show
    answer = [3, 4, 4, 4, 5, first]
    penalised = logits[0].clone()
    for token, count in Counter(answer).items():
        penalised[token] -= presence + frequency * count
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    check_draws(logits[0], penalised.softmax(-1), prompt=prompt, answer=answer, temperature=1.0, **penalties)


def test_each_row_has_its_own_top_k(logits):
    """The best few are sorted for all rows at once, as many as the row that keeps most of them needs."""
    count, kept = 2000, (1, 2, 5)
    rows = [sequence(temperature=1.0, top_k=k) for k in kept] * count
    drawn = draw(logits[:1].expand(len(rows), -1), rows)
    order = logits[0].argsort(descending=True).tolist()
    for start, k in enumerate(kept):
        assert set(drawn[start :: len(kept)]) == set(order[:k])


def test_a_row_does_not_depend_on_its_neighbours(logits):
    def rows():
        return [
            sequence(seed=1, temperature=1.0, top_k=7),
            sequence(temperature=0),
            sequence(seed=2, temperature=2.0, top_p=0.9),
            sequence(seed=3, temperature=1.0, answer=[4, 5], repetition_penalty=1.3),
        ]

    together = draw(logits, rows())
    assert together == [draw(logits[i : i + 1], [row], seed=9)[0] for i, row in enumerate(rows())]
    assert together == draw(logits.flip(0), rows()[::-1], seed=8)[::-1]


def test_a_generator_goes_on_from_token_to_token(logits):
    row = sequence(seed=1, temperature=1.0)
    assert len({draw(logits[:1], [row])[0] for _ in range(20)}) > 3


def test_tied_logits_are_kept_together():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, :4] = 2.0
    expected = torch.zeros(VOCABULARY)
    expected[:4] = 0.25
    check_draws(logits[0], expected, temperature=1.0, top_k=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_are_log_softmax(logits, dtype):
    logits = logits.to(dtype)
    tokens = torch.tensor([0, 7, 49, 3])
    expected = logits.double().log_softmax(-1)
    for row, entries in enumerate(readable(token_logprobs(logits, tokens, 5))):
        own, *top = entries
        order = expected[row].argsort(descending=True).tolist()
        assert own[0] == tokens[row]
        assert own[1] == pytest.approx(expected[row, tokens[row]].item(), abs=1e-5)
        assert own[2] == 1 + (expected[row] > expected[row, tokens[row]]).sum()
        assert [rank for _, _, rank in top] == [1, 2, 3, 4, 5]
        assert [value for _, value, _ in top] == pytest.approx(expected[row, order[:5]].tolist(), abs=1e-5)
        if dtype == torch.float32:
            assert [token for token, _, _ in top] == order[:5]


def test_more_top_logprobs_than_tokens(logits):
    assert len(readable(token_logprobs(logits, torch.zeros(4, dtype=torch.int64), 1000))[0]) == 1 + VOCABULARY
