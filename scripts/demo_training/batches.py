"""Conversations -> padded batches, made by worker processes ahead of the device.

All pictures of a batch have one grid and each row the same number of them, so that attention in the vision tower is
one batched call. Rows are padded on the right: under a causal mask no real token sees the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from demo_training.drawing import draw
from demo_training.questions import Example, make_example
from demo_training.scenes import SIZES, Scene
from demo_training.texts import Problem, few_shot_messages, text_messages
from qwen3vl_moe.model.rope import mrope_positions
from qwen3vl_moe.processor import IMAGE_PAD, VISION_END, VISION_START

IGNORE = -100  # label of a token that is not learned
PATCH, MERGE, FRAMES = 16, 2, 2
TURNS = 5  # most questions about one picture: drawing it costs more than asking
FEW_SHOT_EVERY = 12  # one text batch in so many holds few-shot prompts, which are several times as long
LONGEST_ROW = 2048
# Steps over which batches of easy pictures give way to all the others. Where there is one shape, an answer needs no
# search for the thing it is about: colours and shapes are learned there at once, and among many hardly ever.
EASY_STEPS = 1000


class Movable:
    """A dataclass of tensors, some of which may be None."""

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(None if t is None else t.to(device, non_blocking=True) for t in vars(self).values()))

    def pin_memory(self) -> Self:
        return type(self)(*(None if t is None else t.pin_memory() for t in vars(self).values()))


@dataclass
class Batch(Movable):
    """B rows of T tokens, and the pictures of all rows in order.

    Attributes:
        ids_BT, labels_BT: int64; labels are not shifted, IGNORE where nothing is learned.
        valid_BT: bool, False on padding.
        positions_3BT: int64 M-RoPE positions.
        pixels: uint8 [pictures, height, width, 3], or None.
    """

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    valid_BT: torch.Tensor
    positions_3BT: torch.Tensor
    pixels: torch.Tensor | None


@dataclass
class Row:
    ids: list[int]
    labels: list[int]


class Encoder:
    """Conversations of a tokenizer as rows with labels: the answers and the token that ends each."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        self.image = tokenizer.token_to_id(IMAGE_PAD)
        self._ids = lru_cache(100_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))

    def row(self, messages: Sequence[dict], image_tokens: int = 0) -> Row:
        """The chat template, applied piece by piece so that it is known what is an answer.

        Args:
            messages: contents are text; a picture stands in it as its placeholder.
            image_tokens: tokens that each placeholder becomes.
        """
        ids: list[int] = []
        labels: list[int] = []

        def add(text: str, learned: bool = False) -> None:
            new = [t for i in self._ids(text) for t in ([i] * image_tokens if i == self.image else [i])]
            ids.extend(new)
            labels.extend(new if learned else [IGNORE] * len(new))

        for message in messages:
            if message["role"] == "assistant":
                add("<|im_start|>assistant\n")
                add(message["content"] + "<|im_end|>", learned=True)
                add("\n")
            else:
                add(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n")
        return Row(ids, labels)


def example_messages(example: Example) -> list[dict]:
    """Pictures first, then one question a turn."""
    pictures = (VISION_START + IMAGE_PAD + VISION_END) * len(example.scenes)
    messages = []
    for number, question in enumerate(example.questions):
        messages += [
            {"role": "user", "content": (pictures if number == 0 else "") + question.text},
            {"role": "assistant", "content": question.answer},
        ]
    return messages


def pixels_of(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """The drawn picture, resized (as processors do) to ``size`` if it differs: uint8 [height, width, 3]."""
    picture = draw(scene)
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))


