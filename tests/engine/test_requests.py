"""Requests from the outside: how answers end, seeds, log-probabilities, streams, refusals, interruptions."""

from dataclasses import replace

import pytest
import torch

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.engine.outputs import STAGES
from qwen3vl_moe.errors import CheckpointError, OptionError, PromptError
from qwen3vl_moe.weights.placement import settle_threads
from tests.engine.conftest import PROMPTS, check_leaks, mixed_prompt

TEXT = "Hello, how are you today?"


def answer(llm, prompt=TEXT, **params):
    (output,) = llm.generate(
        prompt, SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True} | params)
    )
    return output.outputs[0]


# How answers end


def test_max_tokens(llm):
    whole = answer(llm)
    assert (len(whole.token_ids), whole.finish_reason, whole.stop_reason) == (24, "length", None)
    assert answer(llm, max_tokens=1).token_ids == whole.token_ids[:1]


def test_max_model_len_ends_an_answer(plain, make_llm):
    llm = make_llm(plain, max_model_len=20)
    (output,) = llm.generate(TEXT, SamplingParams(temperature=0, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 20
    assert output.outputs[0].finish_reason == "length"
    check_leaks(llm)


def test_stop_token_ids(llm):
    whole = answer(llm)
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    stopped = answer(llm, stop_token_ids=[token])
    assert stopped.token_ids == whole.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert stopped.text == llm.processor.tokenizer.decode(whole.token_ids[:first], skip_special_tokens=True)


def test_end_of_text_and_ignore_eos(llm):
    """Whatever token the model gives fourth is declared to be the end of text."""
    whole = answer(llm)
    token = whole.token_ids[3]
    first = whole.token_ids.index(token)
    llm.engine.defaults = GenerationDefaults(frozenset({token}))
    ended = answer(llm, ignore_eos=False)
    assert ended.token_ids == whole.token_ids[: first + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert answer(llm, ignore_eos=True).token_ids == whole.token_ids


def test_stop_string_across_tokens(llm):
    whole = answer(llm)
    text = whole.text
    middle = len(text) // 2
    stop = text[middle - 2 : middle + 2]
    stopped = answer(llm, stop=["never there", stop])
    assert stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert stop in llm.processor.tokenizer.decode(stopped.token_ids, skip_special_tokens=True)


# Randomness


def test_seed_gives_the_same_tokens_in_any_batch(plain, make_llm):
    seeded = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, seed=7)
    free = SamplingParams(temperature=1.3, top_k=30, max_tokens=24, ignore_eos=True)
    alone = make_llm(plain).generate(TEXT, seeded)[0].outputs[0].token_ids
    llm = make_llm(plain, max_prefill_tokens=4, seed=99)
    among = llm.generate([PROMPTS["one image"], TEXT, TEXT], [free, seeded, free])
    assert among[1].outputs[0].token_ids == alone
    assert among[2].outputs[0].token_ids != alone
    other = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, seed=8)
    assert llm.generate(TEXT, other)[0].outputs[0].token_ids != alone


def test_seed_survives_preemption(plain, make_llm):
    params = [SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, seed=seed) for seed in range(4)]
    roomy = make_llm(plain).generate([TEXT] * 4, params)
    tight_llm = make_llm(plain, block_size=4, num_blocks=16)
    tight = tight_llm.generate([TEXT] * 4, params)
    assert sum(output.metrics.num_preemptions for output in tight) > 0
    assert [o.outputs[0].token_ids for o in tight] == [o.outputs[0].token_ids for o in roomy]
    check_leaks(tight_llm)


