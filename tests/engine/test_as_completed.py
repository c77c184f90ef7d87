"""Many requests at once: answers as they finish, prompts made in threads meanwhile, errors in place of answers."""

import random
import threading
import time

import pytest

from qwen3vl_moe.engine import RequestOutput, SamplingParams
from qwen3vl_moe.errors import OptionError, PromptError
from tests.engine.conftest import PROMPTS, check_leaks, mixed_prompt

TEXT = "Hello, how are you today?"
ITEMS = [
    PROMPTS["three odd images"],
    TEXT,
    [7, 8, 9],
    PROMPTS["one image"],
    [{"role": "user", "content": TEXT}],
    mixed_prompt((30, 30), seed=9),
]
LENGTHS = [30, 3, 12, 20, 8, 2]


def greedy(length):
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def tokens(output):
    return output.outputs[0].token_ids


@pytest.mark.parametrize("max_num_seqs", [1, 2, 16])
def test_it_gives_what_each_item_gives_alone(plain, make_llm, max_num_seqs):
    llm = make_llm(plain)
    params = [greedy(length) for length in LENGTHS]
    alone = [
        tokens((llm.chat if number == 4 else llm.generate)(item, each)[0])
        for number, (item, each) in enumerate(zip(ITEMS, params, strict=True))
    ]
    llm = make_llm(plain, max_num_seqs=max_num_seqs)
    results = list(llm.as_completed(ITEMS, params))
    assert sorted(number for number, _ in results) == list(range(len(ITEMS)))
    assert {number: tokens(output) for number, output in results} == dict(enumerate(alone))
    if max_num_seqs == 16:  # all began together, so the shortest ends first
        assert [number for number, _ in results] == sorted(range(len(ITEMS)), key=lambda number: LENGTHS[number])
    check_leaks(llm)


def test_an_answer_comes_before_the_others_have_ended(llm):
    results = llm.as_completed([TEXT, TEXT], [greedy(500), greedy(2)])
    number, output = next(results)
    assert (number, len(tokens(output))) == (1, 2)
    assert len(llm.engine.scheduler.running) == 1
    results.close()
    check_leaks(llm)


def test_errors_in_place_of_answers(plain, make_llm):
    llm = make_llm(plain, max_model_len=64)
    items = [TEXT, [5] * 64, {"prompt": TEXT, "image": 1}, TEXT, TEXT]
    params = [greedy(5)] * 4 + [SamplingParams(stop_token_ids=[10**6])]
    results = dict(llm.as_completed(items, params, return_exceptions=True))
    assert len(results) == 5
    assert tokens(results[0]) == tokens(results[3]) == tokens(llm.generate(TEXT, greedy(5))[0])
    assert isinstance(results[1], PromptError)
    assert "max_model_len=64" in str(results[1])
    assert "the key 'image'" in str(results[2])
    assert isinstance(results[4], OptionError)
    check_leaks(llm)


def test_without_the_option_an_error_ends_the_call(llm):
    with pytest.raises(PromptError, match="request 1: the prompt is empty"):
        list(llm.as_completed([TEXT, "", TEXT], greedy(50)))
    with pytest.raises(OptionError, match="stop_token_ids"):  # at the call, before the first answer
        llm.as_completed([TEXT], SamplingParams(stop_token_ids=[10**6]))
    with pytest.raises(PromptError, match="a request or a list of them is needed, got int"):
        llm.as_completed(3)
    check_leaks(llm)
    for one in (TEXT, [5, 6], [{"role": "user", "content": TEXT}]):
        ((number, output),) = llm.as_completed(one, greedy(4))
        assert (number, len(tokens(output))) == (0, 4)


def test_one_that_is_never_begun_leaves_nothing_behind(llm, monkeypatch):
    made = []
    monkeypatch.setattr(llm.processor, "prompt", made.append)
    llm.as_completed([TEXT] * 5)
    check_leaks(llm)
    assert not made


# Prompts made in threads


def test_prompts_are_made_while_the_engine_steps(plain, make_llm, monkeypatch):
    """The last prompt is not ready before the second step has begun, which a prompt on the critical path would stop."""
    llm = make_llm(plain, max_num_seqs=2)
    prompt, launch = llm.processor.prompt, llm.engine.runner.launch
    steps, stepped, threads = [], threading.Event(), set()

    def slow(item):
        threads.add(threading.current_thread())
        if item == [9]:
            assert stepped.wait(60)
        return prompt(item)

    def counted(chunks, after=None):
        steps.append(chunks)
        if len(steps) == 2:
            stepped.set()
        return launch(chunks, after)

    monkeypatch.setattr(llm.processor, "prompt", slow)
    monkeypatch.setattr(llm.engine.runner, "launch", counted)
    assert len(llm.generate([[7], [8], [9]], greedy(6))) == 3
    assert threading.main_thread() not in threads


