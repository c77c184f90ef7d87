"""Rows, labels, patches and positions: equal to what the processor and transformers make of the same conversation."""

from __future__ import annotations

import pytest
import torch
from demo_training.batches import IGNORE, TrainingBatches, collate, example_messages, pixels_of
from demo_training.evaluation import conversation
from demo_training.model import balance_of, losses_of, patches_of
from demo_training.questions import make_example
from transformers import AutoModelForImageTextToText

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.processor import Processor

SIZE = (160, 128)


@pytest.fixture(scope="module")
def data(untrained):
    path = str(untrained[0] / "tokenizer.json")
    return TrainingBatches(path, [], tokens=1200, text_tokens=1200, steps=40, seed=0)


@pytest.fixture(scope="module")
def processor(untrained):
    return Processor.from_pretrained(untrained[0], Qwen3VLMoeConfig.from_pretrained(untrained[0]))


def test_rows_and_patches_are_those_of_the_processor(data, processor):
    for number in range(12):
        example = make_example("train", 0, number, size=SIZE, images=1 + number % 2)
        prompt = processor.chat(conversation(example))
        pixels = [pixels_of(scene, SIZE) for scene in example.scenes]
        row = data.encoder.row(example_messages(example), 20)
        batch = collate([row], data.encoder, pixels)
        n = len(prompt.token_ids)
        assert row.ids[:n] == prompt.token_ids
        assert torch.equal(batch.positions_3BT[:, 0, :n], prompt.positions_3T)
        patches, grid = patches_of(batch.pixels, torch.float32)
        assert [tuple(g) for g in grid.tolist()] == [image.grid_thw for image in prompt.images]
        theirs = torch.cat([image.pixel_values for image in prompt.images])
        torch.testing.assert_close(patches, theirs, rtol=0, atol=1e-6)
        learned = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORE]
        assert processor.tokenizer.decode(learned) == example.questions[0].answer + "<|im_end|>"
        assert row.labels[:n] == [IGNORE] * n


def test_only_answers_are_learned_in_long_conversations(data, processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you."},
    ]
    row = data.encoder.row(messages)
    text = processor.apply_chat_template(messages, add_generation_prompt=False)
    assert processor.tokenizer.decode(row.ids) == text
    assert row.ids == processor.tokenizer(text, add_special_tokens=False).input_ids
    learned = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORE]
    assert processor.tokenizer.decode(learned) == "Hello!<|im_end|>See you.<|im_end|>"


def test_batches_are_reproducible_and_within_their_budget(data):
    for step in (0, 1, 11):  # the last has few-shot prompts
        *pictures, text = (part.ids_BT.numel() for part in data[step])
        assert sum(pictures) <= 1200 * 1.5
        assert text <= 1200 or len(data[step][2].ids_BT) == 1
        for first, second in zip(data[step], data[step], strict=True):
            for name, tensor in vars(first).items():
                assert tensor is None or torch.equal(tensor, getattr(second, name)), name
            assert (first.labels_BT != IGNORE).any()
            assert not (first.labels_BT != IGNORE)[~first.valid_BT].any()


def test_positions_and_losses_are_those_of_transformers(untrained, data):
    model = untrained[1]
    batch = data.pictures(3)[1]
    image = batch.ids_BT == model.config.image_token_id
    patches, grid = patches_of(batch.pixels, torch.float32)
    positions, _ = model.model.get_rope_index(
        batch.ids_BT, mm_token_type_ids=image.int(), image_grid_thw=grid, attention_mask=batch.valid_BT.long()
    )
    assert torch.equal(positions[:, batch.valid_BT], batch.positions_3BT[:, batch.valid_BT])

    ours = losses_of(model, batch)
    # Loaded anew: its vision tower is transformers' own, one picture after the other.
    theirs = AutoModelForImageTextToText.from_pretrained(untrained[0], dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = theirs(
            input_ids=batch.ids_BT,
            attention_mask=batch.valid_BT.long(),
            pixel_values=patches,
            image_grid_thw=grid,
            mm_token_type_ids=image.int(),
            labels=batch.labels_BT,
        )
    torch.testing.assert_close(ours.answers, theirs.loss, rtol=1e-4, atol=1e-5)
    assert ours.load_LE.shape == (3, 16)
    torch.testing.assert_close(ours.load_LE.sum(-1), torch.ones(3))


def test_balance_is_one_if_even_and_ignores_padding():
    even = torch.eye(4).repeat(2, 1) * 0.01
    valid = torch.ones(1, 8, dtype=torch.bool)
    assert balance_of([even], valid, 1)[0].item() == pytest.approx(1.0, abs=1e-3)
    lopsided = torch.tensor([[9.0, 0, 0, 0]]).repeat(8, 1)
    assert balance_of([lopsided], valid, 1)[0].item() == pytest.approx(4.0, rel=0.01)
    half = torch.cat([even[:4], lopsided[:4]])
    valid[0, 4:] = False
    assert balance_of([half], valid, 1)[0].item() == pytest.approx(1.0, abs=1e-3)


def test_pictures_that_are_off_size_are_resized_like_the_processor_does(processor):
    examples = (make_example("train", 2, n, size=SIZE, images=1) for n in range(60))
    example = next(e for e in examples if (e.scenes[0].width, e.scenes[0].height) != SIZE)
    (image,) = processor.chat(conversation(example)).images
    ours, grid = patches_of(torch.from_numpy(pixels_of(example.scenes[0], SIZE)[None].copy()), torch.float32)
    assert tuple(grid[0].tolist()) == image.grid_thw
    torch.testing.assert_close(ours, image.pixel_values, rtol=0, atol=1e-6)
