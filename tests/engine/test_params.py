"""Sampling parameters: what is refused, and what vLLM's users find as they know it."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.params import check_vocabulary
from qwen3vl_moe.errors import OptionError


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no")


def nested(depth):
    return [nested(depth - 1)] if depth else []


ODD = [Unspeakable(), nested(500)]
NO_NUMBERS = [
    *ODD,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    -(10**400),
    10**5000,
    "1",
    True,
    [1],
    {},
    1j,
]
NO_COUNTS = [*NO_NUMBERS, 1.5, 2**63, 2**64, np.float64(2.0)]


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("n", [0, -1, None, 1025, *NO_COUNTS]),
        ("max_tokens", [0, -1, *NO_COUNTS]),
        ("min_tokens", [-1, *NO_COUNTS]),
        ("temperature", [-0.1, 1001, *NO_NUMBERS]),
        ("top_p", [0, 1.01, -1, np.float32(0), *NO_NUMBERS[:-4]]),
        ("top_k", [-2, *NO_COUNTS]),
        ("min_p", [-0.1, 1.1, "x"]),
        ("repetition_penalty", [0, -1, 1e-300, 1e300, *NO_NUMBERS[:-4]]),
        ("presence_penalty", [2.1, -2.1, None, "x"]),
        ("frequency_penalty", [2.1, -2.1, None, True]),
        ("seed", [-2, *NO_COUNTS]),
        ("logprobs", [-2, "all", 1.5, 2**64]),
        ("prompt_logprobs", [-2, "all", 1.5, 2**64]),
        ("truncate_prompt_tokens", [0, -2, *NO_COUNTS]),
        (
            "stop",
            [
                "",
                [""],
                [1],
                5,
                ["fine", None],
                {"a": 1},
                "\ud800",
                ["x"] * 1001,
                0,
                False,
                {},
                np.array(["a", "b"]),
                nested(500),
            ],
        ),
        ("stop", [0, False, {}, np.array(["a", "b"])]),
        ("bad_words", ["one", [""], [1], 5, ["fine", None]]),
        ("stop_token_ids", [[-1], ["x"], 5, [1.5], [True], [2**64], "12", {1: 2}]),
        ("stop_token_ids", [{}, 0, False, "", torch.tensor(1), *ODD]),
        ("allowed_token_ids", [[-1], ["x"], 5, [1.5], [True], [2**64], []]),
        ("logit_bias", [5, [1], {"x": 1}, {-1: 1}, {1.5: 1}, {1: "x"}, {1: 101}, {1: float("nan")}, {1: None}]),
        ("ignore_eos", ["no", 1, None]),
        ("detokenize", ["no", 0, None]),
        ("include_stop_str_in_output", ["no", 1, None]),
        ("skip_special_tokens", ["no", 1, None]),
        ("spaces_between_special_tokens", ["no", 1, None]),
    ],
)
def test_impossible_values_are_refused_by_name(name, bad):
    for value in bad:
        with pytest.raises(OptionError, match=rf"^{name}.*(needed|at most|half of)") as caught:
            SamplingParams(**{name: value})
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5 is more than max_tokens=4"),
        ({"stop": "x", "detokenize": False}, "stop needs the text"),
        ({"best_of": 2}, "best_of is not supported: "),
        ({"use_beam_search": True}, "use_beam_search is not supported"),
        ({"guided_decoding": {}}, "guided_decoding is not supported"),
        ({"structured_outputs": {}}, "a dict with one of json, json_object, regex, choice, grammar is needed"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "a dict with one of json"),
        ({"structured_outputs": {"json": ["object"]}}, "json=.*: a JSON schema, as a dict or a text, is needed"),
        ({"structured_outputs": {"choice": []}}, "a list of texts is needed"),
        ({"structured_outputs": {"json": {"a": {1, 2}}}}, "cannot be written as JSON"),
        ({"structured_outputs": {"json_object": True}, "ignore_eos": True}, "drop one"),
        ({"logits_processors": []}, "logits_processors is not supported"),
        ({"max_new_tokens": 5}, "max_new_tokens is not supported: it is called max_tokens"),
        ({"tempreature": 1}, "unknown sampling parameter 'tempreature'; there are n, max_tokens, .*temperature"),
        ({"stop_strs": None}, "unknown sampling parameter 'stop_strs'"),
    ],
)
def test_what_does_not_fit_together_and_what_is_not_there(given, message):
    with pytest.raises(OptionError, match=message):
        SamplingParams(**given)


def test_what_is_not_built_may_be_none():
    assert SamplingParams(best_of=None, beam_width=None, n=1) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "given", "meant"),
    [
        ("top_k", -1, -1),
        ("seed", -1, None),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("logprobs", -1, -1),
        ("logprobs", True, 1),
        ("prompt_logprobs", False, None),
        ("max_tokens", np.int32(7), 7),
        ("n", np.uint8(3), 3),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", 1, 1.0),
        ("stop", "x", ("x",)),
        ("stop", ["x", "yy"], ("x", "yy")),
        ("stop_token_ids", np.array([1, 2]), (1, 2)),
        ("stop_token_ids", {7}, (7,)),
        ("allowed_token_ids", [3, np.int64(4)], (3, 4)),
        ("bad_words", ["a b"], ("a b",)),
        ("logit_bias", {"12": 3, 4: np.float64(-1)}, {12: 3.0, 4: -1.0}),  # JSON has texts for keys
    ],
)
def test_values_that_mean_something_else_than_they_are(name, given, meant):
    value = getattr(SamplingParams(**{name: given}), name)
    assert value == meant
    assert type(value) is type(meant)


def test_names_are_seen_and_copies_are_equal():
    params = SamplingParams(n=2, temperature=0.7, stop=["x"], logit_bias={1: 2})
    assert params.clone() == params
    assert dataclasses.replace(params, n=3).temperature == 0.7
    assert "max_tokens" in inspect.signature(SamplingParams).parameters
    assert "n=2" in repr(params)


@pytest.mark.parametrize(
    "given", [{"stop_token_ids": [512]}, {"allowed_token_ids": [3, 512]}, {"logit_bias": {10**6: 1}}, {"logprobs": 513}]
)
def test_the_vocabulary_bounds_tokens_and_counts(given):
    with pytest.raises(OptionError, match=f"{next(iter(given))}.*vocabulary"):
        check_vocabulary(SamplingParams(**given), 512)
    check_vocabulary(SamplingParams(**given), 10**6 + 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bad_words": ["x" * 700] * 100}, "bad_words has 70000 characters; at most 65536"),
        ({"stop": "x" * 70_000}, "stop has 70000 characters"),
        ({"stop_token_ids": [7] * (1 << 21)}, "stop_token_ids has 2097152 token ids; at most 1048576"),
        ({"allowed_token_ids": range(1 << 21)}, "allowed_token_ids has 2097152 token ids"),
    ],
)
def test_lists_have_an_end(values, said):
    """The engine goes through them while all other requests wait."""
    with pytest.raises(OptionError, match=said):
        SamplingParams(**values)


def test_a_token_id_counts_once():
    params = SamplingParams(stop_token_ids=[5, 3, 5] * 1000, allowed_token_ids=[2] * 100_000)
    assert params.stop_token_ids == (5, 3)
    assert params.allowed_token_ids == (2,)
