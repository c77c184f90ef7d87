"""The decoder's own lesson: rows and columns of image tokens, as its positions have them."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import torch

from demo_training.asking import one_view
from demo_training.batches import Budget, TrainingBatches
from demo_training.pictures import pack_pictures
from demo_training.places import SIDE, PlaceHead


def pictures_of(*sizes: tuple[int, int], patches: int = 1000):
    return pack_pictures([(one_view(Random(0), size, "grid"), size) for size in sizes], patches)


def test_it_asks_for_the_row_and_the_column_of_every_token_and_of_no_padding():
    pictures = pictures_of((128, 160), (288, 64), (192, 192))
    expected = [(r, c) for rows, columns in ((5, 4), (2, 9), (6, 6)) for r in range(rows) for c in range(columns)]
    head = PlaceHead(64)
    head.codes = 20 * torch.eye(2 * SIDE)
    x = torch.randn(250, 2 * SIDE)
    for number, (row, column) in enumerate(expected):
        x[number] = 0
        x[number, row] = x[number, SIDE + column] = 1
    loss, right = head(x, pictures)
    assert loss < 1e-6
    assert right == 1
    x[0] = x[1]  # of the first token the column is wrong now
    loss, right = head(x, pictures)
    torch.testing.assert_close(right, torch.tensor(1 - 1 / len(expected)))
    torch.testing.assert_close(loss, torch.tensor(20 * SIDE**0.5 / len(expected)))


def test_codes_of_places_are_told_apart_and_near_ones_are_alike():
    codes = PlaceHead(256).codes
    likeness = codes @ codes.T / codes.square().sum(1)
    for of in (likeness[:SIDE, :SIDE], likeness[SIDE:, SIDE:]):
        assert (of.diagonal() > 0.999).all()
        assert (of - torch.eye(SIDE)).max() < 0.5
        assert (of.diagonal(1) > of.diagonal(3).max()).all()
    assert likeness[:SIDE, SIDE:].abs().max() < 1e-5  # rows say nothing about columns


def test_the_targets_are_the_positions_that_the_decoder_turns_by(untrained):
    """M-RoPE's rows and columns of the same tokens, from the first of their picture on."""
    data = TrainingBatches(str(untrained[0] / "tokenizer.json"), [], budget=Budget(2048, 512), steps=1, seed=0)
    batch = data[0]
    tokens = int((batch.place_M < len(batch.ids_N) - 1).sum())
    rows_columns = batch.positions_3N[1:, batch.place_M[:tokens]].T
    ends = (batch.pictures.starts // 4).tolist()
    for start, end in pairwise(ends):
        if start == end or end > tokens:
            break
        ours = batch.pictures.positions_P2[4 * start : 4 * end : 4] // 2
        assert torch.equal(ours, rows_columns[start:end] - rows_columns[start])
