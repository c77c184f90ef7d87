"""Whatever goes wrong while a request is prepared is that request's error; what goes wrong in the engine is a bug."""

import pytest

from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.errors import PromptError

PROMPTS = ["one", "two", "three"]


@pytest.fixture
def llm(plain):
    return LLM(plain.path, device="cpu", progress=False)


@pytest.fixture(
    params=[TypeError("odd"), OverflowError("odd"), UnicodeError("odd"), MemoryError("odd"), KeyError("odd")]
)
def unforeseen(request, llm, monkeypatch):
    """An error that nobody foresaw, in preparing the second prompt."""
    prompt = llm.processor.prompt

    def fail(item, *args, **kwargs):
        if item == "two":
            raise request.param
        return prompt(item, *args, **kwargs)

    monkeypatch.setattr(llm.processor, "prompt", fail)
    return request.param


def test_an_unforeseen_error_is_that_of_its_request(llm, unforeseen):
    results = dict(llm.as_completed(PROMPTS, SamplingParams(max_tokens=2), return_exceptions=True))
    error = results.pop(1)
    assert isinstance(error, PromptError)
    assert str(error) == f"the request cannot be prepared: {type(unforeseen).__name__}: {unforeseen}"
    assert error.__cause__ is unforeseen, "a debugger sees where it comes from"
    assert [results[number].prompt for number in (0, 2)] == ["one", "three"]

    with pytest.raises(PromptError, match="prompt 1: the request cannot be prepared: ") as caught:
        llm.generate(PROMPTS, SamplingParams(max_tokens=2))
    assert caught.value.__cause__ is unforeseen
    with pytest.raises(PromptError, match="the request cannot be prepared: "):
        next(llm.stream("two"))


def test_a_bug_in_the_engine_is_no_error_of_a_request(llm, monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(llm.engine, "step", fail)
    with pytest.raises(TypeError, match="a bug"):
        dict(llm.as_completed(PROMPTS, SamplingParams(max_tokens=2), return_exceptions=True))
