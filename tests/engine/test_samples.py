"""Several answers to one request, and what vLLM's callers find on the way in and out."""

import re

import pytest

from qwen3vl_moe.engine import RequestOutput, SamplingParams
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.errors import OptionError, PromptError
from tests.engine.conftest import PROMPTS, check_leaks

TEXT = "Hello, how are you today?"
CONVERSATION = [{"role": "user", "content": TEXT}]


def drawn(max_tokens=12, **more):
    return SamplingParams(**{"temperature": 1.0, "max_tokens": max_tokens, "ignore_eos": True, **more})


def tokens(output: RequestOutput):
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.parametrize("prompt", [TEXT, PROMPTS["three odd images"]], ids=["text", "images"])
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"block_size": 4, "num_blocks": 40}])
def test_each_answer_is_that_of_its_own_seed(plain, make_llm, prompt, options):
    """vLLM's rule: answer i is drawn with seed + i."""
    (output,) = make_llm(plain, **options).generate(prompt, drawn(n=3, seed=5, logprobs=1))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert all(completion.finished() for completion in output.outputs)
    for i, completion in enumerate(output.outputs):
        (alone,) = make_llm(plain).generate(prompt, drawn(seed=5 + i, logprobs=1))
        assert completion.token_ids == alone.outputs[0].token_ids
        assert completion.text == alone.outputs[0].text
        assert completion.cumulative_logprob == pytest.approx(alone.outputs[0].cumulative_logprob, abs=1e-4)


def test_answers_without_a_seed_differ_and_come_together(llm):
    params = [drawn(n=4), drawn(), drawn(n=2, max_tokens=3)]
    results = dict(llm.as_completed([TEXT] * 3, params))
    assert [len(results[number].outputs) for number in range(3)] == [4, 1, 2]
    assert len({tuple(each) for each in tokens(results[0])}) == 4
    assert results[0].finished
    check_leaks(llm)


def test_the_prompt_is_computed_once(plain, make_llm):
    llm = make_llm(plain, block_size=4)
    (output,) = llm.generate(TEXT, drawn(n=3, seed=1, prompt_logprobs=0))
    assert output.num_cached_tokens == 0
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    whole_blocks = (len(output.prompt_token_ids) - 1) // 4 * 4
    assert llm.stats["prefix_cache_hits"] == 2 * whole_blocks
    (again,) = llm.generate(TEXT, drawn())
    assert again.num_cached_tokens == whole_blocks == again.metrics.num_cached_tokens


def test_answers_end_by_themselves(llm):
    (whole,) = llm.generate(TEXT, drawn(n=2, seed=1, max_tokens=20))
    stop = whole.outputs[1].token_ids[4]
    assert stop not in whole.outputs[0].token_ids
    (output,) = llm.generate(TEXT, drawn(n=2, seed=1, max_tokens=20, stop_token_ids=[stop]))
    assert [completion.finish_reason for completion in output.outputs] == ["length", "stop"]
    assert [len(each) for each in tokens(output)] == [20, whole.outputs[1].token_ids.index(stop) + 1]
    assert output.metrics.finished_time >= output.metrics.first_token_time


def test_a_stream_of_several_answers(llm):
    params = drawn(n=2, seed=3, max_tokens=30)
    outputs = list(llm.stream(TEXT, params))
    for i in range(2):
        assert "".join(output.outputs[i].new_text for output in outputs) == outputs[-1].outputs[i].text
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert tokens(outputs[-1]) == tokens(llm.generate(TEXT, params)[0])
    check_leaks(llm)


def test_closing_a_stream_gives_all_answers_up(llm):
    stream = llm.stream(TEXT, drawn(n=3, max_tokens=500))
    next(stream)
    stream.close()
    check_leaks(llm)


def test_greedy_answers_are_one(llm):
    with pytest.raises(OptionError, match="n=2: greedy"):
        llm.generate(TEXT, SamplingParams(n=2))
    llm.engine.defaults = GenerationDefaults(params=SamplingParams(temperature=1.0))
    assert len(llm.generate(TEXT, SamplingParams(n=2, max_tokens=2))[0].outputs) == 2


