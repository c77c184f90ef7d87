"""Prompts on their way in: made ahead, taken in order, and none held up by one that waits for a server."""

import threading
import time
from contextlib import closing

import pytest

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.intake import Intake, needs_server
from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.workers import POOL, side_by_side
from tests.engine.conftest import check_leaks

TEXT = "Hello, how are you today?"
URL = "http://example.org/cat.png"


def with_image(source):
    return [
        {"role": "user", "content": [{"type": "image", "image": source}, {"type": "text", "text": "What is this?"}]}
    ]


REMOTE = {"prompt": "late", "multi_modal_data": {"image": URL}}


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (with_image(URL), True),
        (with_image("HTTPS://example.org/cat.png"), True),
        (with_image(" https://example.org/cat.png\n"), True),
        (with_image("cat.png"), False),
        (with_image("data:image/png;base64,http"), False),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}], True),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": URL}]}], True),
        ([{"role": "user", "content": URL}], False),
        ([{"role": "user", "content": [{"type": "text", "text": URL}]}], False),
        (REMOTE, True),
        ({"prompt": URL, "multi_modal_data": {"image": ["a.png", URL]}}, True),
        ({"prompt": URL}, False),
        (URL, False),
        ([5, 6, 7], False),
        (None, False),
    ],
)
def test_the_request_alone_tells_whether_it_needs_a_server(item, expected):
    assert needs_server(item) is expected


def taken(intake):
    numbers = []
    while intake.left:
        number, get = intake.take(may_wait=True)
        get()
        numbers.append(number)
    return numbers


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_what_needs_no_server_comes_in_order(ahead):
    """However long each takes."""
    with closing(Intake(lambda number: time.sleep(0.001 * (number % 3)), list(range(20)), ahead)) as intake:
        assert taken(intake) == list(range(20))


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_work_runs_ahead_and_not_too_far():
    begun = []
    with closing(Intake(begun.append, list(range(50)), ahead=5)) as intake:
        for number in range(10):
            intake.take(may_wait=True)
            wait_for(lambda: len(begun) == number + 6)  # this one and five ahead  # noqa: B023
            time.sleep(0.002)
            assert len(begun) == number + 6
    assert intake.left == 40


def test_closing_drops_what_has_not_begun():
    begun, ended, go_on = [], [], threading.Event()

    def work(n):
        begun.append(n)
        assert go_on.wait(10)
        ended.append(n)

    intake = Intake(work, list(range(100)), ahead=60)
    intake.take(may_wait=True)
    wait_for(lambda: begun)
    intake.close()
    go_on.set()
    side_by_side(lambda _: None, range(2))  # what was left in the queue would stand before these
    wait_for(lambda: len(ended) == len(begun))
    assert len(begun) <= POOL.size  # those that a thread had taken up


def test_an_error_is_that_of_its_item():
    with closing(Intake(lambda number: 1 // number, [2, 0, 1], ahead=3)) as intake:
        gets = [intake.take(may_wait=True)[1] for _ in range(3)]
    assert (gets[0](), gets[2]()) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        gets[1]()


def test_a_single_item_takes_no_thread():
    with closing(Intake(lambda _: threading.current_thread(), ["x"], ahead=4)) as intake:
        number, get = intake.take(may_wait=False)
    assert (number, get(), intake.left) == (0, threading.current_thread(), 0)


# With an engine


@pytest.fixture
def late(llm, monkeypatch):
    """Prompts with a URL are ready once this event is set; until then they wait for their server."""
    arrived, prompt = threading.Event(), llm.processor.prompt

    def slow(item, **options):
        if needs_server(item):
            assert arrived.wait(60)
            item = item["prompt"]
        return prompt(item, **options)

    monkeypatch.setattr(llm.processor, "prompt", slow)
    yield arrived
    arrived.set()


def params(length):
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_others_run_while_one_is_late(llm, late, place):
    items = [TEXT] * 3
    items.insert(place, REMOTE)
    results = llm.as_completed(items, params(5))
    early = [next(results) for _ in range(3)]  # would wait for ever if the late one held them up
    assert sorted(number for number, _ in early) == [number for number in range(4) if number != place]
    late.set()
    ((number, output),) = results
    assert number == place
    assert output.outputs[0].token_ids == llm.generate("late", params(5))[0].outputs[0].token_ids
    check_leaks(llm)


@pytest.mark.timeout(60)
def test_many_late_ones_hold_up_nobody_behind_them(plain, make_llm, monkeypatch):
    """More than there are threads for work."""
    llm = make_llm(plain, max_num_seqs=64)
    arrived, prompt = threading.Event(), llm.processor.prompt

    def slow(item, **options):
        if needs_server(item):
            with POOL.waiting():
                assert arrived.wait(60)
            item = item["prompt"]
        return prompt(item, **options)

    monkeypatch.setattr(llm.processor, "prompt", slow)
    results = llm.as_completed([REMOTE] * 40 + [TEXT] * 3, params(3))
    try:
        assert sorted(next(results)[0] for _ in range(3)) == [40, 41, 42]
    finally:
        arrived.set()
    assert sorted(number for number, _ in results) == list(range(40))
    check_leaks(llm)


@pytest.mark.timeout(60)
def test_ctrl_c_while_all_wait_for_a_server(llm, late, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3vl_moe.engine.intake.wait", interrupted)
    results = llm.as_completed([TEXT, REMOTE, REMOTE], params(4))
    assert next(results)[0] == 0
    with pytest.raises(KeyboardInterrupt):
        next(results)
    check_leaks(llm)
    assert llm.generate(TEXT, params(4))[0].finished


@pytest.mark.timeout(60)
def test_a_late_error_is_named(llm, late, monkeypatch):
    def refuse(item, **options):
        raise PromptError("no such host")

    monkeypatch.setattr(llm.processor, "prompt", refuse)
    results = dict(llm.as_completed([REMOTE, REMOTE], params(4), return_exceptions=True))
    assert all(str(error) == "no such host" for error in results.values())
    with pytest.raises(PromptError, match=r"request \d: no such host"):
        list(llm.as_completed([REMOTE, REMOTE], params(4)))