def collate(rows: Sequence[Row], encoder: Encoder, pixels: list[np.ndarray] | None = None) -> Batch:
    """Pad ``rows`` to one length; ``pixels`` are those of all rows, of one size."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), encoder.pad)
    labels = torch.full((len(rows), length), IGNORE)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    positions = torch.zeros(3, len(rows), length, dtype=torch.int64)
    per_row = len(pixels) // len(rows) if pixels else 0
    grid = (1, pixels[0].shape[0] // PATCH, pixels[0].shape[1] // PATCH) if pixels else (0, 0, 0)
    for number, row in enumerate(rows):
        n = len(row.ids)
        ids[number, :n] = torch.tensor(row.ids)
        labels[number, :n] = torch.tensor(row.labels)
        valid[number, :n] = True
        positions[:, number, :n] = mrope_positions(row.ids, [grid] * per_row, MERGE, encoder.image)[0]
    return Batch(ids, labels, valid, positions, torch.from_numpy(np.stack(pixels)) if pixels else None)


class TrainingBatches(Dataset):
    """Item ``step`` holds the batches of that step, two of pictures and one of text, the same on every call.

    Args:
        tokenizer_path: tokenizer.json.
        problems: gsm8k's training problems; generated ones stand in where there are none.
        tokens: of the picture batches, padding included, about.
        text_tokens: of the text batch, padding included, at most (one row at least).
        steps: length of the data set.
    """

    def __init__(
        self, tokenizer_path: str, problems: Sequence[Problem], *, tokens: int, text_tokens: int, steps: int, seed: int
    ):
        self._path, self._problems = tokenizer_path, list(problems)
        self._tokens, self._text_tokens, self._steps, self._seed = tokens, text_tokens, steps, seed
        self._encoder: Encoder | None = None

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[Batch, Batch, Batch]:
        if not 0 <= step < self._steps:
            raise IndexError(step)
        return *self.pictures(step), self.text(step)

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:  # a worker opens its own: tokenizers do not fork well
            from tokenizers import Tokenizer

            self._encoder = Encoder(Tokenizer.from_file(self._path))
        return self._encoder

    def pictures(self, step: int) -> tuple[Batch, Batch]:
        """Rows of pictures in two batches, the shorter rows and the longer ones: two fifths of one would be padding."""
        rng = Random(f"pictures/{self._seed}/{step}")
        size = rng.choice(SIZES)
        easy = rng.random() > step / EASY_STEPS
        images = 2 if rng.random() < 0.2 and not easy else 1
        image_tokens = size[0] * size[1] // (PATCH * MERGE) ** 2
        count = max(2, self._tokens // (images * image_tokens + 85))
        rows = []
        for number in range(count):
            example = make_example(
                "train",
                self._seed,
                step * 4096 + number,
                size=size,
                images=images,
                turns=rng.randint(TURNS - 2, TURNS),
                easy=easy,
            )
            row = self.encoder.row(example_messages(example), image_tokens)
            rows.append((row, [pixels_of(scene, size) for scene in example.scenes]))
        rows.sort(key=lambda row: len(row[0].ids))
        lengths = [len(row.ids) for row, _ in rows]
        cut = min(range(1, count), key=lambda n: n * lengths[n - 1] + (count - n) * lengths[-1])
        return tuple(
            collate([row for row, _ in part], self.encoder, [picture for _, pictures in part for picture in pictures])
            for part in (rows[:cut], rows[cut:])
        )

    def text(self, step: int) -> Batch:
        """Rows of similar length: a slice of a sorted pool, as many as the budget holds."""
        rng = Random(f"text/{self._seed}/{step}")
        few_shot = step % FEW_SHOT_EVERY == FEW_SHOT_EVERY - 1
        make, length = (few_shot_messages, 1024) if few_shot else (text_messages, 200)
        pool = [self.encoder.row(make(rng, self._problems)) for _ in range(4 * max(1, self._text_tokens // length))]
        pool = sorted((row for row in pool if len(row.ids) <= LONGEST_ROW), key=lambda row: len(row.ids))
        first = rng.randrange(len(pool))
        last = first
        while last + 1 < len(pool) and (last + 2 - first) * len(pool[last + 1].ids) <= self._text_tokens:
            last += 1
        while first > 0 and (last - first + 2) * len(pool[last].ids) <= self._text_tokens:
            first -= 1
        return collate(pool[first : last + 1], self.encoder)
