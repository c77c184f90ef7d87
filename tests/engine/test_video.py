"""Videos through the engine: transformers' answers, under every way of cutting, sharing and batching."""

import numpy as np
import pytest

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs.tokenizer import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from tests.engine.conftest import PROMPTS, check_leaks, picture
from tests.engine.test_greedy import oracle_tokens, tokens

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def clip(frames: int, width: int, height: int, seed: int = 0) -> tuple[np.ndarray, dict]:
    """Noise, and how many frames a second it has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return pixels, {"fps": 1.5}


VIDEOS = {
    "one video": {"prompt": f"In {VIDEO_PLACEHOLDER} we see", "multi_modal_data": {"video": clip(7, 40, 24)}},
    "two videos and an image": {
        "prompt": f"{VIDEO_PLACEHOLDER}or{IMAGE_PLACEHOLDER}or {VIDEO_PLACEHOLDER}: which",
        "multi_modal_data": {"video": [clip(2, 24, 61, 1), clip(5, 40, 20, 2)], "image": picture(40, 30)},
    },
}
MIXED = [VIDEOS["one video"], PROMPTS["text"], VIDEOS["two videos and an image"], PROMPTS["one image"]]


@pytest.fixture(scope="module")
def expected(plain, make_llm):
    processor = make_llm(plain).processor
    return [oracle_tokens(plain, processor.prompt(prompt)) for prompt in MIXED]


@pytest.fixture
def encoded(make_llm, plain, monkeypatch):
    """The grids of each call of the vision tower."""
    model, calls = make_llm(plain).engine.model, []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels, grids: calls.append(grids) or encode(pixels, grids))
    return calls


@pytest.mark.parametrize("case", list(VIDEOS))
def test_tokens_equal_transformers(tiny, make_llm, case):
    llm = make_llm(tiny)
    (output,) = llm.generate(VIDEOS[case], GREEDY)
    expected = oracle_tokens(tiny, llm.processor.prompt(VIDEOS[case]))
    assert len(set(expected)) > 8, "an answer of few different tokens would prove little"
    assert output.outputs[0].token_ids == expected
    check_leaks(llm)


@pytest.mark.parametrize("chunk", [1, 3, 16, 8192])
def test_a_batch_with_text_and_images_in_chunks_of_any_size(plain, make_llm, expected, encoded, chunk):
    """Boundaries fall inside frames, and between those of one video."""
    llm = make_llm(plain, max_prefill_tokens=chunk)
    assert tokens(llm.generate(MIXED, GREEDY)) == expected
    assert sum(map(len, encoded)) == 4 + 1 + 3 + 1 + 1, "each pair of frames once"
    check_leaks(llm)


@pytest.mark.parametrize("budget", [1, 20, 44])
def test_the_encoders_budget_bounds_a_long_video(plain, make_llm, expected, encoded, budget):
    llm = make_llm(plain, max_encoder_tokens=budget)
    assert tokens(llm.generate(MIXED, GREEDY)) == expected
    square = llm.processor.config.vision.merge_size**2
    for grids in encoded:
        assert sum(t * h * w for t, h, w in grids) // square <= budget or len(grids) == 1
    check_leaks(llm)


def test_questions_about_one_video_encode_it_once(plain, make_llm, encoded):
    pixels, beside = clip(6, 40, 24)
    prompts = [
        {"prompt": f"{VIDEO_PLACEHOLDER}{question}", "multi_modal_data": {"video": (pixels, beside)}}
        for question in ("What is it?", "How many?")
    ]
    expected = [tokens(make_llm(plain, enable_prefix_caching=False).generate(prompt, GREEDY))[0] for prompt in prompts]
    encoded.clear()
    llm = make_llm(plain, block_size=2)
    assert [tokens(llm.generate(prompt, GREEDY))[0] for prompt in prompts] == expected
    assert sum(map(len, encoded)) == 3
    # Another ending shares what is before it, and no more: the pair that changes is not the same.
    changed = pixels.copy()
    changed[-1] ^= 255
    llm.generate({"prompt": prompts[0]["prompt"], "multi_modal_data": {"video": (changed, beside)}}, GREEDY)
    assert sum(map(len, encoded)) == 4
    # The same frames at other times are other tokens from the first time on.
    (output,) = llm.generate({**prompts[0], "multi_modal_data": {"video": (pixels, {"fps": 30})}}, GREEDY)
    assert output.num_cached_tokens < 20


def test_a_video_that_the_cache_cannot_hold_is_refused_in_numbers(plain, make_llm):
    llm = make_llm(plain, num_blocks=4, block_size=16)
    with pytest.raises(PromptError, match=r"of images and frames\), which leaves no room for an answer"):
        llm.generate(VIDEOS["one video"], GREEDY)
    check_leaks(llm)
