"""Sampling parameters: what is refused, and what a checkpoint fills in."""

import json

import pytest

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.params import GenerationDefaults
from qwen3vl_moe.errors import CheckpointError, OptionError


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("max_tokens", [0, -1, 1.5, True, "8"]),
        ("temperature", [-0.1, float("nan"), float("inf"), "hot", True]),
        ("top_p", [0, 1.01, -1, "x"]),
        ("top_k", [-2, 1.5, "x"]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, float("inf")]),
        ("presence_penalty", [2.1, -2.1]),
        ("frequency_penalty", [2.1, -2.1]),
        ("seed", [1.5, "x", -1, 2**63]),
        ("logprobs", [-1, 1.5]),
        ("prompt_logprobs", [-1, "all"]),
        ("stop", ["", [""], [1], 5, ["fine", None]]),
        ("stop_token_ids", [[-1], ["x"], 5, [1.5]]),
        ("ignore_eos", ["no", 1, None]),
    ],
)
def test_impossible_values_are_refused_by_name(name, bad):
    for value in bad:
        with pytest.raises(OptionError, match=rf"^{name}=.*needed"):
            SamplingParams(**{name: value})


def test_stop_takes_one_or_several():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "yy"], stop_token_ids=[1, 2]).stop == ("x", "yy")


def write(directory, **content):
    (directory / "generation_config.json").write_text(json.dumps(content))
    return GenerationDefaults.from_pretrained(directory)


def test_the_published_defaults(shared_dir):
    defaults = GenerationDefaults.from_pretrained(shared_dir / "checkpoint-30b")
    assert defaults.eos_token_ids == {151645, 151643}
    complete = defaults.complete(SamplingParams())
    assert (complete.temperature, complete.top_p, complete.top_k) == (0.7, 0.8, 20)
    assert (complete.repetition_penalty, complete.min_p, complete.max_tokens) == (1.0, 0.0, None)


def test_what_is_set_wins(tmp_path):
    defaults = write(tmp_path, do_sample=True, temperature=0.7, top_k=20, top_p=0.8, max_new_tokens=99, eos_token_id=5)
    complete = defaults.complete(SamplingParams(temperature=0, top_k=0, max_tokens=3, stop="x"))
    assert (complete.temperature, complete.top_k, complete.top_p) == (0, 0, 0.8)
    assert (complete.max_tokens, complete.stop) == (3, ("x",))
    assert defaults.complete(SamplingParams()).max_tokens == 99
    assert defaults.eos_token_ids == {5}


@pytest.mark.parametrize("content", [{}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.7}])
def test_greedy_unless_the_checkpoint_samples(tmp_path, content):
    assert write(tmp_path, **content).complete(SamplingParams()).greedy


def test_sampling_without_a_temperature_is_at_one(tmp_path):
    assert write(tmp_path, do_sample=True).complete(SamplingParams()).temperature == 1.0


def test_no_file(tmp_path):
    defaults = GenerationDefaults.from_pretrained(tmp_path, tokenizer_eos=7)
    assert defaults.eos_token_ids == {7}
    assert defaults.complete(SamplingParams()).greedy


def test_a_bad_end_of_text_token_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        write(tmp_path, eos_token_id="x")
