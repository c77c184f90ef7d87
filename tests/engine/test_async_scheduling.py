"""Steps launched before the tokens of the last one are read: the same answers, and nothing left of rows in vain."""

import sys

import pytest

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.defaults import GenerationDefaults
from tests.engine.conftest import PROMPTS, check_leaks

TEXT = "Hello, how are you today?"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def greedy(max_tokens, **more):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture
def watch(monkeypatch):
    """``watch(llm)``: a list that fills with each launch, as (rows, whether it was ahead of its tokens)."""

    def watched(llm):
        launches, launch = [], llm.engine.runner.launch

        def noted(chunks, after=None):
            launches.append((sum(chunk.stop - chunk.start for chunk in chunks), after is not None))
            return launch(chunks, after)

        monkeypatch.setattr(llm.engine.runner, "launch", noted)
        return launches

    return watched


def test_every_step_of_decoding_is_launched_ahead_and_no_row_is_computed_twice(llm, watch):
    launches = watch(llm)
    (output,) = llm.generate(TEXT, GREEDY)
    assert launches == [(len(output.prompt_token_ids), False)] + [(1, True)] * 23


@pytest.mark.parametrize("options", [{"async_scheduling": None}, {"async_scheduling": False}])
def test_on_a_cpu_only_where_asked_for(plain, make_llm, watch, options):
    llm = make_llm(plain, **options)
    launches = watch(llm)
    llm.generate(TEXT, GREEDY)
    assert len(launches) == 24
    assert not any(ahead for _, ahead in launches)


MANY = [
    (PROMPTS["text"], greedy(24)),
    (PROMPTS["one image"], greedy(1)),
    (PROMPTS["three odd images"], SamplingParams(temperature=0, max_tokens=40)),
    (TEXT, SamplingParams(temperature=1.0, max_tokens=30, seed=3)),
    (TEXT, SamplingParams(temperature=1.3, top_k=30, max_tokens=17, seed=4, stop=["e", "a"])),
    (PROMPTS["one image"], greedy(31, stop=["o"])),
    (TEXT, greedy(9)),
    (PROMPTS["text"], SamplingParams(temperature=0.7, top_p=0.9, max_tokens=24, seed=5, ignore_eos=True)),
    (TEXT, greedy(28, repetition_penalty=1.3)),
    (PROMPTS["one image"], SamplingParams(temperature=1.0, seed=6, max_tokens=22, presence_penalty=0.9, logprobs=3)),
    (TEXT, SamplingParams(temperature=0.9, seed=7, max_tokens=19, frequency_penalty=-0.6, repetition_penalty=0.8)),
    (PROMPTS["text"], greedy(14, logprobs=-1)),
]  # fmt: skip


def own_logprobs(outputs):
    """Of each token of each answer for which they were asked, one after the other."""
    return [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.outputs[0].token_ids, output.outputs[0].logprobs or (), strict=False)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_seqs": 2},
        {"max_prefill_tokens": 5, "max_encoder_tokens": 20},
        {"block_size": 4, "num_blocks": 40},
        {"block_size": 1, "num_blocks": 140, "enable_prefix_caching": False},
    ],
)
def test_the_same_answers_with_and_without(plain, make_llm, watch, options):
    """Greedy and seeded requests, ended by their length, by end-of-text and by stop strings, twice over."""
    prompts, params = map(list, zip(*MANY, strict=True))
    before, after = (make_llm(plain, async_scheduling=on, **options) for on in (False, True))
    # Whatever the model says fifth to the first prompt is declared to be the end of text.
    (whole,) = before.generate(prompts[:1], params[:1])
    for llm in (before, after):
        llm.engine.defaults = GenerationDefaults(frozenset({whole.outputs[0].token_ids[4]}))
    launches = watch(after)
    for _ in range(2):
        expected, ours = before.generate(prompts, params), after.generate(prompts, params)
        assert tokens(ours) == tokens(expected)
        assert [o.outputs[0].text for o in ours] == [o.outputs[0].text for o in expected]
        assert [o.outputs[0].finish_reason for o in ours] == [o.outputs[0].finish_reason for o in expected]
        assert own_logprobs(ours) == pytest.approx(own_logprobs(expected), abs=1e-4)  # in batches of other sizes
        check_leaks(after)
    assert {"stop", "length"} == {output.outputs[0].finish_reason for output in ours}
    assert any(ahead for _, ahead in launches)


def test_what_a_row_in_vain_writes_is_never_found(plain, make_llm):
    """An answer ends where its next row would fill a block; others go on from the same beginning."""
    llm = make_llm(plain, block_size=4)
    (whole,) = make_llm(plain).generate(TEXT, GREEDY)
    ids, answer = whole.prompt_token_ids, whole.outputs[0].token_ids
    for end in range(1, 9):  # ended by its last token, after `end` of them: every place in a block
        stop = answer[end - 1]
        length = answer.index(stop) + 1
        (output,) = llm.generate(TEXT, greedy(24, stop_token_ids=[stop]))
        assert output.outputs[0].token_ids == answer[:length]
        check_leaks(llm)
        (again,) = llm.generate([ids + answer[:length]], greedy(24 - length))
        assert again.outputs[0].token_ids == answer[length:]


