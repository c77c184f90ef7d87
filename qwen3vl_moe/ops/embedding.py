"""The table of token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen3vl_moe.ops.ranks import Ranks


class Embedding(nn.Module):
    """Embeddings of a vocabulary, of which each rank holds some rows.

    Args:
        rows: tokens whose embeddings are held here.
        width: of an embedding.
        ranks: which hold the others.
    """

    def __init__(self, rows: range, width: int, ranks: Ranks):
        super().__init__()
        self.rows, self.ranks = rows, ranks
        self.weight = nn.Parameter(torch.empty(len(rows), width), requires_grad=False)

    def forward(self, ids_T: Tensor) -> Tensor:
        """Embeddings [T, width] of all tokens (int64 or int32 [T]), on every rank; new memory."""
        if self.ranks.alone:
            return F.embedding(ids_T, self.weight)
        row_T = ids_T - self.rows.start
        elsewhere_T = (row_T < 0) | (row_T >= len(self.rows))
        held_TH = F.embedding(row_T.masked_fill(elsewhere_T, 0), self.weight)
        return self.ranks.sum(held_TH.masked_fill_(elsewhere_T[:, None], 0))
