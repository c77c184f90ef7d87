"""Boundaries of a packed batch, and where its segments' keys are in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qwen3vl_moe.ops.transfer import to_device


@dataclass(frozen=True)
class Segments:
    """Which rows of a packed batch belong together, and where their keys are.

    Lengths live on the host, where loops and launch bounds need no synchronisation; cumulative starts on the device.

    Attributes:
        q_lens, kv_lens: how many rows each segment asks with, and how many keys it has, cached ones included.
        q_starts, kv_starts: int32 [S + 1], their cumulative sums.
        block_tables: int32 [S, B], the cache blocks of each segment in order, padded with 0; None: nothing is cached.
        block_size: tokens in a cache block.
        padded: whether some rows may belong to no segment, to fill the fixed shape of a CUDA graph.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q_starts: Tensor
    kv_starts: Tensor
    block_tables: Tensor | None = None
    block_size: int = 0
    padded: bool = False

    @classmethod
    def build(
        cls,
        q_lens: Sequence[int],
        kv_lens: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        block_tables: Tensor | None = None,
        block_size: int = 0,
    ) -> Segments:
        """Segments of given lengths, with their cumulative starts on a device.

        Args:
            q_lens, kv_lens: of each segment; no kv_lens: nothing is cached, and they are the q_lens.
            device: where the starts go.
            block_tables, block_size: see the class.
        """
        kv_lens = q_lens if kv_lens is None else kv_lens

        def starts(lengths: Sequence[int]) -> Tensor:
            total = np.zeros(len(lengths) + 1, np.int32)
            np.cumsum(lengths, out=total[1:])
            return to_device(torch.from_numpy(total), device)

        q_starts = starts(q_lens)
        kv_starts = q_starts if kv_lens is q_lens else starts(kv_lens)
        return cls(tuple(q_lens), tuple(kv_lens), q_starts, kv_starts, block_tables, block_size)

    @property
    def max_q(self) -> int:
        return max(self.q_lens)

    @property
    def reads_cache(self) -> bool:
        """Whether some segment attends to tokens of earlier steps."""
        return self.q_lens != self.kv_lens

    @cached_property
    def cache_rows_U(self) -> Tensor:
        """int64 [U], the cache rows of all keys, segment after segment: worked out once for all layers."""
        assert self.block_tables is not None
        starts = self.kv_starts.long()
        total = sum(self.kv_lens)  # known on the host, so that repeat_interleave need not synchronise
        segment = torch.arange(len(starts) - 1, device=starts.device)
        segment_U = segment.repeat_interleave(starts.diff(), output_size=total)
        place_U = torch.arange(total, device=starts.device) - starts[segment_U]
        block_U = self.block_tables[segment_U, place_U // self.block_size].long()
        return block_U * self.block_size + place_U % self.block_size
