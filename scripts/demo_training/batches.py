"""Training batches: conversations as packed rows of tokens with labels, and the pictures that they are about.

Pictures cost more to draw than to ask about, so a row asks several questions of its pictures. Every step has the same
number of tokens and of patches, whatever is in it: what the budget leaves over is filled up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from demo_training.asking import make_wide_example, wide_size
from demo_training.mentions import Mention
from demo_training.pictures import IGNORE, MERGE, PATCH, Pictures, Tensors, pack_pictures
from demo_training.questions import Example, make_example
from demo_training.scenes import SIZES, Scene
from demo_training.texts import Problem, few_shot_messages, read_problems, text_messages
from demo_training.views import View
from qwen3vl_moe.inputs.tokenizer import IMAGE_PAD, VISION_END, VISION_START
from qwen3vl_moe.model.rope import mrope_positions

# Of what is trained on, in training.json: 1 had the scenes alone, drawn by Pillow; 2 has the wide set beside them, 3
# more pairs of grids that only a look at the right one tells apart, more words and paths.
DATA_VERSION = 3
TURNS = 5  # most questions about one picture: drawing it costs more than asking
FEW_SHOT = 1 / 60  # share of the text rows that are few-shot prompts, which are several times as long
LONGEST_ROW = 2048
SHORTEST_ROW = 32  # on average: bounds the number of rows
# Steps over which easy pictures give way to all the others. Where there is one shape, an answer needs no search for the
# thing it is about: colours and shapes are learned there at once, and among many hardly ever.
EASY_STEPS = 2000
WIDE = 0.65  # share of the rows of the wide set (asking.py); the others are of the first (questions.py)


@dataclass
class TrainingBatch(Tensors):
    """N packed tokens of several rows. The last token, at least, is padding, in a row of its own.

    Attributes:
        ids_N: int64.
        positions_3N: int64 M-RoPE positions.
        starts: int32, cumulative tokens of the rows, as many as there can be, plus one.
        valid_N: bool, False on padding.
        place_M: int64, the token that each image token is for; the last token for the padding's.
        learned_L: int64, tokens whose successor is learned (and padding: the last token).
        targets_L: int64, those successors, IGNORE for the padding.
        weight_L: fp32, one over the number of learned tokens of the same kind, zero for the padding.
        text_L: bool, whether it is in a row without pictures.
        naming_Q: int64, tokens of questions that end the name of a thing (and padding: the last token).
        named_4Q: int64, row and column of the image token in which that thing has its centre, and its row and column
            in a grid; IGNORE for the padding, and where there is no grid.
        pictures: of all rows, in order.
    """

    ids_N: Tensor
    positions_3N: Tensor
    starts: Tensor
    valid_N: Tensor
    place_M: Tensor
    learned_L: Tensor
    targets_L: Tensor
    weight_L: Tensor
    text_L: Tensor
    naming_Q: Tensor
    named_4Q: Tensor
    pictures: Pictures


@dataclass
class Row:
    """A conversation; labels are not shifted, IGNORE where nothing is learned. ``named``: tokens that end a name, and
    what they name."""

    ids: list[int]
    labels: list[int]
    scenes: list[tuple[Scene | View, tuple[int, int]]]
    named: list[tuple[int, Mention]] = field(default_factory=list)

    @property
    def learned(self) -> int:
        return sum(label != IGNORE for label in self.labels)


class Encoder:
    """Conversations of a tokenizer as rows with labels: the answers and the token that ends each."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        self.image = tokenizer.token_to_id(IMAGE_PAD)
        self._pieces = lru_cache(100_000)(self._encoded)

    def _encoded(self, text: str) -> tuple[tuple[int, int], ...]:
        """``(token, where it ends in the text)``."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(zip(encoded.ids, (end for _, end in encoded.offsets), strict=True))

    def row(
        self, messages: Sequence[dict], scenes: Sequence[Scene | View] = (), size: tuple[int, int] = SIZES[0]
    ) -> Row:
        """The chat template, applied piece by piece so that it is known what is an answer.

        Args:
            messages: contents are text; a picture stands in it as its placeholder.
            scenes: the pictures.
            size: of those that are scenes; views have their own.
        """
        sizes = [scene.size if isinstance(scene, View) else size for scene in scenes]
        image_tokens = iter([image_tokens_of(size) for size in sizes])
        ids: list[int] = []
        labels: list[int] = []

        named: list[tuple[int, Mention]] = []

        def add(text: str, learned: bool = False, spelled: bool = False, mentions: Sequence[Mention] = ()) -> None:
            ends = {mention.end_in(text): mention for mention in mentions}
            for piece in text if spelled else (text,):
                for token, end in self._pieces(piece):
                    count = next(image_tokens) if token == self.image else 1
                    ids.extend([token] * count)
                    labels.extend([token if learned else IGNORE] * count)
                    if end in ends and not spelled:
                        named.append((len(ids) - 1, ends.pop(end)))

        for message in messages:
            if message["role"] == "assistant":
                add("<|im_start|>assistant\n")
                add(message["content"], learned=True, spelled=message.get("spelled", False))
                add("<|im_end|>", learned=True)
                add("\n")
            else:
                text = f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                add(text, mentions=message.get("mentions", ()))
        return Row(ids, labels, list(zip(scenes, sizes, strict=True)), named)


def example_messages(example: Example) -> list[dict]:
    """Pictures first, then one question a turn."""
    pictures = (VISION_START + IMAGE_PAD + VISION_END) * len(example.scenes)
    messages = []
    for number, question in enumerate(example.questions):
        messages += [
            {
                "role": "user",
                "content": (pictures if number == 0 else "") + question.text,
                "mentions": question.mentions,
            },
            {"role": "assistant", "content": question.answer, "spelled": question.spelled},
        ]
    return messages


def image_tokens_of(size: tuple[int, int]) -> int:
    return size[0] * size[1] // (PATCH * MERGE) ** 2


@dataclass(frozen=True)
class Budget:
    """What a step holds: of pictures with their questions, and of text, in tokens."""

    tokens: int
    text_tokens: int

    @property
    def image_tokens(self) -> int:
        return self.tokens // 3

    @property
    def learned(self) -> int:
        return self.learned_of_pictures + self.text_tokens

    @property
    def learned_of_pictures(self) -> int:
        return self.tokens // 7  # answers are short: a tenth, on average

    @property
    def named(self) -> int:
        """Most names that are asked for; in longer batches the last ones are not."""
        return self.tokens // 24

    @property
    def rows(self) -> int:
        return (self.tokens + self.text_tokens) // SHORTEST_ROW + 2


def collate(
    rows: Sequence[Row], encoder: Encoder, budget: Budget, rng: Random | None = None, moved: float = 0.0
) -> TrainingBatch:
    """Pack ``rows``, which fit; ``rng`` and ``moved`` as of :func:`pack_pictures`."""
    total = budget.tokens + budget.text_tokens + 1
    ids = torch.full((total,), encoder.pad)
    positions = torch.zeros(3, total, dtype=torch.int64)
    starts = torch.full((budget.rows + 1,), total, dtype=torch.int32)
    starts[0] = 0
    valid = torch.zeros(total, dtype=torch.bool)
    learned = torch.full((budget.learned,), total - 1)
    targets = torch.full((budget.learned,), IGNORE)
    weight = torch.zeros(budget.learned)
    is_text = torch.zeros(budget.learned, dtype=torch.bool)
    counts = [sum(row.learned for row in rows if bool(row.scenes) == pictures) for pictures in (False, True)]
    naming = torch.full((budget.named,), total - 1)
    named = torch.full((4, budget.named), IGNORE)
    at = done = names = 0
    for number, row in enumerate(rows):
        n, labels = len(row.ids), torch.tensor(row.labels)
        ids[at : at + n] = torch.tensor(row.ids)
        valid[at : at + n] = True
        grids = [(1, size[1] // PATCH, size[0] // PATCH) for _, size in row.scenes]
        positions[:, at : at + n] = mrope_positions(row.ids, {encoder.image: grids}, MERGE)[0]
        before = (labels != IGNORE).nonzero().flatten() - 1  # a row starts with no answer
        part = slice(done, done + len(before))
        learned[part], targets[part] = at + before, labels[before + 1]
        weight[part], is_text[part] = 1 / counts[bool(row.scenes)], not row.scenes
        for token, mention in row.named[: budget.named - names]:
            columns, rows_of = (side // (PATCH * MERGE) for side in row.scenes[mention.picture][1])
            cell = mention.cell or (IGNORE, IGNORE)
            naming[names] = at + token
            named[:, names] = torch.tensor([int(mention.y * rows_of), int(mention.x * columns), *cell])
            names += 1
        at, done = at + n, done + len(before)
        starts[number + 1] = at
    for number in range(len(rows), budget.rows):
        starts[number + 1] = min(int(starts[number]) + LONGEST_ROW, total)
    place = torch.full((budget.image_tokens,), total - 1)
    images = (ids == encoder.image).nonzero().flatten()
    place[: len(images)] = images
    scenes = [scene for row in rows for scene in row.scenes]
    pictures = pack_pictures(scenes, budget.image_tokens * MERGE**2, rng, moved)
    return TrainingBatch(
        ids, positions, starts, valid, place, learned, targets, weight, is_text, naming, named, pictures
    )


class TrainingBatches(Dataset):
    """Item ``step`` is the batch of that step, the same on every call.

    Args:
        tokenizer_path: tokenizer.json.
        problems: gsm8k's train.jsonl; without it generated problems stand in. Each worker reads it for itself: what
            is pickled for a worker and longer than a pipe holds keeps the next worker from starting until this one has
            imported everything.
        budget: its size.
        steps: length of the data set.
        moved: share of the pictures with learned positions moved about.
    """

    def __init__(
        self,
        tokenizer_path: str,
        problems: Path | None,
        *,
        budget: Budget,
        steps: int,
        seed: int,
        moved: float = 0.0,
    ):
        self._path, self._problems_path, self._budget = tokenizer_path, problems, budget
        self._steps, self._seed, self._moved = steps, seed, moved
        self._encoder: Encoder | None = None
        self._problems: list[Problem] | None = None

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> TrainingBatch:
        if not 0 <= step < self._steps:
            raise IndexError(step)
        rows = [*self.picture_rows(step), *self.text_rows(step)]
        rng = Random(f"moved/{self._seed}/{step}")
        return collate(rows, self.encoder, self._budget, rng, self._moved)

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:  # a worker opens its own: tokenizers do not fork well
            from tokenizers import Tokenizer

            self._encoder = Encoder(Tokenizer.from_file(self._path))
        return self._encoder

    @property
    def problems(self) -> list[Problem]:
        if self._problems is None:
            self._problems = read_problems(self._problems_path) if self._problems_path else []
        return self._problems

    def picture_rows(self, step: int) -> list[Row]:
        """Rows about pictures of all sizes, until the first that is too much."""
        rng = Random(f"pictures/{self._seed}/{step}")
        budget, rows = self._budget, []
        tokens, image_tokens, learned = budget.tokens, budget.image_tokens, budget.learned_of_pictures
        while True:
            wide = rng.random() < WIDE
            size = wide_size(rng) if wide else rng.choice(SIZES)
            how = {
                "size": size,
                "images": 2 if rng.random() < 0.2 else 1,
                "turns": rng.randint(TURNS - 2, TURNS),
                "easy": rng.random() > step / EASY_STEPS,
            }
            number = step * 4096 + len(rows)
            if wide:
                example = make_wide_example(self._seed, number, **how)
            else:
                example = make_example("train", self._seed, number, **how)
            row = self.encoder.row(example_messages(example), example.scenes, size)
            tokens -= len(row.ids)
            image_tokens -= sum(image_tokens_of(size) for _, size in row.scenes)
            learned -= row.learned
            if min(tokens, image_tokens, learned) < 0:
                return rows
            rows.append(row)

    def text_rows(self, step: int) -> list[Row]:
        """Rows without pictures, until several in turn are too long for what is left."""
        rng = Random(f"text/{self._seed}/{step}")
        rows: list[Row] = []
        left, misses = self._budget.text_tokens, 0
        while misses < 5 and len(rows) < self._budget.text_tokens // SHORTEST_ROW:
            make = few_shot_messages if rng.random() < FEW_SHOT else text_messages
            row = self.encoder.row(make(rng, self.problems))
            if len(row.ids) > min(left, LONGEST_ROW):
                misses += 1
                continue
            rows.append(row)
            left -= len(row.ids)
        return rows
