"""The decoder's own lessons: what they ask of image tokens and of names, against what was drawn and said."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch

from demo_training.asking import make_wide_example, one_view
from demo_training.batches import Budget, TrainingBatches, collate, example_messages
from demo_training.mentions import Mention, mentions_of
from demo_training.pictures import CELLS, COLOUR, IGNORE, WHAT, pack_pictures
from demo_training.places import NARROWEST, SIDE, Carried, PlaceHead
from demo_training.scenes import Scene, Shape

NONE_NAMED = torch.full((4, 3), IGNORE)
GRID = ((128, 160), (288, 64), (192, 192))


def pictures_of(*sizes: tuple[int, int], patches: int = 1000):
    return pack_pictures([(one_view(Random(0), size, "grid"), size) for size in sizes], patches)


def sure(head: PlaceHead, codes: torch.Tensor, numbers: list[int]) -> torch.Tensor:
    """A hidden state that carries these codes and nothing else."""
    return codes[numbers].sum(0)


def test_it_asks_for_the_row_and_the_column_of_every_token_and_of_no_padding():
    pictures = pictures_of(*GRID)
    expected = [(r, c) for rows, columns in ((5, 4), (2, 9), (6, 6)) for r in range(rows) for c in range(columns)]
    head = PlaceHead(NARROWEST)
    x = torch.randn(250, NARROWEST)
    for number, (row, column) in enumerate(expected):
        x[number] = sure(head, head.places, [row, SIDE + column])
    told = head(Carried(x, x, x[:3]), pictures, NONE_NAMED)[1]
    assert told["placed"] == 1
    x[0] = x[1]  # of the first token the column is wrong now
    told = head(Carried(x, x, x[:3]), pictures, NONE_NAMED)[1]
    torch.testing.assert_close(told["placed"], torch.tensor(1 - 1 / len(expected)))


def test_it_asks_what_stands_in_a_token_and_in_which_cell():
    """A grid of a cell for each token, so that the cells' places are those of the tokens."""
    size = (96, 128)
    view = next(
        view
        for view in (one_view(Random(number), size, "grid") for number in range(200))
        if (len(view.cells), len(view.cells[0])) == (4, 3) and view.writings
    )
    pictures, head = pack_pictures([(view, size)], 100), PlaceHead(NARROWEST)
    what = torch.randn(25, NARROWEST)
    cells = torch.randn(25, NARROWEST)
    for number, label in enumerate(label for row in view.cells for label in row):
        row, column = divmod(number, 3)
        what[number] = sure(head, head.what, [WHAT.index(label)])
        cells[number] = sure(head, head.cells, [row, CELLS + column])
    told = head(Carried(what, cells, cells[:3]), pictures, NONE_NAMED)[1]
    assert (told["known"], told["ordered"]) == (1, 1)
    told = head(Carried(what.flip(0), cells.roll(1, 0), cells[:3]), pictures, NONE_NAMED)[1]
    assert max(told["known"], told["ordered"]) < 0.2


def test_names_have_to_carry_the_places_of_what_they_name():
    head = PlaceHead(NARROWEST)
    named = torch.tensor([[1, 3, IGNORE], [2, 0, IGNORE], [1, IGNORE, IGNORE], [0, IGNORE, IGNORE]])
    x = torch.randn(3, NARROWEST)
    x[0] = sure(head, head.places, [1, SIDE + 2]) + sure(head, head.cells, [1, CELLS + 0])
    x[1] = sure(head, head.places, [3, SIDE + 1])  # a column too far
    images = torch.randn(250, NARROWEST)
    told = head(Carried(images, images, x), pictures_of(*GRID), named)[1]
    assert told["found"] == 0.5
    assert told["found_in_grid"] == 1


def test_what_is_learned_is_what_is_asked():
    """By the loss alone, states come to carry the codes of all that is asked of them."""
    torch.manual_seed(0)
    pictures, head = pictures_of(*GRID), PlaceHead(NARROWEST)
    named = torch.tensor([[1, 3, IGNORE], [2, 0, IGNORE], [1, IGNORE, IGNORE], [0, IGNORE, IGNORE]])
    states = [torch.randn(n, NARROWEST, requires_grad=True) for n in (250, 250, 3)]
    optimizer = torch.optim.Adam(states, lr=0.1)
    for _ in range(150):
        loss, told = head(Carried(*states), pictures, named)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert set(told) == {"placed", "known", "ordered", "found", "found_in_grid"}
    assert min(told.values()) == 1


