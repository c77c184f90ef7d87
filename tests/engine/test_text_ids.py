"""Tokens that spell an image and are text: fed back by a program, or drawn by the model itself."""

import pytest
import torch

from qwen3vl_moe.engine import SamplingParams
from tests.engine.conftest import PROMPTS, check_leaks, mixed_prompt
from tests.model.prompts import assert_close_to_scale


@pytest.fixture(scope="module")
def spelled(plain) -> list[int]:
    """A whole placeholder, halves of one, a video's, and words between."""
    config = plain.oracle.config
    start, image, end = config.vision_start_token_id, config.image_token_id, config.vision_end_token_id
    return [7, start, image, image, image, image, end, 9, image, end, start, config.video_token_id, 11, image, start]


@pytest.fixture(scope="module")
def expected(plain, spelled):
    """``expected(prompt)``: transformers' log-probabilities [T, V] of a prompt with ``spelled`` behind it.

    It takes each of these ids for an image's; so other ids are given to it, whose embeddings are the same.
    """
    config, weight = plain.oracle.config, plain.oracle.get_input_embeddings().weight
    kept = weight.clone()
    others = {token: 500 + number for number, token in enumerate(sorted(set(spelled)))}

    def logprobs(prompt) -> torch.Tensor:
        ids = torch.tensor([[*prompt.token_ids, *(others[token] for token in spelled)]])
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == config.image_token_id).int()}
        if prompt.images:
            pixels = torch.cat([image.pixel_values for image in prompt.images])
            grids = torch.tensor([image.grid_thw for image in prompt.images])
            inputs |= {"pixel_values": pixels, "image_grid_thw": grids}
        with torch.no_grad():
            for token, other in others.items():
                weight[other] = kept[token]
            try:
                return plain.oracle(**inputs).logits[0].log_softmax(-1)
            finally:
                weight.copy_(kept)

    return logprobs


def with_answer(prompt: dict, answer: list[int]) -> dict:
    return {**prompt, "text_token_ids": answer}


@pytest.mark.parametrize("chunk", [7, 2048])
@pytest.mark.parametrize("case", list(PROMPTS))
def test_logprobs_are_those_of_text(plain, make_llm, expected, spelled, case, chunk):
    llm = make_llm(plain, max_prefill_tokens=chunk)
    head = llm.processor.prompt(PROMPTS[case])
    [output] = llm.generate(with_answer(PROMPTS[case], spelled), SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_token_ids == [*head.token_ids, *spelled]
    theirs_TV = expected(head)[:-1]
    targets = torch.tensor(output.prompt_token_ids[1:])[:, None]
    given = zip(output.prompt_logprobs[1:], targets[:, 0].tolist(), strict=True)
    ours = [entry[token].logprob for entry, token in given]
    assert_close_to_scale(torch.tensor(ours), theirs_TV.gather(1, targets)[:, 0])


def test_the_cache_tells_them_from_an_image(plain, make_llm):
    """The same ids, as an image and as text, one after the other: neither finds the other's keys and values."""
    image = mixed_prompt((40, 30), text="A", seed=1)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    ids = make_llm(plain).processor.prompt(image).token_ids
    text = {"text_token_ids": ids}
    alone = [make_llm(plain, enable_prefix_caching=False).generate(each, params)[0] for each in (image, text)]
    assert alone[0].prompt_token_ids == alone[1].prompt_token_ids
    assert alone[0].outputs[0].token_ids != alone[1].outputs[0].token_ids
    llm = make_llm(plain, block_size=4)
    before = ids.index(plain.oracle.config.image_token_id)
    for number in (0, 1, 0, 1):
        [output] = llm.generate((image, text)[number], params)
        assert output.outputs[0].token_ids == alone[number].outputs[0].token_ids
    [mixed] = llm.generate({"prompt_token_ids": ids[: before - 1], "text_token_ids": ids[before - 1 :]}, params)
    assert mixed.outputs[0].token_ids == alone[1].outputs[0].token_ids
    assert mixed.metrics.num_cached_tokens > before  # found as what it is
    check_leaks(llm)


def test_an_answer_of_placeholders_survives_preemption(plain, make_llm, spelled):
    drawn = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, allowed_token_ids=sorted(set(spelled)))
    prompts = [PROMPTS["one image"], mixed_prompt((61, 23), seed=5), PROMPTS["text"]]
    roomy = make_llm(plain).generate(prompts, drawn)
    image = plain.oracle.config.image_token_id
    assert any(image in output.outputs[0].token_ids for output in roomy)
    longest = max(len(output.prompt_token_ids) for output in roomy) + drawn.max_tokens
    llm = make_llm(plain, block_size=4, num_blocks=longest // 4 + 3)
    tight = llm.generate(prompts, drawn)
    assert sum(output.metrics.num_preemptions for output in tight) > 0
    assert [each.outputs[0].token_ids for each in tight] == [each.outputs[0].token_ids for each in roomy]
    check_leaks(llm)
    # And fed back, they lead to the same next token.
    answer = roomy[0].outputs[0].token_ids
    next_token = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, allowed_token_ids=sorted(set(spelled)))
    [again] = llm.generate(with_answer(prompts[0], answer[:-1]), next_token)
    assert again.outputs[0].token_ids == answer[-1:]
