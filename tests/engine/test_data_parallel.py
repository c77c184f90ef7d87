"""Several engines, in processes of their own, behind one LLM: answers in the same form, from wherever they come."""

import contextlib
import itertools
import os
import pickle
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from qwen3vl_moe.engine import LLM, SamplingParams, dealer, replica
from qwen3vl_moe.engine.dealer import beginning
from qwen3vl_moe.engine.replicas import Replicas, room_of, start_replicas
from qwen3vl_moe.engine.service import Service
from qwen3vl_moe.errors import OptionError, PromptError, RankError
from tests.engine.conftest import PROMPTS, check_leaks
from tests.engine.test_tensor_parallel import answers_to_all_kinds, children, greedy, ids

OPTIONS = {"device": "cpu", "dtype": "float32", "progress": False, "max_model_len": 192, "max_num_seqs": 4}
MIX = [f"Hello {number}, how are you?" for number in range(24)] + list(PROMPTS.values()) * 2


@pytest.fixture(scope="module")
def tiny(make_tiny):
    return make_tiny("wide")


@pytest.fixture(scope="module")
def alone(tiny):
    return LLM(tiny.published, **OPTIONS, num_blocks=64)


@pytest.fixture(scope="module")
def three(tiny):
    llm = LLM(tiny.published, **OPTIONS, num_blocks=64, data_parallel_size=3)
    yield llm
    llm.close()


def shares(llm):
    """How many requests each of the other engines has answered so far, as far as its cache tells."""
    return [stats.get("prefix_cache_queries", 0) for stats in llm._replicas._state.stats[1:]]


def test_answers_are_those_of_one_in_their_order(alone, three):
    before = shares(three)
    params = [greedy(max_tokens=5 + number % 40, logprobs=1) for number in range(len(MIX))]
    assert ids(three.generate(MIX, params)) == ids(alone.generate(MIX, params))
    assert all(now > then for now, then in zip(shares(three), before, strict=True)), "all engines have answered some"
    check_leaks(three)
    assert three.settings["data_parallel_size"] == 3


def test_chats_with_what_belongs_to_them(alone, three):
    chats = [[{"role": "user", "content": f"{number} cats"}] for number in range(12)]
    more = {"add_generation_prompt": False}
    outputs = three.chat(chats, greedy(max_tokens=6), **more)
    assert ids(outputs) == ids(alone.chat(chats, greedy(max_tokens=6), **more))
    assert [output.prompt for output in outputs] == [o.prompt for o in alone.chat(chats, greedy(max_tokens=6), **more)]


def test_bad_requests_are_errors_of_their_own(three):
    items = list(MIX)
    items[::4] = [[1, 2, 10**6]] * len(items[::4])
    results = dict(three.as_completed(items, greedy(max_tokens=3), return_exceptions=True))
    assert sorted(results) == list(range(len(items)))
    for number, result in results.items():
        assert isinstance(result, PromptError) == (number % 4 == 0)
    with pytest.raises(PromptError, match=r"prompt \d+: "):
        three.generate(items, greedy(max_tokens=3))
    assert ids(three.generate(MIX[:8], greedy(max_tokens=3)))


def test_a_request_that_no_other_process_can_have_is_answered_here(alone, three):
    class Picture(Image.Image):
        """Known to this process alone."""

        __reduce_ex__ = None

    plain = Image.new("RGB", (40, 30), "red")
    own = Picture()
    own.__dict__.update(plain.__dict__)
    items = [{"prompt": "<|vision_start|><|image_pad|><|vision_end|>", "multi_modal_data": {"image": own}}] * 6
    assert ids(three.generate(items, greedy(max_tokens=4))) == ids(alone.generate(items, greedy(max_tokens=4)))


def test_a_call_that_is_left_frees_all_engines(three):
    left = three.as_completed(MIX, greedy(max_tokens=150))
    next(left)
    left.close()
    assert not three._replicas._state.going
    assert three._replicas._state.load == [0, 0, 0]
    check_leaks(three)


