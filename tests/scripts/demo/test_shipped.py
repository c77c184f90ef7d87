"""The demo checkpoint that ships: what it says is right, transformers says the same, and a fault in the model shows."""

from __future__ import annotations

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
    new_conversation,
    new_heldout,
    our_answers,
    score_new,
    score_pictures,
    transformers_answers,
)
from demo_training.faults import (
    FAULTS,
    experts_in_the_other_layout,
    gate_and_up_exchanged,
    measure,
    no_deepstack,
    not_renormalised,
)
from demo_training.heldout_phrases import KINDS, OF_POSITIONS
from demo_training.questions import PHRASINGS
from demo_training.scenes import Scene, Shape
from qwen3vl_moe.engine import LLM
from qwen3vl_moe.weights.source import DEMO

PER_KIND = 6  # questions of each kind in the sample
LEAST = 0.9  # share of right answers
SPOIL = (no_deepstack, gate_and_up_exchanged, experts_in_the_other_layout)  # are to spoil a tenth of the old ones too


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


# What the checkpoint has not learned yet; a test below fails once one has.
NOT_LEARNED = pytest.mark.xfail(strict=True, raises=AssertionError, reason="not learned yet: docs/demo.md")
WEAK_KINDS = ("along a line", "beside in one of two", "word")


def marked(values, is_weak):
    return [pytest.param(value, marks=NOT_LEARNED) if is_weak(value) else value for value in values]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_the_model_shows_in_its_logits(llm, oracle, sample, fault):
    with fault.plant(llm):
        assert logit_error(llm, oracle, sample) > 100 * LARGEST_ERROR
    assert logit_error(llm, oracle, sample) <= LARGEST_ERROR


@pytest.mark.parametrize("plant", marked(SPOIL, lambda plant: plant is no_deepstack), ids=lambda plant: plant.__name__)
def test_a_fault_in_the_model_would_fail_the_questions_above(llm, sample, plant):
    with plant(llm):
        broken = LLM.from_parts(llm.engine.model, llm.processor, llm.engine.defaults)
        assert share_right(broken, sample) < LEAST


RECORD = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def counted(llm):
    """Answers that each fault changes: two questions of a kind, four where it needs positions; of one fault, eight."""
    asked = new_heldout(8 * len(KINDS))
    few = [each for number, each in enumerate(asked) if number < (4 if each.kind in OF_POSITIONS else 2) * len(KINDS)]
    table = measure(llm, few, [fault for fault in FAULTS if fault.plant is not not_renormalised])
    # It changes 6.3 % where 5 % are wanted: of few answers one more or less would decide.
    table |= measure(llm, asked, [fault for fault in FAULTS if fault.plant is not_renormalised])
    assert min(cell["of"] for cell in table.values()) >= 30
    return table


@pytest.mark.parametrize(
    "fault", marked(FAULTS, lambda fault: fault.plant is no_deepstack), ids=lambda fault: fault.name
)
def test_a_fault_changes_answers(counted, fault):
    """Each more than its bound; those of positions on the kinds of questions that need them."""
    cell = counted[fault.name]
    assert cell["changed"] > fault.least * cell["of"]


def test_questions_of_the_new_set_are_answered_right(llm):
    asked = new_heldout(4 * len(KINDS))
    answers = our_answers(llm, [new_conversation(each) for each in asked], PICTURE_TOKENS)
    cell = score_new(asked, answers)["all"]
    assert cell["right"] >= LEAST * cell["of"]


def test_its_record_meets_what_is_claimed_of_the_new_set():
    table = RECORD["final"]["new"]
    assert set(table) == {*KINDS, "all"}
    assert table["all"]["of"] >= 1000
    assert table["all"]["right"] >= 0.95 * table["all"]["of"]


@pytest.mark.parametrize("kind", marked(KINDS, lambda kind: kind in WEAK_KINDS))
def test_its_record_meets_what_is_claimed_of_each_kind_of_the_new_set(kind):
    cell = RECORD["final"]["new"][kind]
    assert cell["right"] >= 0.9 * cell["of"]


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
    table = RECORD["final"]["pictures"]
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