def test_the_engines_seed_makes_a_whole_run_repeatable(plain, make_llm):
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    first, second, other = (
        [o.outputs[0].token_ids for o in make_llm(plain, seed=seed).generate([TEXT, TEXT], params)]
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first[0] != first[1], "two requests without seed are independent"
    assert first != other


# Log-probabilities


@pytest.mark.parametrize("chunk", [3, 8192])
@pytest.mark.parametrize("case", ["text", "three odd images"])
def test_logprobs_are_those_of_the_raw_model(plain, make_llm, case, chunk):
    """Against log_softmax of the model's own logits, though penalties and temperature choose the tokens."""
    llm = make_llm(plain, max_prefill_tokens=chunk)
    prompt = llm.processor.prompt(PROMPTS[case])
    params = SamplingParams(
        temperature=1.5, top_k=40, seed=3, repetition_penalty=1.3, max_tokens=8, ignore_eos=True, logprobs=3,
        prompt_logprobs=2,
    )  # fmt: skip
    sequence = llm.engine.request(prompt, params)
    llm.engine.add(sequence)
    while not sequence.finished:
        llm.engine.step()
    output = sequence.output()
    tokens = output.prompt_token_ids + output.outputs[0].token_ids

    with torch.no_grad():
        ids = torch.tensor([tokens])
        extra = {}
        if prompt.images:
            # A generated token may look like a placeholder: only those of the prompt are images.
            ids[0, len(prompt.token_ids) :][ids[0, len(prompt.token_ids) :] == llm.processor.config.image_token_id] = 0
            extra["pixel_values"] = torch.cat([image.pixel_values for image in prompt.images])
            extra["image_grid_thw"] = torch.tensor([image.grid_thw for image in prompt.images])
            extra["mm_token_type_ids"] = (ids == llm.processor.config.image_token_id).int()
        assert ids[0].tolist() == tokens, "choose another seed: the answer holds a placeholder"
        logits = plain.oracle(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
    expected = logits.double().log_softmax(-1)
    tolerance = 1e-4 * logits.abs().max().item()  # as for the model: the same fp32 mathematics in another order

    assert output.prompt_logprobs[0] is None
    entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
    assert len(entries) == len(tokens) - 1
    for place, entry in enumerate(entries):
        own, num_top = tokens[place + 1], 2 if place + 1 < len(prompt.token_ids) else 3
        assert num_top <= len(entry) <= num_top + 1
        assert next(iter(entry)) == own
        best = expected[place].topk(num_top).values
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(expected[place, token].item(), abs=tolerance)
            text = llm.processor.tokenizer.decode([token])
            assert logprob.decoded_token == text or "\ufffd" in text
        ranked = sorted(entry.values(), key=lambda logprob: logprob.rank)[:num_top]
        assert [logprob.logprob for logprob in ranked] == pytest.approx(best.tolist(), abs=tolerance)
    assert output.outputs[0].cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True))
    )


