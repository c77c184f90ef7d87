"""Prefix reuse with a model: the same tokens as without it, and the work that it saves."""

import dataclasses

import pytest
import torch
from PIL import Image

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.inputs.tokenizer import IMAGE_PLACEHOLDER
from tests.engine.conftest import PROMPTS, check_leaks, mixed_prompt, picture

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PAST = "Look at this. "
QUESTIONS = ["What do you see?", "How many red squares are there?", "Is there a cat?", "Name the colour."]


def about(*images, question=QUESTIONS[0]):
    """A question about images; the images come first, so that they are what questions share."""
    return {"prompt": PAST + IMAGE_PLACEHOLDER * len(images) + question, "multi_modal_data": {"image": list(images)}}


@pytest.fixture(scope="session")
def alone(plain, make_llm):
    """``alone(prompt)``: what an engine without prefix reuse answers."""
    llm = make_llm(plain, enable_prefix_caching=False)

    def answer(prompt, params=GREEDY):
        (output,) = llm.generate(prompt, params)
        assert output.metrics.num_cached_tokens == 0
        assert llm.stats["prefix_cache_hits"] == 0
        return output.outputs[0].token_ids

    return answer


def answers(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("case", list(PROMPTS))
def test_the_same_prompt_again(plain, make_llm, alone, encoded, case, block_size):
    llm = make_llm(plain, block_size=block_size)
    expected = alone(PROMPTS[case])
    encoded.clear()
    (first,) = llm.generate(PROMPTS[case], GREEDY)
    images = sum(encoded)
    (second,) = llm.generate(PROMPTS[case], GREEDY)
    assert answers([first, second]) == [expected, expected]
    length = len(first.prompt_token_ids)
    reused = (length - 1) // block_size * block_size
    assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens) == (0, reused)
    assert llm.stats == {"prefix_cache_queries": 2 * length, "prefix_cache_hits": reused}
    last_image = max((i.start + i.num_tokens for i in llm.processor.prompt(PROMPTS[case]).images), default=0)
    if last_image <= reused:
        assert sum(encoded) == images, "images whose tokens are all found are not encoded again"
    check_leaks(llm)


