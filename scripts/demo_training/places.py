"""The decoder's own lessons: where in its picture an image token stands, what is there, and which cell of a grid.

Its positions (M-RoPE) say where a token stands, but a decoder that is asked some questions of places finds no use for
them for thousands of steps: it takes what the tower's features say. So every image token has to carry fixed codes of
its row and of its column after a few layers, strongly enough that a product with them tells which they are, and the
learned positions of most pictures are moved about (pictures.py), so that the tower's features cannot give them. In the
same way it carries codes of what stands there, so that the layers above can find a thing by its name, and after some
more layers of the row and the column of the grid that the thing is in.

And a question's tokens learn to look: the last token of a name has to carry the codes of the place of what it names
(mentions.py), which is the first of the two steps to what stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.pictures import ALL_SIZES, CELLS, COLOUR, IGNORE, MERGE, PATCH, SPOTS, WHAT, Pictures

# Layers; the features of DeepStack are in after the first two.
AFTER, CELLS_AFTER, NAMED_AFTER = 2, 4, 5
STRENGTH = 1.5  # length of the codes, of hidden states of mean square 1
SIDE = max(max(size) for size in ALL_SIZES) // (PATCH * MERGE)  # most rows or columns of image tokens
NOTHING = 0.1  # weight of a token without anything: most are
PLACE_WAVES, CELL_WAVES, OF_WHAT, OF_COLOUR = 8, 6, 32, 8  # pairs of directions, and directions
NARROWEST = 4 * (PLACE_WAVES + CELL_WAVES) + OF_WHAT + OF_COLOUR  # hidden states that have room for all codes


@dataclass(frozen=True)
class Carried:
    """Hidden states: image tokens [M, H] after AFTER layers and after CELLS_AFTER, and the tokens that end a name
    [Q, H] after NAMED_AFTER."""

    early: Tensor
    late: Tensor
    naming: Tensor


def waves_of(count: int, waves: int) -> Tensor:
    """Codes [count, 2 * waves] of numbers in a row: near ones are alike, and one step is the same turn everywhere."""
    turns = torch.arange(count)[:, None] * torch.arange(1, waves + 1) * (math.pi / count)
    return F.normalize(torch.cat([turns.cos(), turns.sin()], 1))


class PlaceHead(nn.Module):
    """Tells from hidden states of ``width`` (NARROWEST at least), by products with codes.

    The codes are fixed: learned ones would grow until a trace of a place is enough, which the layers above could hardly
    read. Those of different things are in directions of their own.
    """

    places: Tensor
    what: Tensor
    colours: Tensor
    cells: Tensor

    def __init__(self, width: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        directions, _ = torch.linalg.qr(torch.randn(width, NARROWEST, generator=generator))
        sizes = [2 * PLACE_WAVES] * 2 + [2 * CELL_WAVES] * 2 + [OF_WHAT, OF_COLOUR]
        row, column, cell_row, cell_column, what, colour = directions.T.split(sizes)
        place, cell = waves_of(SIDE, PLACE_WAVES), waves_of(CELLS, CELL_WAVES)
        random = [
            F.normalize(torch.randn(len(names), size, generator=generator))
            for names, size in ((WHAT, OF_WHAT), (COLOUR, OF_COLOUR))
        ]
        self.register_buffer("places", STRENGTH * torch.cat([place @ row, place @ column]))
        self.register_buffer("cells", STRENGTH * torch.cat([cell @ cell_row, cell @ cell_column]))
        self.register_buffer("what", STRENGTH * random[0] @ what)
        self.register_buffer("colours", STRENGTH * random[1] @ colour)
        self.register_buffer("weights_of_what", torch.tensor([NOTHING] + [1.0] * (len(WHAT) - 1)))

    def forward(self, carried: Carried, pictures: Pictures, named_4Q: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the shares that are right: ``placed`` of all image tokens (row and column), ``known`` and
        ``ordered`` of those with one thing (what it is; its row and column in a grid), ``found`` of the names."""
        targets_6M8 = pictures.targets_6S.unflatten(1, (-1, MERGE**2 * SPOTS))
        seen_M = targets_6M8[0, :, 0] != IGNORE
        place_2M = (pictures.positions_P2[:: MERGE**2] // MERGE).T.masked_fill(~seen_M, IGNORE)
        # Of one thing in a token all is known; of several, nothing is asked.
        several_M = (targets_6M8[0] > 0).sum(1) > 1
        what_M, colour_M, _, _, *cell = targets_6M8.amax(2).masked_fill(several_M, IGNORE)
        early, late, naming = (
            F.rms_norm(x.float(), x.shape[1:]) for x in (carried.early, carried.late, carried.naming)
        )
        what = F.linear(early, self.what)
        loss = F.cross_entropy(what, what_M, self.weights_of_what, ignore_index=IGNORE)
        loss = loss + mean_loss(F.linear(early, self.colours), colour_M)
        told = {"known": _share(what.argmax(-1) == what_M, what_M > 0)}
        for name, x, codes, targets in (
            ("placed", early, self.places, place_2M),
            ("ordered", late, self.cells, torch.stack(cell)),
            ("found", naming, self.places, named_4Q[:2]),
            ("found_in_grid", naming, self.cells, named_4Q[2:]),
        ):
            logits = F.linear(x, codes).unflatten(1, (2, -1))
            loss = loss + 2 * mean_loss(logits.flatten(0, 1), targets.T.flatten())
            told[name] = _share((logits.argmax(-1) == targets.T).all(1), targets[0] != IGNORE)
        return loss, told


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy where there is a target; zero where there is none at all."""
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def _share(right: Tensor, of: Tensor) -> Tensor:
    return (right & of).sum() / of.sum().clamp(min=1)
