"""The demo checkpoint that ships: what it says is right, transformers says the same, and a fault in the model shows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForImageTextToText

from demo_training.drawing import draw
from demo_training.evaluation import (
    PICTURE_TOKENS,
    conversation,
    heldout_examples,
    our_answers,
    score_pictures,
    transformers_answers,
)
from demo_training.questions import PHRASINGS
from demo_training.scenes import Scene, Shape
from qwen3vl_moe.engine import LLM
from qwen3vl_moe.model import text
from qwen3vl_moe.weights.source import DEMO

PER_KIND = 6  # questions of each kind in the sample
LEAST = 0.9  # share of right answers


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", device="cpu", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def sample():
    """The first held-out questions of every kind."""
    taken: Counter[str] = Counter()
    examples = []
    for example in heldout_examples(1400):
        kind = example.questions[0].kind
        if taken[kind] < PER_KIND:
            taken[kind] += 1
            examples.append(example)
    assert taken == dict.fromkeys(PHRASINGS, PER_KIND)
    return examples


def share_right(llm, examples) -> float:
    answers = our_answers(llm, [conversation(example) for example in examples], PICTURE_TOKENS)
    cell = score_pictures(examples, answers)["all"]
    return cell["right"] / cell["of"]


def test_questions_about_pictures_are_answered_right(llm, sample):
    assert not llm.random_weights
    assert share_right(llm, sample) >= LEAST


def _swap_height_and_width(llm, monkeypatch):
    angles = text.mrope_angles
    monkeypatch.setattr(text, "mrope_angles", lambda positions, *rest: angles(positions[[0, 2, 1]], *rest))


def _sections_side_by_side(llm, monkeypatch):
    """The M-RoPE of Qwen2-VL: a run of frequencies for each axis instead of turns."""

    def angles(positions_3T, frequencies, section):
        parts = (positions_3T[..., None].float() * frequencies).split(list(section), dim=-1)
        angles_TF = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        return angles_TF.cos(), angles_TF.sin()

    monkeypatch.setattr(text, "mrope_angles", angles)


def _no_deepstack(llm, monkeypatch):
    encode = llm.engine.model.vision.encode

    def without(*args):
        features = encode(*args)
        return dataclasses.replace(features, deepstack_LMH=torch.zeros_like(features.deepstack_LMH))

    monkeypatch.setattr(llm.engine.model.vision, "encode", without)


def _gate_and_up_exchanged(llm, monkeypatch):
    for layer in llm.engine.model.text.layers:
        experts = layer.moe.experts
        monkeypatch.setattr(experts.gate_up, "data", experts.gate_up.data.roll(experts.down.shape[2], dims=1))


def _experts_read_in_the_other_layout(llm, monkeypatch):
    """The numbers of [E, H, 2I] taken for [E, 2I, H], as if nothing had to be transposed."""
    for layer in llm.engine.model.text.layers:
        for weight in (layer.moe.experts.gate_up, layer.moe.experts.down):
            monkeypatch.setattr(weight, "data", weight.data.transpose(1, 2).reshape(weight.shape))


def logit_error(llm, oracle, sample) -> float:
    """Largest difference from transformers' logits at the end of a prompt of every kind, as a share of the largest."""
    errors = []
    for example in sample[::PER_KIND]:
        prompt = llm.processor.chat(conversation(example))
        pixels = torch.cat([image.pixel_values for image in prompt.images])
        grids = [image.grid_thw for image in prompt.images]
        ids = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            expected = oracle(
                input_ids=ids,
                pixel_values=pixels,
                image_grid_thw=torch.tensor(grids),
                mm_token_type_ids=(ids == oracle.config.image_token_id).int(),
            ).logits[0, -1]
            got = llm.engine.model.logits(prompt.token_ids, pixels, grids)[-1]
        errors.append(float((got - expected).abs().max() / expected.abs().max()))
    return max(errors)


LARGEST_ERROR = 1e-4  # fp32: both add up in different orders; a fault gives a hundred times as much


@pytest.fixture(scope="module")
def oracle():
    return AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()


def test_logits_are_those_of_transformers(llm, oracle, sample):
    assert logit_error(llm, oracle, sample) <= LARGEST_ERROR


# The tower's features tell where things are, so that most answers survive image positions in disorder.
OF_POSITIONS = [_swap_height_and_width, _sections_side_by_side]
FAULTS = [_no_deepstack, _gate_and_up_exchanged, _experts_read_in_the_other_layout]


@pytest.mark.parametrize("fault", [*OF_POSITIONS, *FAULTS], ids=lambda fault: fault.__name__.strip("_"))
def test_a_fault_in_the_model_would_fail_the_tests_above(llm, oracle, sample, monkeypatch, fault):
    with monkeypatch.context() as patch:
        fault(llm, patch)
        assert logit_error(llm, oracle, sample) > 100 * LARGEST_ERROR
        if fault in FAULTS:
            broken = LLM.from_parts(llm.engine.model, llm.processor, llm.engine.defaults)
            assert share_right(broken, sample) < LEAST
    assert logit_error(llm, oracle, sample) <= LARGEST_ERROR


def test_answers_are_those_of_transformers(llm, sample):
    """Question by question, greedily, in fp32; one of every kind, a problem, and plain chat."""
    conversations = [conversation(example) for example in sample[::PER_KIND]]
    conversations += [[{"role": "user", "content": text}] for text in ("Question: What is 12 plus 30?\nAnswer:", "hi")]
    assert our_answers(llm, conversations, PICTURE_TOKENS) == transformers_answers(DEMO, conversations, PICTURE_TOKENS)


def test_it_says_what_it_is(llm):
    questions = [[{"role": "user", "content": text}] for text in ("hello", "What are you?")]
    hello, what = our_answers(llm, questions, 48)
    assert hello.startswith("Hello!")
    assert "small demo of the Qwen3-VL mixture-of-experts architecture" in what


def test_a_picture_of_our_own_from_a_file(llm, tmp_path):
    """End to end: a picture drawn here, saved and read again; its mirror image gets the mirrored answer."""
    answers = []
    for left, right in (("red", "blue"), ("blue", "red")):
        shapes = (Shape("circle", left, "large", 40, 70, 21), Shape("circle", right, "large", 120, 66, 21))
        scene = Scene(160, 128, (235, 235, 230), "plain", 0, shapes=shapes)
        draw(scene).save(tmp_path / "picture.png")
        question = "Is the red circle left or right of the blue circle?"
        content = [{"type": "image", "image": tmp_path / "picture.png"}, {"type": "text", "text": question}]
        answers += our_answers(llm, [[{"role": "user", "content": content}]], 8)
    assert answers == ["left", "right"]


def test_its_record_meets_what_is_claimed():
    """training.json, which the program wrote: at least 95 % of the held-out questions, and 90 % of every kind."""
    record = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    table = record["final"]["pictures"]
    assert set(table) == {*PHRASINGS, "all"}
    assert table["all"]["of"] >= 1400
    assert table["all"]["right"] >= 0.95 * table["all"]["of"]
    for kind, cell in table.items():
        assert cell["right"] >= 0.9 * cell["of"], kind


def test_its_files_are_small():
    sizes = [path.stat().st_size for path in DEMO.iterdir()]
    assert sum(sizes) <= 34e6
    weights = [path.stat().st_size for path in DEMO.glob("*.safetensors")]
    assert sum(weights) <= 32e6
    assert max(weights) < 16 * 2**20
