"""One step of the model: all tokens of all its sequences packed into one row dimension, and where everything goes.

Shape legend of both packages: T tokens of the step, U cached tokens that they attend to, S sequences, H hidden,
E experts, K chosen experts, I expert width, N query heads, G key/value heads, D head width, L layers, V vocabulary;
in the vision tower P patches, C its hidden width, M merged (visual) tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. The host only starts the copy, from pinned memory: with any other it would have to wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


def all_to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Several tensors on a device, those of a CPU in one copy: each copy costs the host as much as a launch."""
    device = torch.device(device)
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    moved = [x for x in tensors if not x.is_cuda]
    # Sections begin at multiples of 16 bytes, which the kernels' wide loads like.
    ends = list(itertools.accumulate(-(-x.nbytes // 16) * 16 for x in moved))
    buffer = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=True)
    for x, section in zip(moved, _sections(buffer, moved, ends), strict=True):
        section.copy_(x)
    there = iter(_sections(buffer.to(device, non_blocking=True), moved, ends))
    return [x if x.is_cuda else next(there) for x in tensors]


def _sections(buffer: Tensor, like: Sequence[Tensor], ends: Sequence[int]) -> list[Tensor]:
    begins = [0, *ends[:-1]]
    return [buffer[at : at + x.nbytes].view(x.dtype).view(x.shape) for at, x in zip(begins, like, strict=True)]


@dataclass(frozen=True)
class Segments:
    """Boundaries of packed sequences: how many rows each asks with, and how many keys each row's sequence has.

    Lengths live on the host (loops and launch bounds need no synchronisation), cumulative starts (int32 [S + 1]) on the
    device.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    q_starts: Tensor
    kv_starts: Tensor

    @classmethod
    def build(
        cls, q_lens: Sequence[int], kv_lens: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> Segments:
        """Args: query and key lengths per sequence (keys default to the queries: nothing is cached)."""
        kv_lens = q_lens if kv_lens is None else kv_lens

        def starts(lengths: Sequence[int]) -> Tensor:
            total = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            total[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
            return to_device(total, device)

        q_starts = starts(q_lens)
        return cls(tuple(q_lens), tuple(kv_lens), q_starts, q_starts if kv_lens is q_lens else starts(kv_lens))

    @property
    def max_q(self) -> int:
        return max(self.q_lens)


@dataclass(frozen=True)
class VisionFeatures:
    """What the decoder takes from the vision tower, addressed by visual-token index.

    ``embeds_MH`` replaces the placeholders' embeddings; ``deepstack_LMH[i]`` is added to the same rows after decoder
    layer i. Taking rows of both together keeps DeepStack aligned when a prompt is cut inside an image.
    """

    embeds_MH: Tensor
    deepstack_LMH: Tensor

    def rows(self, start: int, stop: int) -> VisionFeatures:
        """Visual tokens ``start`` to ``stop`` (views, no copy)."""
        return VisionFeatures(self.embeds_MH[start:stop], self.deepstack_LMH[:, start:stop])

    @staticmethod
    def cat(parts: Sequence[VisionFeatures]) -> VisionFeatures:
        """Visual tokens of several images after each other."""
        if len(parts) == 1:
            return parts[0]
        return VisionFeatures(
            torch.cat([part.embeds_MH for part in parts]), torch.cat([part.deepstack_LMH for part in parts], dim=1)
        )


@dataclass(frozen=True)
class Batch:
    """One step. The model takes it with all tensors on its device.

    Attributes:
        input_ids_T: int64 token ids, sequence after sequence; on the device already where a step before sampled them.
        positions_3T: int64 M-RoPE positions (time, height, width).
        segments: boundaries of the sequences; ``kv_lens`` counts cached and new tokens.
        slots_T: int64 cache row of each token, ``block * block_size + offset``; None attends within the batch only.
        block_tables: int32 [S, B] cache blocks of each sequence in order, padded with 0; needed where a sequence has
            more keys than queries.
        block_size: tokens in a cache block.
        visual_rows: int64 [M] rows of the step that are image tokens.
        visual: features for exactly these rows, in this order.
        logit_rows: int64 rows whose logits are wanted; None means all.
        padding_T1: bool [T, 1], True for rows that only fill the shape of a CUDA graph: they belong to no sequence,
            have a negative slot, and are sent to no expert. None: there are none.
    """

    input_ids_T: Tensor
    positions_3T: Tensor
    segments: Segments
    slots_T: Tensor | None = None
    block_tables: Tensor | None = None
    block_size: int = 0
    visual_rows: Tensor | None = None
    visual: VisionFeatures | None = None
    logit_rows: Tensor | None = None
    padding_T1: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same step with every tensor on a device (vision features stay where they are)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        names = [name for name, value in values.items() if isinstance(value, Tensor)]
        starts = self.segments.q_starts, self.segments.kv_starts
        q_starts, kv_starts, *moved = all_to_device([*starts, *(values[name] for name in names)], device)
        segments = replace(self.segments, q_starts=q_starts, kv_starts=kv_starts)
        return replace(self, segments=segments, **dict(zip(names, moved, strict=True)))

    @property
    def reads_cache(self) -> bool:
        """Whether some sequence attends to tokens of earlier steps."""
        return self.segments.q_lens != self.segments.kv_lens

    @cached_property
    def cache_rows_U(self) -> Tensor:
        """int64 [U] cache rows of every sequence's keys, sequence after sequence: computed once for all layers."""
        starts = self.segments.kv_starts.long()
        total = sum(self.segments.kv_lens)  # known on the host, so that repeat_interleave need not synchronise
        sequence = torch.arange(len(starts) - 1, device=starts.device)
        sequence_U = sequence.repeat_interleave(starts.diff(), output_size=total)
        place_U = torch.arange(total, device=starts.device) - starts[sequence_U]
        block_U = self.block_tables[sequence_U, place_U // self.block_size].long()
        return block_U * self.block_size + place_U % self.block_size
