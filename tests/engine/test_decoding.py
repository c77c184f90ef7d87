"""Steps of decoding: arrays that read as the list of chunks, and what is put off until somebody looks."""

from dataclasses import replace

import numpy as np
import pytest

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.chunks import Chunk, Decoding
from tests.engine.conftest import PROMPTS, check_leaks
from tests.engine.test_scheduler import make_scheduler, make_sequence

TEXT = "Hello, how are you today?"


def greedy(max_tokens, **more):
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **more})


def test_it_reads_as_the_list_of_chunks():
    sequences = [make_sequence([number] * (3 + number), 4) for number in range(3)]
    before = [Chunk(sequence, 0, sequence.num_prompt_tokens, samples=True) for sequence in sequences]
    step = Decoding.after(before)
    expected = [Chunk(s, stop, stop + 1, samples=True) for s, _, stop, _ in before]
    assert list(step) == expected
    assert (step[-1], step[1:], len(step)) == (expected[-1], expected[1:], 3)
    assert all(type(chunk.stop) is int for chunk in step)
    some = step.next().where(np.array([True, False, True]))
    assert list(some) == [Chunk(s, start + 1, stop + 1, samples=True) for s, start, stop, _ in expected[::2]]
    assert some.left_S.tolist() == [s.most_tokens - chunk.stop for s, chunk in zip(sequences[::2], some, strict=True)]
    assert step.where(np.array([True] * 3)) is step, "so that what was made for these sequences still serves"


def test_blocks_grow_just_where_a_token_is_the_first_of_one():
    scheduler = make_scheduler(20, 4)
    sequences = [make_sequence([number] * (3 + number), 9) for number in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.schedule()
    scheduler.schedule()  # eight prompt tokens a step: all have blocks now
    step = [Chunk(sequence, 0, sequence.num_prompt_tokens, samples=True) for sequence in sequences]
    for _ in range(6):
        step = scheduler.ahead(step)
        assert [len(chunk.sequence.block_table) for chunk in step] == [-(-chunk.stop // 4) for chunk in step]


@pytest.mark.parametrize("ahead", [False, True])
def test_every_step_counts_once_for_everybody_in_it(plain, make_llm, monkeypatch, ahead):
    """A second a step: each request has as many as it has tokens, however it went and whoever came and went."""
    llm = make_llm(plain, async_scheduling=ahead, max_num_seqs=3)
    read = llm.engine.runner.read
    seconds = {"host_to_device": 0.0, "vision": 0.0, "sample": 1.0}
    monkeypatch.setattr(llm.engine.runner, "read", lambda step: replace(read(step), seconds=seconds))
    stop = llm.generate(TEXT, greedy(20))[0].outputs[0].token_ids[9]
    params = [greedy(20), greedy(3), greedy(20, stop_token_ids=[stop]), greedy(17, logprobs=1), greedy(9), greedy(20)]
    prompts = [TEXT, PROMPTS["text"], TEXT, "One two", PROMPTS["one image"], [5, 6, 7]]
    sequences = [
        llm.engine.request(llm.processor.prompt(prompt), own) for prompt, own in zip(prompts, params, strict=True)
    ]
    for sequence in sequences:
        llm.engine.add(sequence)
    while not all(sequence.finished for sequence in sequences):
        llm.engine.step()
    for sequence in sequences:  # now: rows in vain have been read meanwhile
        assert sequence.output().metrics.stages["sample"] == sequence.num_output_tokens
    for output in llm.stream(TEXT, greedy(20)):
        assert output.metrics.stages["sample"] == len(output.outputs[0].token_ids)
    check_leaks(llm)


@pytest.mark.parametrize("include", [False, True])
def test_the_text_is_made_when_it_is_asked_for(llm, include):
    """Up to the token that ended the answer, or with it; nothing is lost or doubled by looking in between."""
    whole = llm.generate(TEXT, greedy(24))[0].outputs[0].token_ids
    end = next(n for n in range(8, 24) if whole.index(whole[n]) == n)
    params = greedy(24, stop_token_ids=[whole[end]], include_stop_str_in_output=include)
    looked_at, left = (llm.engine.request(llm.processor.prompt(TEXT), params) for _ in range(2))
    for sequence in (looked_at, left):
        llm.engine.add(sequence)
    decode = llm.processor.tokenizer.decode
    while not left.finished:
        llm.engine.step()
        if not looked_at.finished:
            shown = looked_at.output().outputs[0].text
            text = decode(looked_at.output_ids, skip_special_tokens=True)
            assert text in (shown, shown + "\ufffd"), "all but a character that has only begun"
            assert left.text.text == ""
    expected = decode(whole[: end + include], skip_special_tokens=True)
    assert [sequence.output().outputs[0].text for sequence in (looked_at, left)] == [expected, expected]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("params", [greedy(24), greedy(24, logprobs=0)], ids=["plain", "watched"])
def test_every_full_block_of_an_answer_is_found_again(plain, make_llm, ahead, params):
    llm = make_llm(plain, async_scheduling=ahead, block_size=4)
    for prompt in (list(range(5, 5 + length)) for length in range(9, 13)):  # ends at every place in a block
        (output,) = llm.generate([prompt], params)
        answer = output.outputs[0].token_ids
        (again,) = llm.generate([{"prompt_token_ids": prompt, "text_token_ids": [*answer, 7]}], greedy(1))
        assert again.num_cached_tokens == (len(prompt + answer) - 1) // 4 * 4, "all but the last token were computed"