def until(true):
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def served(plain, make_llm):
    """An engine that answers what comes through a pipe, as in a process of its own, and the other end of the pipe."""
    llm, ends = make_llm(plain), socket.socketpair()
    ours, theirs = (Connection(end.detach()) for end in ends)

    def serve():
        with contextlib.suppress(EOFError):
            replica.serve(llm, theirs)

    thread = threading.Thread(target=serve)
    thread.start()
    yield llm, ours
    ours.close()
    thread.join(60)
    assert not thread.is_alive()


def test_what_is_given_up_is_gone_in_the_other_process(served):
    llm, pipe = served
    params = SamplingParams(max_tokens=4000, ignore_eos=True)
    for number in range(3):
        pipe.send(("add", (7, number), pickle.dumps(("prompt", {}, "Hello", params))))
    scheduler = llm.engine.scheduler
    until(lambda: len(scheduler.running) == 3)
    pipe.send(("drop", [(7, 0), (7, 2), (7, 5)]))
    until(lambda: len(scheduler.running) == 1)
    pipe.send(("drop", [(7, 1)]))
    until(lambda: not scheduler.running)
    bad = pickle.dumps(("prompt", {}, [10**6], params))
    pipe.send(("add", (8, 0), bad))
    kind, key, error, _ = pipe.recv()
    assert (kind, key, type(error)) == ("done", (8, 0), PromptError)
    pipe.send(("add", (8, 1), b"no pickle"))
    assert "cannot be read by another process" in str(pipe.recv()[2])
    check_leaks(llm)


def test_calls_of_one_request_each_go_to_all_engines(alone, three):
    before = shares(three)
    with ThreadPoolExecutor(12) as pool:
        outputs = list(pool.map(lambda prompt: three.generate(prompt, greedy(max_tokens=30))[0], MIX[:24]))
    assert ids(outputs) == ids(alone.generate(MIX[:24], greedy(max_tokens=30)))
    assert all(now > then for now, then in zip(shares(three), before, strict=True))


def test_few_requests_are_prepared_ahead(three, monkeypatch):
    """However many an engine has: pixels take far more memory than files."""
    begun, service = [], three.service
    monkeypatch.setattr(service, "prepared", lambda prepare, pair: begun.append(pair))
    dealt = dealer._Dealer(three._replicas, service, lambda *_: None, ("prompt", {}), [])
    for number in range(50):
        dealt.add(number, ("Hello", None))
    until(lambda: len(begun) == service.ahead + 1)
    dealt.take(may_wait=False)[1]()
    dealt.take(may_wait=False)
    until(lambda: len(begun) == service.ahead + 2)
    dealt.close()
    assert len(dealt) == 0


def interrupted(call):
    next(call)
    os.kill(os.getpid(), signal.SIGINT)
    for _ in call:
        pass


def test_an_interrupt_ends_the_call_alone(alone, three):
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            interrupted(three.as_completed(MIX, greedy()))
    assert ids(three.generate(MIX, greedy())) == ids(alone.generate(MIX, greedy()))
    assert len(children()) == 2


def test_draws_without_a_seed_differ_between_engines(three):
    same = three.generate(["Hello"] * 12, SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True))
    assert len(set(map(str, ids(same)))) == 12


def test_functions_are_called_once_each(alone, three):
    called = []

    def request(number):
        def make():
            called.append(number)
            return MIX[number] if number % 5 else [][0]

        return make

    results = dict(three.as_completed([request(n) for n in range(20)], greedy(max_tokens=4), return_exceptions=True))
    assert sorted(called) == sorted(results) == list(range(20))
    expected = ids(alone.generate(MIX[:20], greedy(max_tokens=4)))
    for number, result in results.items():
        if number % 5:
            assert ids([result])[0] == expected[number]
        else:
            assert isinstance(result, PromptError)


def test_videos_grammars_and_all_else_that_goes_with_a_request(alone, three):
    assert answers_to_all_kinds(three) == answers_to_all_kinds(alone)


