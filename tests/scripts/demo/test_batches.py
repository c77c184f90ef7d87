"""Rows, labels, patches and positions: equal to what the processor and transformers make of the same conversation."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict
from itertools import pairwise
from random import Random

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from demo_training.asking import make_wide_example
from demo_training.batches import Budget, TrainingBatches, collate, example_messages
from demo_training.evaluation import conversation
from demo_training.forward import balance_of, losses_of
from demo_training.pictures import FRAMES, IGNORE, pack_pictures, patches_of, pixels_of
from demo_training.questions import make_example
from demo_training.rendering import render
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.inputs.processor import Processor

SIZE = (160, 128)
BUDGET = Budget(1200, 1200)


@pytest.fixture(scope="module")
def data(untrained):
    path = str(untrained[0] / "tokenizer.json")
    return TrainingBatches(path, None, budget=BUDGET, steps=4000, seed=0)


@pytest.fixture(scope="module")
def processor(untrained):
    return Processor.from_pretrained(untrained[0], Qwen3VLMoeConfig.from_pretrained(untrained[0]))


def normalised(patches_P: torch.Tensor) -> torch.Tensor:
    """What image processors make of patches, [P, channels * frames * rows * columns]."""
    x = (patches_P.float() / 127.5 - 1).permute(0, 3, 1, 2)[:, :, None]
    return x.expand(-1, -1, FRAMES, -1, -1).flatten(1)


def test_workers_read_the_problems_for_themselves(untrained, tmp_path):
    """Whose start would wait for each other, were there more to pickle for each than a pipe holds (64 KiB)."""
    problems = [{"question": f"What is {n} + 1? " + "Think. " * 200, "answer": f"#### {n + 1}"} for n in range(100)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, problems)))
    data = TrainingBatches(str(untrained[0] / "tokenizer.json"), path, budget=BUDGET, steps=10, seed=0)
    pickled = pickle.dumps(data)
    assert len(pickled) < 16_384
    assert [asdict(problem) for problem in pickle.loads(pickled).problems] == problems


def test_rows_and_patches_are_those_of_the_processor(data, processor):
    for number in range(12):
        example = make_example("train", 0, number, size=SIZE, images=1 + number % 2)
        prompt = processor.chat(conversation(example))
        row = data.encoder.row(example_messages(example), example.scenes, SIZE)
        batch = collate([row], data.encoder, BUDGET)
        n = len(prompt.token_ids)
        assert row.ids[:n] == prompt.token_ids
        assert torch.equal(batch.positions_3N[:, :n], prompt.positions_3T)
        theirs = torch.cat([image.pixel_values for image in prompt.images])
        patches = normalised(batch.pictures.pixels_P[: len(theirs)])
        torch.testing.assert_close(patches, theirs, rtol=0, atol=1e-6)
        assert batch.pictures.starts[len(example.scenes)] == len(theirs)
        learned = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORE]
        assert processor.tokenizer.decode(learned) == example.questions[0].answer + "<|im_end|>"
        assert row.labels[:n] == [IGNORE] * n


def test_rows_of_the_wide_set_are_those_of_the_processor(data, processor):
    """Two pictures of different sizes, by whatever renderer."""
    done = 0
    for number in range(200):
        example = make_wide_example(0, number, size=SIZE, images=2)
        sizes = [(view.width, view.height) for view in example.scenes]
        if len(set(sizes)) == 1 or sizes != [view.size for view in example.scenes]:
            continue  # of one size, or resized: to multiples of 32 that the processor may round otherwise
        pictures = [{"type": "image", "image": render(view)} for view in example.scenes]
        content = [*pictures, {"type": "text", "text": example.questions[0].text}]
        prompt = processor.chat([{"role": "user", "content": content}])
        row = data.encoder.row(example_messages(example), example.scenes)
        n = len(prompt.token_ids)
        assert row.ids[:n] == prompt.token_ids
        batch = collate([row], data.encoder, BUDGET)
        assert torch.equal(batch.positions_3N[:, :n], prompt.positions_3T)
        theirs = torch.cat([image.pixel_values for image in prompt.images])
        patches = normalised(batch.pictures.pixels_P[: len(theirs)])
        torch.testing.assert_close(patches, theirs, rtol=0, atol=1e-6)
        done += 1
    assert done > 10


def test_what_is_read_is_learned_letter_by_letter(data):
    messages = [
        {"role": "user", "content": "What word is written?"},
        {"role": "assistant", "content": "there", "spelled": True},
    ]
    row = data.encoder.row(messages)
    learned = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORE]
    assert len(learned) == 6  # five letters and the end
    assert data.encoder._tokenizer.decode(learned) == "there"


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


def test_batches_are_reproducible_and_of_one_shape(data):
    shapes = [tensor.shape for tensor in data[0].flat()]
    for step in (0, 1, 3000):
        batch = data[step]
        for tensor, again, shape in zip(batch.flat(), data[step].flat(), shapes, strict=True):
            assert torch.equal(tensor, again)
            assert tensor.shape == shape
        assert 0.5 * len(batch.ids_N) < batch.valid_N.sum() < len(batch.ids_N)
        assert batch.starts[-1] == len(batch.ids_N)
        assert batch.pictures.starts[-1] == len(batch.pictures.pixels_P)
        assert batch.starts.diff().min() >= 0
        assert batch.valid_N[batch.learned_L[batch.targets_L != IGNORE]].all()
        for of_text in (False, True):
            torch.testing.assert_close(batch.weight_L[batch.text_L == of_text].sum(), torch.tensor(1.0))


def test_easy_pictures_give_way(data):
    def scenes(step):
        return [scene for row in data.picture_rows(step) for scene, _ in row.scenes]

    assert all(1 <= len(scene.shapes) <= 3 or len(scene.text) == 1 for scene in scenes(0))
    assert any(len(scene.text) > 1 for step in range(3000, 3005) for scene in scenes(step))


def test_learned_positions_are_moved_about_within_a_picture(data):
    """Those of a share of the pictures, to other patches of the same picture: nothing else changes."""
    scenes = [scene for row in data.picture_rows(3000) for scene in row.scenes]
    plain = pack_pictures(scenes, 2000)
    moved = pack_pictures(scenes, 2000, Random(0), 1.0)
    for name in ("pixels_P", "positions_P2", "starts", "targets_6S"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    changed = 0
    for start, end in pairwise(plain.starts[: len(scenes) + 1].tolist()):
        theirs, ours = (
            sorted(map(tuple, torch.cat([p.index_P4[start:end], p.weight_P4[start:end]], 1).tolist()))
            for p in (plain, moved)
        )
        assert theirs == ours
        changed += not torch.equal(plain.index_P4[start:end], moved.index_P4[start:end])
    assert changed > 0.8 * len(scenes)


def test_pictures_that_do_not_fit_are_an_error(data):
    scenes = [scene for row in data.picture_rows(0) for scene in row.scenes]
    with pytest.raises(ValueError, match="more than 64"):
        pack_pictures(scenes, 64)


def test_losses_and_gradients_are_those_of_transformers(untrained, data):
    """Row by row through transformers' own forward pass; the packed one has rows of all kinds, and padding.

    In float64: of the positions' gradients, sums over all patches, transformers' own float32 is off by 1.3e-4.
    """
    step = 2996  # one in which no router is so near a tie that float32 decides otherwise
    rows = [*data.picture_rows(step), *data.text_rows(step)]
    batch = collate(rows, data.encoder, BUDGET)  # learned positions where transformers has them
    assert (batch.pictures.starts.diff() > 0).sum() > 3
    ours = copy.deepcopy(untrained[1]).requires_grad_()
    losses = losses_of(ours, batch)
    (losses.pictures + losses.text).backward()
    theirs = AutoModelForImageTextToText.from_pretrained(untrained[0], dtype=torch.float64).eval()
    theirs.set_experts_implementation("eager")  # the default one has no float64
    image_token = theirs.config.image_token_id
    picture, totals, loads = 0, [0.0, 0.0], 0
    for start, end in pairwise(batch.starts.tolist()):
        if end == start or not batch.valid_N[start]:
            continue
        ids = batch.ids_N[None, start:end]
        mine = (batch.learned_L >= start) & (batch.learned_L < end) & (batch.targets_L != IGNORE)
        extra, sizes = {}, []
        left = int((ids == image_token).sum()) * 4
        first = int(batch.pictures.starts[picture])
        while left:
            part = slice(*batch.pictures.starts[picture : picture + 2].tolist())
            sizes.append([1, *(batch.pictures.positions_P2[part].amax(0) + 1).tolist()])
            left -= part.stop - part.start
            picture += 1
        if sizes:
            patches = normalised(batch.pictures.pixels_P[first : int(batch.pictures.starts[picture])])
            extra = {"pixel_values": patches.double(), "image_grid_thw": torch.tensor(sizes)}
        out = theirs(input_ids=ids, mm_token_type_ids=(ids == image_token).int(), output_router_logits=True, **extra)
        logits = out.logits[0, batch.learned_L[mine] - start]
        loss = (batch.weight_L[mine] * F.cross_entropy(logits, batch.targets_L[mine], reduction="none")).sum()
        loss.backward()
        totals[int(batch.text_L[mine][0])] += loss.item()
        loads += torch.stack([F.one_hot(logits.topk(4).indices, 16).sum((0, 1)) for logits in out.router_logits])
    assert losses.pictures.item() == pytest.approx(totals[0], rel=1e-5)
    assert losses.text.item() == pytest.approx(totals[1], rel=1e-5)
    torch.testing.assert_close(losses.load_LE, loads / loads.sum(1, keepdim=True), rtol=0, atol=1e-6)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        close = 1e-4 * other.grad.abs().max().item()
        torch.testing.assert_close(
            one.grad.double(), other.grad, rtol=0, atol=close, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_balance_is_one_if_even_and_ignores_padding():
    even = torch.eye(4).repeat(2, 1) * 0.01
    valid = torch.ones(8, dtype=torch.bool)

    def balance(logits: torch.Tensor) -> float:
        return balance_of(logits.softmax(-1), logits.topk(1).indices, valid)[0].item()

    assert balance(even) == pytest.approx(1.0, abs=1e-3)
    lopsided = torch.tensor([[9.0, 0, 0, 0]]).repeat(8, 1)
    assert balance(lopsided) == pytest.approx(4.0, rel=0.01)
    valid[4:] = False
    assert balance(torch.cat([even[:4], lopsided[:4]])) == pytest.approx(1.0, abs=1e-3)


def test_pictures_that_are_off_size_are_resized_like_the_processor_does(processor):
    examples = (make_example("train", 2, n, size=SIZE, images=1) for n in range(60))
    example = next(e for e in examples if (e.scenes[0].width, e.scenes[0].height) != SIZE)
    (image,) = processor.chat(conversation(example)).images
    pixels = pixels_of(example.scenes[0], SIZE)
    assert image.grid_thw == (1, pixels.shape[0] // 16, pixels.shape[1] // 16)
    torch.testing.assert_close(normalised(patches_of(pixels)), image.pixel_values, rtol=0, atol=1e-6)
