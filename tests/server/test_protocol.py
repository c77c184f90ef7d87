"""Bodies alone, without a server: whoever reads files of them uses the same code."""

import json

import pytest

from qwen3vl_moe.server.protocol import RequestError, parse_chat, parse_completion
from tests.server.conftest import HELLO
from tests.test_layout import python


def test_it_needs_no_web_framework():
    code = (
        "import sys, qwen3vl_moe.server.protocol\n"
        "print([name for name in ('fastapi', 'starlette', 'uvicorn', 'prometheus_client') if name in sys.modules])"
    )
    assert python(code) == "[]"


def test_all_fields_reach_the_sampling_parameters():
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": 3,
        "stop": ["a", "b"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": 1.5},
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "stop_token_ids": [9],
        "allowed_token_ids": [5, 9],
        "bad_words": ["x"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "truncate_prompt_tokens": 100,
        "max_tokens": 50,
    }
    for params in (
        parse_chat({"messages": HELLO, **given}).params,
        parse_completion({"prompt": "x", **given}).params,
    ):
        for name, value in given.items():
            expected = {"stop": ("a", "b"), "logit_bias": {5: 1.5}}.get(name, value)
            found = getattr(params, name)
            assert (list(found) if isinstance(value, list) and name != "stop" else found) == expected


def test_null_is_not_given():
    nothing = dict.fromkeys(["temperature", "stop", "tools", "nonsense", "audio", "stream", "response_format"])
    assert parse_chat({"messages": HELLO, **nothing}) == parse_chat({"messages": HELLO})


def test_the_two_limits_of_length_are_one():
    assert parse_chat({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 5}).params.max_tokens == 5
    with pytest.raises(RequestError, match="two names of one limit"):
        parse_chat({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6})
    assert parse_chat({"messages": HELLO}).params.max_tokens is None
    assert parse_completion({"prompt": "x"}).params.max_tokens == 16  # as OpenAI has it


def test_developers_are_the_system():
    messages = [{"role": "developer", "content": "Be short."}, *HELLO]
    assert [message["role"] for message in parse_chat({"messages": messages}).messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_forms_of_prompts(prompt, expected):
    assert parse_completion({"prompt": prompt}).prompts == expected


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], [1.5], [True], {"a": 1}, ["a", 5]])
def test_no_prompts(prompt):
    with pytest.raises(RequestError, match="prompt") as caught:
        parse_completion({"prompt": prompt})
    assert caught.value.param == "prompt"
    assert json.loads(json.dumps(caught.value.body))["error"]["type"] == "invalid_request_error"