# How the text is written


@pytest.mark.parametrize("include", [False, True])
def test_what_ended_the_answer_may_stay(llm, include):
    whole = drawn(seed=1, max_tokens=30)
    (output,) = llm.generate(TEXT, whole)
    (completion,) = output.outputs
    text = completion.text
    stop = text[6:8]
    (cut,) = llm.generate(TEXT, drawn(seed=1, max_tokens=30, stop=stop, include_stop_str_in_output=include))
    assert cut.outputs[0].text == text[: text.index(stop) + (len(stop) if include else 0)]
    token = completion.token_ids[5]
    first = completion.token_ids.index(token)
    (cut,) = llm.generate(
        TEXT, drawn(seed=1, max_tokens=30, stop_token_ids=[token], include_stop_str_in_output=include)
    )
    kept = completion.token_ids[: first + include]
    assert cut.outputs[0].text == llm.get_tokenizer().decode(kept, skip_special_tokens=True)


def test_special_tokens_stop_and_may_be_shown(llm):
    tokenizer = llm.get_tokenizer()
    end, other = tokenizer.eos_token_id, tokenizer.encode("a")[0]
    only = {"allowed_token_ids": [end, other], "ignore_eos": True, "temperature": 5.0, "seed": 1, "max_tokens": 30}
    (whole,) = llm.generate(TEXT, SamplingParams(**only))
    assert {end, other} == set(whole.outputs[0].token_ids)
    (shown,) = llm.generate(TEXT, SamplingParams(**only, skip_special_tokens=False))
    assert shown.outputs[0].text == tokenizer.decode(whole.outputs[0].token_ids)
    assert tokenizer.eos_token in shown.outputs[0].text
    (stopped,) = llm.generate(TEXT, SamplingParams(**only, stop=[tokenizer.eos_token]))
    first = whole.outputs[0].token_ids.index(end)
    assert stopped.outputs[0].token_ids == whole.outputs[0].token_ids[: first + 1]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", tokenizer.eos_token)
    assert stopped.outputs[0].text == tokenizer.decode([other] * first)


def test_no_text_unless_wanted(llm):
    with_text, without = (
        llm.generate(TEXT, drawn(seed=1, detokenize=detokenize, logprobs=2))[0].outputs[0]
        for detokenize in (True, False)
    )
    assert without.token_ids == with_text.token_ids
    assert with_text.text
    assert without.text == ""
    assert {entry.decoded_token for each in without.logprobs for entry in each.values()} == {None}
    *_, last = llm.stream(TEXT, drawn(seed=1, detokenize=False))
    assert last.outputs[0].token_ids == with_text.token_ids


def test_log_probabilities_of_the_whole_vocabulary(llm):
    (output,) = llm.generate(TEXT, drawn(2, logprobs=-1, prompt_logprobs=-1))
    for entry in [*output.outputs[0].logprobs, *output.prompt_logprobs[1:]]:
        assert len(entry) == llm.engine.model.config.text.vocab_size
        assert sum(2.718281828**each.logprob for each in entry.values()) == pytest.approx(1.0, abs=1e-3)


def test_texts_of_chosen_tokens_join_to_the_answer(llm):
    """The tiny model's noise is full of halves of characters; those that never became one are left out."""
    (output,) = llm.generate(TEXT, drawn(60, seed=4, logprobs=0))
    completion = output.outputs[0]
    own = [entry[token].decoded_token for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    special = llm.engine._token_bytes.special
    joined = "".join(text for text, token in zip(own, completion.token_ids, strict=True) if token not in special)
    assert joined.replace("\ufffd", "") == completion.text.replace("\ufffd", "")


# The way in


@pytest.mark.parametrize("call", ["generate", "chat"])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"lora_request": object()}, "lora_request is not supported: merge"),
        ({"priority": [1]}, "priority is not supported"),
        ({"mm_processor_kwargs": {}}, "mm_processor_kwargs is not supported"),
        ({"chat_template": "x"}, "chat_template is not supported"),
        ({"tokenization_kwargs": {}}, "tokenization_kwargs is not supported"),
        ({"sampling_parms": 1}, "unknown argument 'sampling_parms'"),
    ],
)
def test_arguments_that_are_not_built_are_refused_by_name(llm, call, argument, message):
    with pytest.raises(OptionError, match=message):
        getattr(llm, call)(CONVERSATION if call == "chat" else TEXT, **argument)
    none = dict.fromkeys(argument)
    if "unknown" not in message:
        assert getattr(llm, call)(CONVERSATION if call == "chat" else TEXT, drawn(1), **none)


