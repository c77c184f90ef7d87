"""The decoder's own lesson: in which row and column of its picture an image token stands.

Its positions (M-RoPE) say so, but a decoder that is asked some questions of places finds no use for them for
thousands of steps: it takes what the tower's features say. So every image token has to carry fixed codes of its row and
of its column after a few layers, strongly enough that a product with them tells which they are, and the learned
positions of most pictures are moved about (pictures.py), so that the tower's features cannot give them. From then on
places are there to be used by the layers above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.pictures import ALL_SIZES, IGNORE, MERGE, PATCH, Pictures

AFTER = 2  # layers; the features of DeepStack are in by then
STRENGTH = 1.5  # length of the codes, of hidden states of mean square 1
SIDE = max(max(size) for size in ALL_SIZES) // (PATCH * MERGE)  # most rows or columns of image tokens


WAVES = 8


class PlaceHead(nn.Module):
    """Row and column from hidden states of ``width``.

    The codes are fixed: learned ones would grow until a trace of a place is enough, which the layers above could hardly
    read. They are waves, so that near places have codes that are alike, and one step is the same turn everywhere.
    """

    codes: Tensor

    def __init__(self, width: int):
        super().__init__()
        turns = torch.arange(SIDE)[:, None] * torch.arange(1, WAVES + 1) * (math.pi / SIDE)
        waves = F.normalize(torch.cat([turns.cos(), turns.sin()], 1))
        directions, _ = torch.linalg.qr(torch.randn(width, 4 * WAVES, generator=torch.Generator().manual_seed(0)))
        of_row, of_column = directions.T.split(2 * WAVES)
        self.register_buffer("codes", STRENGTH * torch.cat([waves @ of_row, waves @ of_column]))

    def forward(self, x_MH: Tensor, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """The mean loss over the image tokens, and the share of them whose row and column are both right."""
        first = slice(None, None, MERGE**2)  # the first patch of each token
        places_M2 = pictures.positions_P2[first] // MERGE
        seen_M = pictures.targets_3P[0, first] != IGNORE
        logits_M2S = F.linear(F.rms_norm(x_MH.float(), x_MH.shape[1:]), self.codes).view(-1, 2, SIDE)
        targets = places_M2.masked_fill(~seen_M[:, None], IGNORE)
        loss = F.cross_entropy(logits_M2S.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (logits_M2S.argmax(-1) == places_M2).all(1) & seen_M
        count = seen_M.sum().clamp(min=1)
        return loss / count, right.sum() / count