def test_codes_are_told_apart_and_near_places_are_alike():
    head = PlaceHead(256)
    for codes, count in ((head.places, SIDE), (head.cells, CELLS)):
        likeness = codes @ codes.T / codes.square().sum(1)
        for of in (likeness[:count, :count], likeness[count:, count:]):
            assert (of.diagonal() > 0.999).all()
            assert (of - torch.eye(count)).max() < 0.6
            assert (of.diagonal(1) > of.diagonal(3).max()).all()
        assert likeness[:count, count:].abs().max() < 1e-5  # rows say nothing about columns
    groups = (head.places[:SIDE], head.places[SIDE:], head.cells[:CELLS], head.cells[CELLS:], head.what, head.colours)
    for number, one in enumerate(groups):
        for other in groups[number + 1 :]:
            assert (one @ other.T).abs().max() < 1e-4
    for codes, names in ((head.what, WHAT), (head.colours, COLOUR)):
        assert ((codes @ codes.T).argmax(1) == torch.arange(len(names))).all()


def test_the_targets_are_the_positions_that_the_decoder_turns_by(untrained):
    """M-RoPE's rows and columns of the same tokens, from the first of their picture on."""
    data = TrainingBatches(str(untrained[0] / "tokenizer.json"), None, budget=Budget(2048, 512), steps=1, seed=0)
    batch = data[0]
    tokens = int((batch.place_M < len(batch.ids_N) - 1).sum())
    rows_columns = batch.positions_3N[1:, batch.place_M[:tokens]].T
    ends = (batch.pictures.starts // 4).tolist()
    for start, end in pairwise(ends):
        if start == end or end > tokens:
            break
        ours = batch.pictures.positions_P2[4 * start : 4 * end : 4] // 2
        assert torch.equal(ours, rows_columns[start:end] - rows_columns[start])


SCENE = Scene(
    100, 100, (0, 0, 0), "plain", 0,
    (Shape("circle", "red", "small", 20, 30, 9), Shape("circle", "blue", "large", 60, 80, 20),
     Shape("cross", "blue", "large", 20, 80, 20)),
)  # fmt: skip


def test_only_names_of_one_thing_are_asked_for():
    assert mentions_of([SCENE], {"name": "red circle"}) == (Mention("red circle", 0, 0.2, 0.3),)
    assert mentions_of([SCENE], {"shape": "circle"}) == ()
    assert [m.x for m in mentions_of([SCENE], {"shape": "cross", "colour": "red"})] == [0.2, 0.2]
    assert mentions_of([SCENE], {"name": "black cross"}) == ()
    assert mentions_of([SCENE, SCENE], {"name": "red circle"}) == ()
    assert [m.picture for m in mentions_of([SCENE, SCENE], {"name": "red circle", "which": "second"})] == [1]


@pytest.mark.parametrize(
    ("question", "end"),
    [("Is the R left?", 8), ("Right of the R, what is R", 25), ("Read the cell Rx", None), ("r", None)],
)
def test_a_name_is_found_where_it_is_a_word(question, end):
    assert Mention("R", 0, 0.5, 0.5).end_in(question) == end


def test_tokens_of_names_end_them_and_their_targets_are_where_the_thing_is_drawn(untrained):
    data = TrainingBatches(str(untrained[0] / "tokenizer.json"), None, budget=Budget(4096, 512), steps=1, seed=0)
    decode, found, in_grids = data.encoder._tokenizer.decode, 0, 0
    for number in range(60):
        example = make_wide_example(0, number, size=(160, 192), images=1 + number % 2, turns=4)
        row = data.encoder.row(example_messages(example), example.scenes)
        batch = collate([row], data.encoder, Budget(4096, 512))
        pixels = 0
        for n, (token, mention) in enumerate(row.named):
            assert decode(row.ids[: token + 1], skip_special_tokens=False).endswith(mention.text)
            assert batch.naming_Q[n] == token
            start = int(batch.pictures.starts[mention.picture]) // 4
            end = int(batch.pictures.starts[mention.picture + 1]) // 4
            place = batch.pictures.positions_P2[4 * start : 4 * end : 4] // 2
            at = start + int((place == batch.named_4Q[:2, n]).all(1).nonzero()[0, 0])
            there = batch.pictures.targets_6S[:, 8 * at : 8 * at + 8]
            pixels += len(there)
            assert mention.text.split()[-1] in {*(WHAT[i] for i in there[0]), *(COLOUR[i] for i in there[1] if i >= 0)}
            if mention.cell:
                assert tuple(there[4:].amax(1).tolist()) == mention.cell == tuple(batch.named_4Q[2:, n].tolist())
                in_grids += 1
            found += 1
        assert (batch.named_4Q[:, len(row.named) :] == IGNORE).all()
    assert found > 60
    assert in_grids > 10
