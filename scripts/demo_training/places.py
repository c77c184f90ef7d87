"""The decoder's own lesson: in which row and column of its picture an image token stands.

Its positions (M-RoPE) say so, but a decoder that is asked some questions of places has found no use for them after
thousands of steps: it takes what the tower's features say. So a linear head, dropped afterwards, has to tell row and
column of every image token after a few layers, and the learned positions of most pictures are moved about
(pictures.py), so that the tower's features cannot. From then on places are there to be used by the layers above.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.pictures import ALL_SIZES, IGNORE, MERGE, PATCH, Pictures

AFTER = 3  # layers; the features of DeepStack are in by then
SIDE = max(max(size) for size in ALL_SIZES) // (PATCH * MERGE)  # most rows or columns of image tokens


class PlaceHead(nn.Module):
    """Row and column from hidden states of ``width``."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, 2 * SIDE)

    def forward(self, x_MH: Tensor, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """The mean loss over the image tokens, and the share of them whose row and column are both right."""
        first = slice(None, None, MERGE**2)  # the first patch of each token
        places_M2 = pictures.positions_P2[first] // MERGE
        seen_M = pictures.targets_3P[0, first] != IGNORE
        logits_M2S = self.head(x_MH).float().view(-1, 2, SIDE)
        targets = places_M2.masked_fill(~seen_M[:, None], IGNORE)
        loss = F.cross_entropy(logits_M2S.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        right = (logits_M2S.argmax(-1) == places_M2).all(1) & seen_M
        count = seen_M.sum().clamp(min=1)
        return loss / count, right.sum() / count
