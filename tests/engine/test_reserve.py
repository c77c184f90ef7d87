"""Running sequences keep room for the next tokens of their answers, so that preemption is rare."""

import pytest

from qwen3vl_moe.engine import SamplingParams, scheduler
from tests.engine.conftest import check_leaks

PROMPTS = [{"prompt_token_ids": list(range(10 + n, 30 + n))} for n in range(12)]


def run(make_llm, checkpoint, max_tokens, **options):
    llm = make_llm(checkpoint, block_size=4, num_blocks=60, **options)
    most = 0

    def noted(*args):
        nonlocal most
        most = max(most, len(llm.engine.scheduler.running))
        return launch(*args)

    launch, llm.engine.runner.launch = llm.engine.runner.launch, noted
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    check_leaks(llm)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return tokens, sum(output.metrics.num_preemptions for output in outputs), most


@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"max_prefill_tokens": 24}])
def test_with_room_ahead_nobody_is_preempted(plain, make_llm, monkeypatch, options):
    without = run(make_llm, plain, 40, **options)
    monkeypatch.setattr(scheduler, "_SOON", 128)
    ahead = run(make_llm, plain, 40, **options)
    assert ahead[0] == without[0]
    assert without[1] > 0
    assert ahead[1] == 0
    assert ahead[2] == 60 // ((20 + 40) // 4)  # whole answers fit


def test_room_is_kept_for_no_more_than_an_answer_may_get(plain, make_llm, monkeypatch):
    monkeypatch.setattr(scheduler, "_SOON", 128)
    assert run(make_llm, plain, 4)[1:] == (0, 60 // ((20 + 4) // 4))
