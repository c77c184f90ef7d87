"""Ctrl-C at any line: nothing of the call stays, no block leaks, and the engine's next answers are right."""

import random
import sys
from pathlib import Path

import pytest

import qwen3vl_moe
from qwen3vl_moe.engine import SamplingParams
from tests.engine.conftest import PROMPTS, check_leaks

OURS = str(Path(qwen3vl_moe.__file__).parent / "engine")
TEXT = "Hello, how are you today?"
LONG = [list(range(5, 200))]  # nearly the whole cache: a leaked block would show
PROMPT_MIX = [TEXT, PROMPTS["one image"], TEXT, [7, 8, 9], TEXT, PROMPTS["text"]]


def params(**more):
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True} | more)


MIX = [params(), params(max_tokens=12), params(n=2, temperature=1.0, seed=3), params(stop="e"), params(logprobs=1),
       params(bad_words=["a"], max_tokens=5)]  # fmt: skip
STEPS = 5


def generate(llm):
    llm.generate(PROMPT_MIX, MIX)


def as_completed(llm):
    for _ in llm.as_completed(PROMPT_MIX, MIX, return_exceptions=True):
        pass


def stream(llm):
    for _ in llm.stream(PROMPTS["one image"], params(max_tokens=20)):
        pass


def half_read(llm):
    """Left behind in the middle, as by a `break` with the generator still known."""
    kept = llm.stream(TEXT, params(max_tokens=20))
    next(kept)
    half = llm.as_completed(PROMPT_MIX, MIX)
    next(half)
    kept.close()
    half.close()


CALLS = [generate, as_completed, stream, half_read]


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that is begun within the engine's files in this thread."""

    def __init__(self, at=None):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        return self.line

    def line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.line

    def run(self, call, llm):
        """Whether it struck; a second interrupt right after the first is part of the kind: see ``twice``."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call(llm)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


class Impatient(Interrupter):
    """Strikes again some lines later, while the first interrupt is being tidied up."""

    def line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines in (self.at, self.at + 9):
                raise KeyboardInterrupt
        return self.line


@pytest.fixture
def tight(plain, make_llm):
    return make_llm(plain, block_size=4, num_blocks=56, max_num_seqs=4, max_prefill_tokens=32)


def count_lines(llm, call):
    counter = Interrupter()
    counter.run(call, llm)
    return counter.lines


def strike(llm, call, at, kind=Interrupter):
    """Interrupt one call; the next one has to run as if nothing had been."""
    if not kind(at).run(call, llm):
        return False
    (after,) = llm.generate(LONG, params(max_tokens=4))
    assert after.outputs[0].token_ids == strike.expected
    check_leaks(llm)
    return True


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [Interrupter, Impatient])
@pytest.mark.parametrize("call", CALLS)
def test_the_next_call_is_right(tight, call, kind):
    strike.expected = tight.generate(LONG, params(max_tokens=4))[0].outputs[0].token_ids
    lines = count_lines(tight, call)
    rng = random.Random(f"{call.__name__} {kind.__name__}")
    struck = sum(strike(tight, call, rng.randint(1, lines), kind) for _ in range(STEPS))
    assert struck >= 0.6 * STEPS, "the call takes about as many lines each time"
