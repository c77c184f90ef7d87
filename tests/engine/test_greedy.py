"""Greedy answers against transformers' generate(), and against the engine itself under every way of batching."""

import dataclasses

import pytest
import torch

from qwen3vl_moe.engine import SamplingParams
from tests.engine.conftest import PROMPTS, check_leaks, mixed_prompt

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def oracle_tokens(checkpoint, prompt, max_tokens=64):
    """What transformers generates greedily after one of our prepared prompts, end-of-text ignored."""
    ids = torch.tensor([prompt.token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = checkpoint.oracle.config
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    for of_video, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        if images := [image for image in prompt.images if image.of_video == of_video]:
            inputs[pixels] = torch.cat([image.pixel_values for image in images])
            inputs[grids] = torch.tensor([image.grid_thw for image in images])
    with torch.no_grad():
        # No end-of-text token at all, so that all of them are generated.
        out = checkpoint.oracle.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="session")
def expected(plain, make_llm):
    """Tokens that the plain checkpoint gives for each prompt, from transformers."""
    processor = make_llm(plain).processor
    return {name: oracle_tokens(plain, processor.prompt(prompt)) for name, prompt in PROMPTS.items()}


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("case", list(PROMPTS))
def test_tokens_equal_transformers(tiny, make_llm, case):
    llm = make_llm(tiny)
    prompt = PROMPTS[case]
    (output,) = llm.generate(prompt, GREEDY)
    expected = oracle_tokens(tiny, llm.processor.prompt(prompt))
    assert len(set(expected)) > 8, "an answer of few different tokens would prove little"
    assert output.outputs[0].token_ids == expected
    assert output.outputs[0].finish_reason == "length"
    check_leaks(llm)


def test_batch_of_mixed_prompts_equals_transformers(llm, expected):
    assert tokens(llm.generate(list(PROMPTS.values()), GREEDY)) == list(expected.values())
    check_leaks(llm)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_chunked_prefill_equals_whole(plain, make_llm, expected, chunk):
    """Prompts have images of several tokens, so small chunks begin and end inside them."""
    llm = make_llm(plain, max_prefill_tokens=chunk)
    assert tokens(llm.generate(list(PROMPTS.values()), GREEDY)) == list(expected.values())
    check_leaks(llm)


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_size_does_not_matter(plain, make_llm, expected, block_size):
    llm = make_llm(plain, block_size=block_size, num_blocks=1024 // block_size)
    assert tokens(llm.generate(list(PROMPTS.values()), GREEDY)) == list(expected.values())


def test_more_requests_than_may_run(plain, make_llm, expected):
    llm = make_llm(plain, max_num_seqs=2)
    assert tokens(llm.generate(list(PROMPTS.values()) * 2, GREEDY)) == list(expected.values()) * 2
    check_leaks(llm)


@pytest.mark.parametrize("chunk", [4, 8192])
def test_preemption_gives_the_same_tokens(plain, make_llm, expected, chunk):
    """The cache holds the longest request and little more: the others are thrown out and computed again."""
    longest = max(len(make_llm(plain).processor.prompt(prompt).token_ids) for prompt in PROMPTS.values()) + 64
    llm = make_llm(plain, block_size=4, num_blocks=longest // 4 + 3, max_prefill_tokens=chunk)
    outputs = llm.generate(list(PROMPTS.values()), GREEDY)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert outputs[0].metrics.num_preemptions == 0, "the first come is served first"
    assert tokens(outputs) == list(expected.values())
    check_leaks(llm)


def test_images_of_a_step_are_encoded_once_and_together(plain, make_llm, monkeypatch):
    llm = make_llm(plain, max_prefill_tokens=5)
    calls = []
    encode = llm.engine.model.encode_images
    monkeypatch.setattr(
        llm.engine.model, "encode_images", lambda pixels, grids: calls.append(len(grids)) or encode(pixels, grids)
    )
    llm.generate(PROMPTS["three odd images"], GREEDY)
    assert sum(calls) == 3, "each image once, however many chunks it is spread over"
    calls.clear()
    make_llm(plain).generate(list(PROMPTS.values()), GREEDY)
    assert calls == [4], "one packed call for all images of a step"


@pytest.mark.parametrize("chunk", [3, 8192])
@pytest.mark.parametrize("budget", [1, 20, 23, 44, 60])
def test_the_encoders_budget_bounds_a_call_and_changes_no_token(plain, make_llm, expected, monkeypatch, budget, chunk):
    """Chunks end before images, and inside of them; the images have 20, 24, 14 and 20 tokens."""
    llm = make_llm(plain, max_encoder_tokens=budget, max_prefill_tokens=chunk)
    calls = []
    encode = llm.engine.model.encode_images
    monkeypatch.setattr(
        llm.engine.model, "encode_images", lambda pixels, grids: calls.append(grids) or encode(pixels, grids)
    )
    assert tokens(llm.generate(list(PROMPTS.values()) * 2, GREEDY)) == list(expected.values()) * 2
    square = llm.processor.config.vision.merge_size**2
    for grids in calls:
        assert sum(t * h * w for t, h, w in grids) // square <= budget or len(grids) == 1
    assert budget < 44 or chunk == 3 or max(map(len, calls)) > 1, "small images share a call"
    check_leaks(llm)


def run(llm, prompt, params):
    """One prepared prompt through the engine."""
    sequence = llm.engine.request(prompt, params)
    llm.engine.add(sequence)
    while not sequence.finished:
        llm.engine.step()
    return sequence.output()


def test_decode_equals_prefill(llm):
    """Log-probabilities of generated tokens equal those of the same tokens given as a prompt."""
    prompt = llm.processor.prompt(PROMPTS["three odd images"])
    output = run(llm, prompt, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=0))
    answer = output.outputs[0].token_ids
    places = torch.arange(prompt.next_position, prompt.next_position + len(answer)).expand(3, -1)
    whole = dataclasses.replace(
        prompt,
        token_ids=prompt.token_ids + answer,
        positions_3T=torch.cat([prompt.positions_3T, places], dim=1),
        next_position=prompt.next_position + len(answer),
    )
    again = run(llm, whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    decoded = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, answer, strict=True)]
    prefilled = [entry[token].logprob for entry, token in zip(again.prompt_logprobs[-32:], answer, strict=True)]
    # The same fp32 mathematics in another order of summation: 1e-4 of the logits' scale, as for the model itself.
    assert max(abs(a - b) for a, b in zip(decoded, prefilled, strict=True)) < 1e-4 * max(map(abs, prefilled))
    assert output.outputs[0].cumulative_logprob == pytest.approx(sum(decoded))


def test_answer_goes_on_after_a_picture_at_the_right_position(llm, expected):
    """Moving the first generated token by one position changes the answer, so positions are really tested above."""
    prompt = llm.processor.prompt(PROMPTS["one image"])
    shifted = dataclasses.replace(prompt, next_position=prompt.next_position + 3)
    assert run(llm, shifted, GREEDY).outputs[0].token_ids != expected["one image"]


def test_a_stream_and_a_batch_side_by_side(llm, expected):
    stream = llm.stream(PROMPTS["one image"], GREEDY)
    next(stream)
    (other,) = llm.generate(PROMPTS["text"], GREEDY)
    *_, last = stream
    assert other.outputs[0].token_ids == expected["text"]
    assert last.outputs[0].token_ids == expected["one image"]
    check_leaks(llm)


def test_many_small_requests_stay_in_order(plain, make_llm):
    llm = make_llm(plain, max_num_seqs=3)
    prompts = [[40 + number] * (1 + number % 5) for number in range(20)]
    params = [SamplingParams(max_tokens=1 + number % 4, ignore_eos=True) for number in range(20)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [p.max_tokens for p in params]
    alone = [make_llm(plain).generate(prompt, each)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert tokens(outputs) == tokens(alone)


def test_chat_uses_the_checkpoints_template(llm):
    conversation = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    (output,) = llm.chat(conversation, GREEDY)
    assert output.prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert [output.outputs[0].token_ids] * 2 == tokens(llm.chat([conversation, conversation], GREEDY))
    image = {"type": "image", "image": mixed_prompt((40, 30))["multi_modal_data"]["image"][0]}
    (with_image,) = llm.chat([{"role": "user", "content": [image, *conversation[0]["content"]]}], GREEDY)
    assert with_image.num_image_tokens > 4
    assert len(with_image.prompt_token_ids) == len(output.prompt_token_ids) + with_image.num_image_tokens + 2