def test_names_of_arguments_are_vllms(llm):
    params = SamplingParams(temperature=0, max_tokens=3)
    (by_name,) = llm.chat(messages=CONVERSATION, sampling_params=params, use_tqdm=False, lora_request=None)
    assert tokens(by_name) == tokens(llm.chat(CONVERSATION, params)[0])
    assert tokens(llm.generate(prompts=TEXT, sampling_params=params)[0]) == tokens(llm.generate(TEXT, params)[0])


def test_a_bar_only_where_asked_for(llm, capsys):
    llm.generate([TEXT, TEXT], drawn(1))
    assert capsys.readouterr().err == ""
    llm.chat(CONVERSATION, drawn(1), use_tqdm=True)
    assert re.search(r"1/1 .* \d+ prompt tokens/s, \d+ answer tokens/s", capsys.readouterr().err)


def test_a_message_is_continued(llm):
    begun = [*CONVERSATION, {"role": "assistant", "content": "I am"}]
    (output,) = llm.chat(begun, drawn(2), add_generation_prompt=False, continue_final_message=True)
    assert output.prompt.endswith("I am")
    (output,) = llm.chat(CONVERSATION, drawn(2), add_generation_prompt=False)
    assert not output.prompt.endswith("assistant\n")
    with pytest.raises(OptionError, match="continue_final_message"):
        llm.chat(begun, drawn(2), continue_final_message=True)


def test_what_a_request_takes_by_itself(llm):
    llm.engine.defaults = GenerationDefaults(params=SamplingParams(temperature=0.7, top_k=20))
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 20, 1.0)
    assert llm.get_tokenizer() is llm.processor.tokenizer


@pytest.mark.parametrize("prompt", [TEXT, list(range(5, 60)), {"prompt": TEXT}, CONVERSATION])
@pytest.mark.parametrize("keep", [1, 4, 1000])
def test_a_prompt_is_cut_from_the_left(llm, prompt, keep):
    ((_, whole),) = llm.as_completed(prompt, drawn(1))
    ((_, cut),) = llm.as_completed(prompt, drawn(1, truncate_prompt_tokens=keep))
    assert cut.prompt_token_ids == whole.prompt_token_ids[-keep:]
    ((_, alone),) = llm.as_completed([cut.prompt_token_ids], drawn(3, temperature=0))
    *_, streamed = llm.stream(prompt, drawn(3, temperature=0, truncate_prompt_tokens=keep))
    assert tokens(streamed) == tokens(alone)


def test_a_prompt_is_cut_to_what_fits(plain, make_llm):
    llm = make_llm(plain, max_model_len=20)
    (output,) = llm.generate([list(range(5, 60))], drawn(8, truncate_prompt_tokens=-1))
    assert output.prompt_token_ids == list(range(48, 60))
    assert len(tokens(output)[0]) == 8
    with pytest.raises(PromptError, match="max_model_len=20"):
        llm.generate([list(range(5, 60))], drawn(8))


def test_images_are_not_cut(llm):
    whole = llm.generate(PROMPTS["one image"], drawn(1))[0].prompt_token_ids
    with pytest.raises(PromptError, match=r"truncate_prompt_tokens=5.*images"):
        llm.generate(PROMPTS["one image"], drawn(1, truncate_prompt_tokens=5))
    (output,) = llm.generate(PROMPTS["one image"], drawn(1, truncate_prompt_tokens=len(whole)))
    assert output.prompt_token_ids == whole