def test_a_request_that_has_ended_takes_nothing_more(llm):
    """Beside one that goes on, so that its row in vain is read."""
    answer = llm.generate(TEXT, GREEDY)[0].outputs[0].token_ids
    for end in range(2, 20):  # every place in a block of 16
        ends, stays = (
            llm.engine.request(llm.processor.prompt(TEXT), params)
            for params in (greedy(24, stop_token_ids=[answer[end]]), GREEDY)
        )
        llm.engine.add(ends)
        llm.engine.add(stays)
        while not stays.finished:
            llm.engine.step()
        assert ends.output_ids == answer[: answer.index(answer[end]) + 1]
        assert ends.finish_reason == "stop"
        assert ends.num_computed == len(ends.token_ids) - 1
        assert stays.output_ids == answer
    check_leaks(llm)


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 3},
        {"logit_bias": {5: 1.0}},
    ],
    ids=str,
)
def test_what_the_device_knows_is_launched_ahead(llm, watch, more):
    launches = watch(llm)
    llm.generate(TEXT, SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **more}))
    assert [ahead for _, ahead in launches] == [False] + [True] * 7


@pytest.mark.parametrize("more", [{"min_tokens": 8}, {"bad_words": ["the table"]}], ids=str)
def test_what_needs_the_answer_so_far_is_not_launched_ahead(llm, watch, more):
    launches = watch(llm)
    llm.generate([TEXT, TEXT], [greedy(8), greedy(8, **more)])  # nor are those beside it
    assert not any(ahead for _, ahead in launches)


def test_the_same_calls_give_the_same_tokens(plain, make_llm):
    """Also requests without a seed, of which some end unforeseen and leave rows in vain."""
    (first,) = make_llm(plain).generate(TEXT, SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True))
    params = SamplingParams(temperature=1.0, max_tokens=24, stop_token_ids=first.outputs[0].token_ids[5:8])
    one, two = (tokens(make_llm(plain, max_num_seqs=3).generate([TEXT] * 8, params)) for _ in range(2))
    assert one == two
    assert len({len(answer) for answer in one}) > 1


def test_a_request_that_is_given_up_beside_one_that_goes_on(llm):
    expected = tokens(llm.generate([TEXT, PROMPTS["one image"]], GREEDY))
    staying, leaving = llm.stream(TEXT, GREEDY), llm.stream(PROMPTS["one image"], GREEDY)
    next(staying), next(leaving), next(staying)
    leaving.close()
    (other,) = llm.generate(PROMPTS["one image"], GREEDY)  # its blocks are those that the aborted rows still write to
    *_, last = staying
    assert [last.outputs[0].token_ids, other.outputs[0].token_ids] == expected
    check_leaks(llm)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, seed=6, max_tokens=24, ignore_eos=True)])
@pytest.mark.parametrize("place", ["launch", "read"])
@pytest.mark.parametrize("when", range(1, 5))
def test_an_interruption_leaves_other_requests_whole(llm, monkeypatch, params, place, when):
    (expected,) = tokens(llm.generate(TEXT, params))
    stream = llm.stream(TEXT, params)
    next(stream)
    inner, calls = getattr(llm.engine.runner, place), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == when:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPTS["one image"]] * 2, GREEDY)
    *_, last = stream
    assert last.outputs[0].token_ids == expected
    check_leaks(llm)


@pytest.mark.parametrize("at", range(1, 22))
def test_an_interruption_while_tokens_are_handed_out(llm, at):
    """Before each line of it. The step launched ahead goes on from tokens of which some were not taken."""
    asked = [GREEDY, greedy(24, logprobs=1), GREEDY]
    prompts = [TEXT, PROMPTS["text"], "One two three"]
    expected = tokens(llm.generate(prompts, asked))
    streams = list(map(llm.stream, prompts, asked))
    for stream in [*streams, streams[0]]:
        next(stream)
    handing_out, lines, before = llm.engine._take_decoded.__code__, 0, sys.gettrace()

    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code is not handing_out:
            return trace if event == "call" else None
        lines += event == "line"
        if lines == at:
            lines += 1
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.engine.step()
    finally:
        sys.settrace(before)
    for stream, answer in zip(streams, expected, strict=True):
        *_, last = stream
        assert last.outputs[0].token_ids == answer
        assert last.outputs[0].text == llm.processor.tokenizer.decode(answer, skip_special_tokens=True)
    check_leaks(llm)


def test_streams_show_every_token_once(llm):
    (whole,) = llm.generate(TEXT, GREEDY)
    outputs = list(llm.stream(TEXT, GREEDY))
    assert "".join(output.outputs[0].new_text for output in outputs) == whole.outputs[0].text
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(set(lengths))