@pytest.mark.parametrize("chunk", [3, 8192])
def test_one_image_and_several_questions(plain, make_llm, alone, encoded, chunk):
    """All at once: the first one computes the picture, the others wait a step for it."""
    image = picture(40, 30)
    prompts = [about(image, question=question) for question in QUESTIONS]
    expected = [alone(prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    encoded.clear()
    llm = make_llm(plain, block_size=2, max_prefill_tokens=chunk)
    outputs = llm.generate(prompts, GREEDY)
    assert answers(outputs) == expected
    assert sum(encoded) == 1
    first = llm.processor.prompt(prompts[0]).images[0]
    cached = [output.metrics.num_cached_tokens for output in outputs]
    assert cached[0] == 0
    assert min(cached[1:]) >= first.start + first.num_tokens
    check_leaks(llm)


def recoloured(image):
    """The same picture but for one pixel, by as little as possible."""
    other = image.copy()
    red, green, blue = other.getpixel((3, 3))
    other.putpixel((3, 3), (red ^ 1, green, blue))
    return other


@pytest.mark.parametrize("block_size", [1, 4])
def test_another_picture_with_the_same_tokens_is_not_shared(plain, make_llm, alone, block_size):
    """Sizes are such that nothing is resized. All grey: no pixel differs, only the shape."""
    first, second = picture(24, 32, seed=1), picture(24, 32, seed=2)
    grey, turned = Image.new("RGB", (24, 32), "grey"), Image.new("RGB", (32, 24), "grey")
    prompts = [about(image) for image in (first, second, recoloured(first), grey, turned)]
    prompts += [about(first, second), about(second, first), about(first, first)]
    llm = make_llm(plain, block_size=block_size)
    prepared = [llm.processor.prompt(prompt) for prompt in prompts]
    assert len({tuple(prompt.token_ids) for prompt in prepared}) == 2
    one, other = prepared[5].images
    outputs = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert answers(outputs) == [alone(prompt) for prompt in prompts]
    cached = [output.metrics.num_cached_tokens for output in outputs]
    # Alike up to the picture; up to the marker before the second one, where text followed; up to the second one.
    alike = [0] + [one.start] * 4 + [other.start - 1] * 2 + [other.start]
    assert cached == [place // block_size * block_size for place in alike]
    together = make_llm(plain, block_size=block_size)
    assert answers(together.generate(prompts, GREEDY)) == answers(outputs)
    check_leaks(together)


@pytest.mark.parametrize(("chunk", "block_size"), [(1, 2), (3, 4), (7, 3), (8192, 16)])
def test_chunk_and_block_boundaries_inside_images(plain, make_llm, alone, chunk, block_size):
    llm = make_llm(plain, block_size=block_size, max_prefill_tokens=chunk)
    prompts = [*PROMPTS.values(), mixed_prompt((61, 23), (17, 53), (20, 30), seed=2)]
    expected = [alone(prompt) for prompt in prompts]
    for _ in range(2):
        assert answers(llm.generate(prompts, GREEDY)) == expected
    assert llm.stats["prefix_cache_hits"] > llm.stats["prefix_cache_queries"] // 3
    check_leaks(llm)


@pytest.mark.parametrize("chunk", [4, 8192])
def test_a_cache_of_a_few_blocks(plain, make_llm, alone, chunk):
    """Blocks are evicted, requests preempted and found again, and everything ends with the same tokens."""
    image = picture(40, 30)
    prompts = [about(image, question=q) for q in QUESTIONS] + [PROMPTS["text"], PROMPTS["one image"]] * 2
    params = dataclasses.replace(GREEDY, max_tokens=24)
    expected = [alone(prompt, params) for prompt in prompts]
    processor = make_llm(plain).processor
    longest = max(len(processor.prompt(prompt).token_ids) for prompt in prompts) + params.max_tokens
    llm = make_llm(plain, block_size=4, num_blocks=longest // 4 + 4, max_prefill_tokens=chunk)
    for _ in range(2):
        outputs = llm.generate(prompts, params)
        assert answers(outputs) == expected
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
        check_leaks(llm)
    assert llm.stats["prefix_cache_hits"] > 0


def test_a_preempted_request_finds_its_own_blocks(plain, make_llm, alone):
    """Two requests that share nothing: whatever is found, a preempted one has computed before."""
    prompts = [[40] * 20, [50] * 20]
    params = dataclasses.replace(GREEDY, max_tokens=40)
    llm = make_llm(plain, block_size=4, num_blocks=20)
    outputs = llm.generate(prompts, params)
    assert answers(outputs) == [alone(prompt, params) for prompt in prompts]
    assert [output.metrics.num_preemptions for output in outputs] == [0, 1]
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0], "of the first run, not of a later one"
    assert llm.stats["prefix_cache_hits"] > 0


def test_the_next_turn_finds_prompt_and_answer(llm, alone):
    """An answer's tokens stand at the positions that they have in the prompt of the next turn."""
    prompt = about(picture(40, 30))
    (first,) = llm.generate(prompt, dataclasses.replace(GREEDY, max_tokens=40))
    ids = first.prompt_token_ids + first.outputs[0].token_ids
    longer = {"prompt_token_ids": [*ids, 40, 41, 42], "multi_modal_data": prompt["multi_modal_data"]}
    (second,) = llm.generate(longer, GREEDY)
    # The last token of an answer is never fed back, so it is not in the cache.
    assert second.metrics.num_cached_tokens == (len(ids) - 1) // 16 * 16
    assert second.outputs[0].token_ids == alone(longer)


def test_prompt_logprobs_are_computed_not_found(plain, llm, make_llm):
    params = dataclasses.replace(GREEDY, prompt_logprobs=0)
    (expected,) = make_llm(plain, enable_prefix_caching=False).generate(PROMPTS["one image"], params)
    llm.generate(PROMPTS["one image"], GREEDY)
    (output,) = llm.generate(PROMPTS["one image"], params)
    assert output.metrics.num_cached_tokens == 0
    assert output.prompt_logprobs == expected.prompt_logprobs
    (again,) = llm.generate(PROMPTS["one image"], GREEDY)
    assert again.metrics.num_cached_tokens > 0, "its blocks serve others"


def test_shared_blocks_are_never_written(llm):
    """Bit for bit, while others read them, chunk by chunk and token by token."""
    cache, prompt = llm.engine.cache, PROMPTS["three odd images"]
    llm.generate(prompt, GREEDY)
    shared = sorted(cache._block_of.values())
    before = cache.tensor[:, :, shared].clone()
    llm.generate([prompt] * 4, [dataclasses.replace(GREEDY, max_tokens=5 + n) for n in range(4)])
    assert before.abs().sum() > 0
    assert torch.equal(cache.tensor[:, :, shared], before)


def test_requests_that_are_given_up(plain, make_llm, alone):
    """A stream is closed while others read the beginning that it computed, or while it is half-way through its own."""
    prompt = PROMPTS["three odd images"]
    llm = make_llm(plain, block_size=4, max_prefill_tokens=9)
    first = llm.stream(prompt, GREEDY)
    next(first)
    others = [llm.engine.request(llm.processor.prompt(prompt), GREEDY) for _ in range(2)]
    for other in others:
        llm.engine.add(other)
    llm.engine.step()
    first.close()
    half = llm.engine.request(llm.processor.prompt(mixed_prompt((61, 23), (17, 53), seed=7)), GREEDY)
    llm.engine.add(half)
    llm.engine.step()
    assert 0 < half.num_computed < half.num_prompt_tokens
    llm.engine.abort(half)
    while not all(other.finished for other in others):
        llm.engine.step()
    assert [other.output_ids for other in others] == [alone(prompt)] * 2
    assert all(other.metrics.num_cached_tokens > 0 for other in others)
    whole = mixed_prompt((61, 23), (17, 53), seed=7)
    (output,) = llm.generate(whole, GREEDY)
    assert output.metrics.num_cached_tokens > 0, "what the one that was given up had computed"
    assert output.outputs[0].token_ids == alone(whole)
    check_leaks(llm)


def test_a_step_that_fails_makes_nothing_findable(llm, alone, monkeypatch):
    """Its blocks hold whatever the model had written by then."""
    launch = llm.engine.runner.launch

    def failing(chunks, after=None):
        llm.engine.cache.tensor[:, :, chunks[0].sequence.block_table] = torch.nan
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "launch", failing)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS["one image"], GREEDY)
    monkeypatch.setattr(llm.engine.runner, "launch", launch)
    (output,) = llm.generate(PROMPTS["one image"], GREEDY)
    assert output.metrics.num_cached_tokens == 0
    assert output.outputs[0].token_ids == alone(PROMPTS["one image"])


def test_a_forgotten_cache_gives_nothing_and_breaks_nothing(llm):
    text, params = "Hello, how are you today? " * 8, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    [first] = llm.generate(text, params)
    assert llm.generate(text, params)[0].num_cached_tokens > 0
    stream = llm.stream(text, params)
    next(stream)
    llm.engine.cache.forget_all()  # while its blocks are held
    [again] = llm.generate(text, params)
    assert again.num_cached_tokens == 0
    *_, last = stream
    assert last.outputs[0].token_ids == again.outputs[0].token_ids == first.outputs[0].token_ids
    check_leaks(llm)
    assert llm.generate(text, params)[0].num_cached_tokens > 0
