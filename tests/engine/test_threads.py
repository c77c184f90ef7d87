"""Several threads at one LLM: each call gets what it would have got alone, and none waits for ever."""

import collections
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwen3vl_moe.engine import SamplingParams, calls
from qwen3vl_moe.engine.calls import Call, Turns
from qwen3vl_moe.errors import PromptError
from tests.engine.conftest import PROMPTS, check_leaks

TEXT = "Hello, how are you today?"
TEXTS = [TEXT, "One two three", PROMPTS["one image"], [5, 6, 7, 8], PROMPTS["three odd images"], "a"]


def params(number):
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": number},
        {"temperature": 0, "stop": ["e"]},
        {"temperature": 0.9, "seed": 3, "n": 2},
        {"temperature": 0, "logit_bias": {9: 2}, "min_tokens": 4},
        {"temperature": 0, "repetition_penalty": 1.2, "logprobs": 1},
    ]
    return SamplingParams(max_tokens=4 + number % 7, ignore_eos=True, **kinds[number % len(kinds)])


def call(llm, number):
    """One of the ways to ask; what was answered, as tokens and texts."""
    prompt = TEXTS[number // 2 % len(TEXTS)]
    if number % 3 == 0:
        (output,) = llm.generate([prompt], params(number))
    elif number % 3 == 1:
        *_, output = llm.stream(prompt, params(number))
    else:
        ((_, output),) = llm.as_completed([prompt], params(number))
    return [(completion.token_ids, completion.text) for completion in output.outputs]


@pytest.fixture(autouse=True)
def switch_often():
    """Threads change places a thousand times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 3}, {"block_size": 4, "num_blocks": 60}])
def test_every_call_gets_its_own_answer(plain, make_llm, options):
    llm = make_llm(plain, **options)
    alone = [call(llm, number) for number in range(36)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda number: call(llm, number), range(36))) == alone
    check_leaks(llm)


@pytest.mark.timeout(60)
def test_whether_there_is_room_may_be_asked_while_others_come_and_go(plain, make_llm):
    """A call asks before it has its turn: requests of others are queued and taken from the queue meanwhile."""
    llm = make_llm(plain)
    engine = llm.engine
    sequence = engine.request(llm.processor.prompt(TEXT), SamplingParams(max_tokens=4))
    ended = threading.Event()

    def come_and_go():
        while not ended.is_set():
            for _ in range(20):
                engine.scheduler.add(sequence)
            for _ in range(20):
                engine.scheduler.remove(sequence)

    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(come_and_go)
        try:
            for _ in range(20_000):
                assert isinstance(engine.has_room, bool)
        finally:
            ended.set()
        others.result()


@pytest.mark.timeout(60)
def test_what_is_left_open_holds_nobody_up(plain, make_llm):
    llm = make_llm(plain, max_num_seqs=2)
    left = [llm.stream(TEXT, params(0)), llm.as_completed([TEXT] * 5, params(0)), llm.stream(TEXT, params(0))]
    for each in left[:2]:
        next(each)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda number: call(llm, number), (0, 0)))
    assert answers[0] == answers[1]
    assert list(left[1]), "and it goes on where it was left"
    left[0].close()
    check_leaks(llm)


@pytest.mark.timeout(60)
def test_an_error_in_one_thread_is_nobody_elses(plain, make_llm):
    llm = make_llm(plain)
    alone = call(llm, 0)

    def either(number):
        if number % 2:
            return call(llm, 0)
        with pytest.raises(PromptError):
            llm.generate([TEXT, ""], params(0))
        return alone

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(either, range(12))) == [alone] * 12
    check_leaks(llm)


@pytest.mark.timeout(60)
def test_a_generator_closed_by_another_thread_gives_its_requests_up(llm):
    stream = llm.stream(TEXT, SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    check_leaks(llm)


@pytest.mark.timeout(60)
def test_turns_are_handed_round():
    """Whoever wants the lock again at once comes after those who waited."""
    turns, order, ready = Turns(), [], threading.Barrier(3)

    def steps():
        for _ in range(20):
            with turns.lock, turns.lock:  # the holder may take it again
                order.append(threading.current_thread().name)
                time.sleep(0.001)
            turns.let_others()
            yield

    def work():
        call = turns.joined_by(Call())
        body = call.runs(steps())
        ready.wait(30)
        for _ in body:
            pass

    threads = [threading.Thread(target=work, name=name) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(order) == 60
    assert max(order.index(name) for name in "abc") < 20, "one thread kept the lock for all of its turns"


@pytest.mark.timeout(60)
def test_calls_may_join_while_others_are_counted():
    turns, alive, stop = Turns(), collections.deque(maxlen=50), threading.Event()

    def join():
        while not stop.is_set():
            alive.append(turns.joined_by(Call()))

    def body():
        yield

    going = [(Call(), body()) for _ in range(2)]
    for call, generator in going:
        turns.joined_by(call).runs(generator)
    thread = threading.Thread(target=join)
    thread.start()
    try:
        for _ in range(300):
            turns.let_others()
    finally:
        stop.set()
        thread.join()


def others_go_on(llm, alone):
    with ThreadPoolExecutor(1) as other:
        assert other.submit(call, llm, 0).result(20) == alone


@pytest.mark.timeout(60)
@pytest.mark.parametrize("at", range(1, 31))
def test_an_interrupt_at_any_line_of_a_turn_leaves_it_to_other_threads(plain, make_llm, at):
    llm, lines = make_llm(plain), 0
    alone = call(llm, 0)

    def trace(frame, event, argument):
        return line if frame.f_code.co_filename == calls.__file__ else None

    def line(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        if event == "line" and lines == at:
            raise KeyboardInterrupt
        return line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            [call(llm, 0) for _ in range(50)]
    finally:
        sys.settrace(before)
    others_go_on(llm, alone)
    check_leaks(llm)


@pytest.mark.timeout(60)
def test_an_interrupt_leaves_the_lock_to_other_threads(plain, make_llm):
    """Ctrl-C, as a signal brings it, strikes the main thread only; others go on."""
    llm = make_llm(plain)
    alone, struck, rng = call(llm, 0), 0, random.Random(0)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.default_int_handler(signal.SIGINT, None))
    try:
        for _ in range(60):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.03))
            try:
                for number in range(50):
                    call(llm, number)
            except KeyboardInterrupt:
                struck += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            others_go_on(llm, alone)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert struck > 50
    check_leaks(llm)
