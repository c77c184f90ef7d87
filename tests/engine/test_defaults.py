"""A checkpoint's generation_config.json: what it fills in, what it gets wrong, and what of it is not read."""

import json
import warnings

import pytest
from transformers import GenerationConfig

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.errors import CheckpointError, OptionError


def write(directory, **content):
    (directory / "generation_config.json").write_text(json.dumps(content))
    return GenerationDefaults.from_pretrained(directory, vocab_size=512)


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id is "),
        ({"eos_token_id": -1}, "eos_token_id is "),
        ({"eos_token_id": [3, True]}, "eos_token_id is "),
        ({"eos_token_id": 2.0}, "eos_token_id is "),
        ({"eos_token_id": {}}, "eos_token_id is "),
        ({"eos_token_id": [3, 512]}, "eos_token_id has 512, outside of the vocabulary"),
        ({"suppress_tokens": [512]}, "suppress_tokens has 512"),
        ({"suppress_tokens": [-1]}, "suppress_tokens is "),
        ({"do_sample": "false"}, "do_sample is 'false'; true or false"),
        ({"do_sample": 1}, "do_sample is 1"),
        ({"do_sample": "true", "temperature": 0.5}, "do_sample is 'true'"),
        ({"do_sample": True, "temperature": "0.5"}, "temperature='0.5'"),
        ({"do_sample": True, "temperature": -1}, "temperature=-1"),
        ({"top_p": 7}, "top_p=7"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": 1.5}, "min_new_tokens=1.5"),
        ({"min_new_tokens": 7, "max_new_tokens": 5}, "min_new_tokens=7 is more than max_new_tokens=5"),
        ({"stop_strings": [""]}, "stop_strings="),
    ],
)
def test_wrong_values_are_named(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        write(tmp_path, **content)


WITH_EFFECT = {
    "max_length": 100, "min_length": 5, "num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 3,
    "bad_words_ids": [[5]], "begin_suppress_tokens": [7], "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "typical_p": 0.9, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "sequence_bias": [[[5], 1.0]], "guidance_scale": 1.5,
    "penalty_alpha": 0.6, "dola_layers": "high", "encoder_repetition_penalty": 1.2, "length_penalty": 0.5,
    "exponential_decay_length_penalty": [3, 1.1], "watermarking_config": {"bias": 1}, "max_time": 3.0, "top_h": 0.4,
    "renormalize_logits": True, "stop_words": ["made up"],
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_EFFECT)
def test_what_is_not_read_and_would_change_answers_is_warned_of(tmp_path, name):
    with pytest.warns(UserWarning, match=f"generation_config.json: not read.*{name}=") as seen:
        write(tmp_path, **{name: WITH_EFFECT[name]})
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, **{name: None})


def test_one_warning_names_all(tmp_path):
    with pytest.warns(UserWarning, match=r"num_beams=4.*typical_p=0\.5") as seen:
        write(tmp_path, num_beams=4, typical_p=0.5)
    assert len(seen) == 1


def test_transformers_own_defaults_are_silent(tmp_path, shared_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, **GenerationConfig().to_dict())
        GenerationDefaults.from_pretrained(shared_dir / "checkpoint-30b")
        GenerationConfig(eos_token_id=3, do_sample=True, top_k=5).save_pretrained(tmp_path)
        assert GenerationDefaults.from_pretrained(tmp_path).params.top_k == 5


def test_lengths_stops_and_suppressed_tokens_are_read(tmp_path):
    defaults = write(tmp_path, min_new_tokens=3, max_new_tokens=9, stop_strings=["x"], suppress_tokens=[4, 5])
    complete = defaults.complete(SamplingParams())
    assert (complete.min_tokens, complete.max_tokens, complete.stop) == (3, 9, ("x",))
    assert defaults.suppressed == (4, 5)
    own = defaults.complete(SamplingParams(min_tokens=0, stop="y"))
    assert (own.min_tokens, own.stop) == (0, ("y",))
    assert defaults.complete(SamplingParams(detokenize=False)).stop == ()


def test_several_greedy_answers_are_refused():
    """Only now is it known whether the checkpoint samples."""
    with pytest.raises(OptionError, match="n=2: greedy answers are all the same"):
        GenerationDefaults().complete(SamplingParams(n=2))
    sampling = GenerationDefaults(params=SamplingParams(temperature=0.7))
    assert sampling.complete(SamplingParams(n=2)).n == 2
    with pytest.raises(OptionError, match="n=2"):
        sampling.complete(SamplingParams(n=2, temperature=0))