def test_no_logprobs_unless_asked_for(llm):
    (output,) = llm.generate(TEXT, SamplingParams(max_tokens=2))
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_prompt_logprobs_survive_preemption(plain, make_llm):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, prompt_logprobs=0)
    llm = make_llm(plain, block_size=4, num_blocks=16)
    outputs = llm.generate([TEXT] * 4, params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output in outputs:
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        values = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        assert values == pytest.approx(
            [next(iter(e.values())).logprob for e in outputs[0].prompt_logprobs[1:]], abs=1e-4
        )


# Streams


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5}, {"stop": ["e", "\ufffd\ufffd"]}])
def test_stream_joins_to_the_final_text(llm, params):
    """The tiny model's noise is full of broken UTF-8, which is the hard case."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 60, "ignore_eos": True} | params)
    outputs = list(llm.stream(PROMPTS["one image"], params))
    (whole,) = llm.generate(PROMPTS["one image"], params)
    assert "".join(output.outputs[0].new_text for output in outputs) == outputs[-1].outputs[0].text
    assert outputs[-1].outputs[0].text == whole.outputs[0].text
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) > 3 or params.stop
    check_leaks(llm)


def test_stream_of_a_conversation(llm):
    conversation = [{"role": "user", "content": TEXT}]
    params = SamplingParams(temperature=0, max_tokens=10)
    *_, last = llm.stream(conversation, params)
    assert last.outputs[0].token_ids == llm.chat(conversation, params)[0].outputs[0].token_ids


def test_closing_a_stream_frees_its_blocks(llm):
    stream = llm.stream(TEXT, SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    stream.close()
    check_leaks(llm)
    assert answer(llm).finish_reason == "length"


def test_a_stream_that_is_never_begun_leaves_nothing_behind(llm):
    llm.stream(TEXT)
    check_leaks(llm)


def test_a_refused_stream_raises_at_the_call(llm):
    with pytest.raises(OptionError):
        llm.stream(TEXT, SamplingParams(logprobs=10**6))


# Refusals


def test_prompt_without_room_for_an_answer_is_refused(plain, make_llm):
    llm = make_llm(plain, max_model_len=12)
    with pytest.raises(PromptError, match=r"prompt has 12 tokens.*max_model_len=12"):
        llm.generate([[5] * 12])
    with pytest.raises(PromptError, match=r"\(\d+ of images\).*lower max_pixels"):
        llm.generate(mixed_prompt((90, 90)))
    assert len(llm.generate([[5] * 11], SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == 1
    check_leaks(llm)


def test_a_bad_prompt_among_good_ones_is_named_and_leaves_nothing_behind(plain, make_llm):
    llm = make_llm(plain, max_model_len=64)
    with pytest.raises(PromptError, match="prompt 2: "):
        llm.generate([TEXT, TEXT, [5] * 64, TEXT])
    check_leaks(llm)
    assert answer(llm).finish_reason == "length"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate([TEXT, TEXT], [SamplingParams()]), "1 sampling_params for 2 prompts"),
        (lambda llm: llm.generate(TEXT, {"max_tokens": 3}), "SamplingParams or a list of them are needed, got dict"),
        (lambda llm: llm.generate([TEXT], [5]), "sampling_params: SamplingParams are needed, got int"),
        (lambda llm: llm.stream(TEXT, {"max_tokens": 3}), "sampling_params: SamplingParams are needed, got dict"),
        (lambda llm: llm.generate(TEXT, SamplingParams(logit_bias={"²": 1})), "logit_bias has the key '²'; a token id"),
        (lambda llm: llm.generate(TEXT, SamplingParams(stop_token_ids=[512])), "512 is outside of the vocabulary"),
        (lambda llm: llm.generate(TEXT, SamplingParams(logprobs=513)), "logprobs=513: the vocabulary has only 512"),
    ],
)
def test_options_that_do_not_fit_the_request(llm, call, message):
    with pytest.raises(OptionError, match=message):
        call(llm)
    check_leaks(llm)


@pytest.mark.parametrize("prompt", [3, None, b"bytes", [None], [[]], "", torch.tensor(1), type])
def test_what_is_no_prompt(llm, prompt):
    with pytest.raises(PromptError):
        llm.generate(prompt)


def test_nothing_to_do(llm):
    assert llm.generate([]) == []
    assert llm.chat([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0: an integer of at least 1"),
        ({"max_prefill_tokens": 2.5}, "max_prefill_tokens=2.5"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8'"),
        ({"max_encoder_tokens": 0}, "max_encoder_tokens=0: an integer of at least 1"),
        ({"block_size": None}, "block_size=None"),
        ({"seed": "x"}, "seed='x'"),
        ({"seed": -1}, "seed=-1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"gpu_memory_utilization": "x"}, "gpu_memory_utilization='x': a number in"),
        (
            {"num_blocks": None, "block_size": 10**14},
            "a block of block_size=100000000000000 tokens takes .*: lower block_size$",
        ),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1: True or False"),
        ({"max_modell_len": 5}, "unknown option 'max_modell_len'; the engine has .*max_model_len"),
        ({"max_model_len": 4097}, "max_model_len=4097 is longer than the model's 4096"),
        ({"max_model_len": 100, "num_blocks": 2, "block_size": 16}, "max_model_len=100 does not fit.* holds 32 tokens"),
        ({"num_blocks": 10**15}, "num_blocks=1000000000000000 with block_size=16 takes .* GB, but cpu has"),
        ({"num_blocks": 200, "block_size": 10**9}, "num_blocks=200 with block_size=1000000000 takes"),
    ],
)
def test_engine_options(plain, make_llm, options, message):
    with pytest.raises(OptionError, match=message):
        make_llm(plain, **options)


def test_a_small_cache_shortens_the_default_length(plain, make_llm):
    assert make_llm(plain, num_blocks=3, block_size=16).engine.max_model_len == 48


def test_interruption_leaves_a_usable_engine(llm, monkeypatch):
    expected = answer(llm).token_ids
    launch, steps = llm.engine.runner.launch, []

    def interrupted(chunks, after=None):
        steps.append(chunks)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return launch(chunks, after)

    monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([TEXT] * 3, SamplingParams(temperature=0, ignore_eos=True, max_tokens=24))
    check_leaks(llm)
    assert answer(llm).token_ids == expected


def test_metrics(llm):
    (output,) = llm.generate(PROMPTS["one image"], SamplingParams(max_tokens=8, ignore_eos=True))
    metrics = output.metrics
    times = [metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time, metrics.finished_time]
    assert times == sorted(times)
    assert tuple(metrics.stages) == STAGES
    assert all(seconds > 0 for seconds in metrics.stages.values())
    # One request alone: its stages are where its time went. What is left over is host work between the steps.
    assert sum(metrics.stages.values()) <= metrics.finished_time - metrics.arrival_time + 1e-3
    assert output.num_image_tokens == output.prompt_token_ids.count(llm.processor.config.image_token_id)


# Loading


def test_from_a_directory(plain):
    llm = LLM(plain.published, device="cpu", dtype="float32", max_num_seqs=4, max_model_len=128, progress=False)
    assert llm.settings == {
        "model": str(plain.published), "random_weights": False, "device": "cpu", "dtype": "float32", "moe": "reference",
        "moe_fallback": "a CUDA GPU is needed, the device is cpu",
        "attention": "torch", "small_ops": "torch", "cuda_graphs": False,
        "tensor_parallel_size": 1, "data_parallel_size": 1, "cpu_threads": torch.get_num_threads(),
        "max_model_len": 128, "max_num_seqs": 4, "max_prefill_tokens": 8192,
        "kv_cache_dtype": "float32", "kv_cache_tokens": 512,
    }  # fmt: skip
    assert answer(llm).finish_reason == "length"
    assert "moe_fallback" not in LLM(plain.published, moe="reference", progress=False).settings


def test_threads_of_a_narrow_model_on_a_cpu(plain, monkeypatch):
    """One, unless the environment says otherwise; wider models keep what torch has."""
    before, config = torch.get_num_threads(), Qwen3VLMoeConfig.from_pretrained(plain.path).text
    try:
        for hidden, chosen, threads in ((32, "", 1), (32, "3", 3), (2048, "", 3)):
            monkeypatch.setenv("OMP_NUM_THREADS", chosen)
            monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
            torch.set_num_threads(3)
            settle_threads(torch.device("cpu"), replace(config, hidden_size=hidden))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_parts_without_defaults_end_at_the_tokenizers_end_of_text(llm):
    parts = LLM.from_parts(llm.engine.model, llm.processor, num_blocks=16)
    assert parts.engine.defaults.eos_token_ids == {llm.processor.tokenizer.eos_token_id}


def test_a_damaged_generation_config_is_named(plain, tmp_path):
    for content, message in (("{", "cannot be read as JSON"), ("[]", "JSON object"), ('{"top_p": 7}', "top_p=7")):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=rf"generation_config.json.*{message}"):
            GenerationDefaults.from_pretrained(tmp_path)