def test_no_more_prompts_are_made_ahead_than_can_run(plain, make_llm, monkeypatch):
    llm = make_llm(plain, max_num_seqs=3)
    prompt, launch = llm.processor.prompt, llm.engine.runner.launch
    made, most_ahead = [], []

    def counted(item):
        made.append(item)
        return prompt(item)

    def looked_at(chunks, after=None):
        deadline = time.monotonic() + 10  # for the threads, which a busy machine may keep from working
        while not most_ahead and len(made) == len(llm.engine.scheduler.running) and time.monotonic() < deadline:
            time.sleep(0.001)
        most_ahead.append(len(made) - ended() - len(llm.engine.scheduler.running))
        return launch(chunks, after)

    answers = []

    def ended():
        return len(answers)

    monkeypatch.setattr(llm.processor, "prompt", counted)
    monkeypatch.setattr(llm.engine.runner, "launch", looked_at)
    for result in llm.as_completed([[n] for n in range(30)], greedy(4)):
        answers.append(result)
    assert 0 < max(most_ahead) <= 3
    assert len(made) == 30


def test_a_step_waits_for_no_more_images_than_it_can_take(plain, make_llm, monkeypatch):
    llm = make_llm(plain, max_prefill_tokens=16)
    launch, entered = llm.engine.runner.launch, []
    monkeypatch.setattr(
        llm.engine.runner,
        "launch",
        lambda chunks, after=None: (
            entered.append(len(llm.engine.scheduler.running) + len(llm.engine.scheduler.waiting)),
            launch(chunks, after),
        )[1],
    )
    items = [mixed_prompt((40, 30), seed=seed) for seed in range(6)]
    images = sum(image.num_tokens for image in llm.processor.prompt(items[0]).images)
    llm.generate(items, greedy(40))
    assert entered[0] == -(-16 // images) < 6
    assert max(entered) == 6


def test_the_clock_changes_nothing(plain, make_llm, monkeypatch):
    """Requests without a seed share the engine's random numbers: who is in which step must not depend on threads."""
    items = [item for item in ITEMS if not isinstance(item, list)] * 4
    params = [SamplingParams(temperature=1.0, max_tokens=3 + n % 5, ignore_eos=True) for n in range(len(items))]

    def run(delay):
        llm = make_llm(plain, max_num_seqs=4, max_prefill_tokens=32)
        prompt = llm.processor.prompt
        with monkeypatch.context() as patch:
            patch.setattr(llm.processor, "prompt", lambda item: (time.sleep(delay()), prompt(item))[1])
            return [(number, tokens(output)) for number, output in llm.as_completed(items, params)]

    expected = run(lambda: 0.0)
    noise = random.Random(0)
    assert run(lambda: 0.03 * noise.random()) == expected
    assert run(lambda: noise.choice([0.0, 0.04])) == expected


def test_interruption_stops_the_threads_too(plain, make_llm, monkeypatch):
    llm = make_llm(plain, max_num_seqs=4)
    expected = tokens(llm.generate(TEXT, greedy(8))[0])
    prompt, launch = llm.processor.prompt, llm.engine.runner.launch
    made, steps = [], []

    def counted(item):
        made.append(item)
        return prompt(item)

    def interrupted(chunks, after=None):
        steps.append(chunks)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return launch(chunks, after)

    with monkeypatch.context() as patch:
        patch.setattr(llm.processor, "prompt", counted)
        patch.setattr(llm.engine.runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([TEXT] * 200, greedy(24))
        check_leaks(llm)
        deadline = time.monotonic() + 10
        while any(thread.name.startswith("prefetch") for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(made) <= 4 + 4 + 1  # those that ran, and those made ahead
    assert tokens(llm.generate(TEXT, greedy(8))[0]) == expected


def test_stages_of_prompts_made_ahead(llm):
    """Waiting for a seat is no part of the making of a prompt."""
    begun = time.time()
    outputs = llm.generate([PROMPTS["one image"]] * 24, greedy(6))
    assert all(isinstance(output, RequestOutput) for output in outputs)
    for metrics in (output.metrics for output in outputs):
        assert begun <= metrics.arrival_time
        waited = metrics.first_scheduled_time - metrics.arrival_time
        assert metrics.stages["queue"] == pytest.approx(waited - metrics.stages["preprocess"])
        assert min(metrics.stages["queue"], metrics.stages["preprocess"]) > 0
    assert outputs[-1].metrics.stages["queue"] > outputs[-1].metrics.stages["preprocess"]


def test_functions_that_make_their_requests_when_it_is_their_turn(plain, make_llm):
    """They are called in order, not all at once, and what one raises is its own error."""
    llm, made = make_llm(plain, max_num_seqs=2), []

    def request(number):
        made.append(number)
        if number == 3:
            raise PromptError("no such row")
        return [{"role": "user", "content": TEXT}]

    (alone,) = llm.chat([{"role": "user", "content": TEXT}], greedy(4))
    functions = [lambda number=number: request(number) for number in range(20)]
    results, most_ahead = {}, 0
    for number, result in llm.as_completed(functions, greedy(4), return_exceptions=True):
        results[number] = result
        most_ahead = max(most_ahead, len(made) - len(results))
    assert sorted(made) == sorted(results) == list(range(20))
    assert most_ahead <= 6, "two that run, two that are ready, two of another step"
    assert str(results.pop(3)) == "no such row"
    assert all(tokens(output) == tokens(alone) for output in results.values())
    check_leaks(llm)