def test_an_engine_that_is_killed_is_named_at_once_and_ever_after(three):
    """The last test of these three."""
    call = three.as_completed(MIX, greedy(max_tokens=150))
    next(call)
    os.kill(children()[0], signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"replica \d was killed \(SIGKILL\)"):
        list(call)
    assert time.monotonic() - begun < 10
    with pytest.raises(RankError, match="this LLM cannot go on, load it again"):
        three.generate(MIX, greedy())
    three.close()
    assert children() == []


def test_two_engines_of_two_ranks(alone, tiny):
    llm = LLM(tiny.published, **OPTIONS, num_blocks=64, data_parallel_size=2, tensor_parallel_size=2)
    assert ids(llm.generate(MIX, greedy(max_tokens=8))) == ids(alone.generate(MIX, greedy(max_tokens=8)))
    left = llm.as_completed(MIX, greedy(max_tokens=100))
    next(left)
    llm.close()
    llm.close()
    assert children() == []
    for call in (lambda: list(left), lambda: llm.generate(MIX, greedy()), lambda: llm.generate("Hello", greedy())):
        with pytest.raises(RankError, match="this LLM was closed: load it again"):
            call()


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_engines(tiny, size):
    with pytest.raises(OptionError, match="data_parallel_size"):
        LLM(tiny.published, **OPTIONS, data_parallel_size=size)


def test_too_few_gpus_and_torchrun_are_refused(monkeypatch):
    asked = {"data_parallel_size": 2, "tensor_parallel_size": 2, "device": torch.device("cuda", 1)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(OptionError, match="needs 4 GPUs from cuda:1 on, but there are 4 in all"):
        start_replicas("nothing:nothing", asked)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(OptionError, match="without torchrun"):
        start_replicas("nothing:nothing", asked)


def test_an_error_while_another_loads_is_told_here(tmp_path):
    with pytest.raises(RankError, match=r"replica 1 ended: .*nothing is neither a directory nor a hub id"):
        Replicas("qwen3vl_moe.engine.llm:LLM", [{"model": str(tmp_path / "nothing")}]).wait()
    assert children() == []


def test_requests_that_begin_alike_go_to_one_engine_unless_it_has_much_more():
    replicas = Replicas("", [])
    replicas.size, replicas._state.load, replicas._state.room = 3, [0, 0, 0], [0, 40, 40]

    def choose(text, own=0):
        free = replicas.free(own, 40)
        return replicas.choose(beginning(text), free, own, 40) if free else None

    system = "x" * 300
    assert choose(system + "a", own=5) == 1
    replicas._state.load[1] = 2
    assert choose(system + "b", own=5) == 1, "2 of 40 more are hardly more"
    replicas._state.load[1] = 3
    assert choose(system + "c", own=5) == 2
    assert choose("short", own=40) in (1, 2)
    replicas._state.load[1:] = [40, 40]
    assert choose(system, own=39) == 0
    assert choose(system, own=40) is None


def test_the_beginning_of_a_request():
    picture = Image.new("RGB", (4, 4))

    def chat(image, text):
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]

    same = beginning(chat("a.png", "What?")), beginning(chat("a.png", "Where?"))
    assert same[0] == same[1] != beginning(chat("b.png", "What?"))
    assert beginning(chat(picture, "What?")) == beginning(chat(picture, "Where?"))
    texts = ["What?", "Where?", "x" * 300, [1, 2, 3], [1, 2, 4], {"prompt": "Who?"}]
    assert all(beginning(one) != beginning(other) for one, other in itertools.combinations(texts, 2))
    assert beginning(list(range(100))) == beginning([*range(99), 5])
    assert beginning({}) == ""


@pytest.mark.parametrize(("seats", "room"), [(1, 2), (100, 200), (512, 640)])
def test_room_is_for_steps_and_what_is_prepared_ahead(seats, room):
    engine = SimpleNamespace(scheduler=SimpleNamespace(max_num_seqs=seats))
    assert room_of(Service(engine)) == room
