"""One step of the model: all tokens of all its sequences packed into one row dimension, and where everything goes.

Shape letters of both packages, in names and comments: T tokens of the step, R rows whose logits are wanted, S
sequences, U keys that a step's tokens attend to, H hidden, E experts, K chosen experts, I expert width, N query heads,
G key/value heads, D head width, F = D / 2 rotary frequencies, A all heads side by side, L layers, V vocabulary, B
blocks of the cache; in the vision tower P patches, C channels (of a patch, then of the tower), M merged (visual)
tokens. Pictures are HW3 or 3HW, height and width. K and N are also what a plain product sums over, and what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qwen3vl_moe.ops import Segments
from qwen3vl_moe.ops.transfer import all_to_device


@dataclass(frozen=True)
class VisionFeatures:
    """What the decoder takes from the vision tower, addressed by visual-token index.

    ``embeds_MH`` replaces the placeholders' embeddings; ``deepstack_LMH[i]`` is added to the same rows after decoder
    layer i. Taking visual tokens of both together keeps DeepStack aligned when a prompt is cut inside an image.
    """

    embeds_MH: Tensor
    deepstack_LMH: Tensor

    def rows(self, start: int, stop: int) -> VisionFeatures:
        """Visual tokens ``start`` to ``stop`` (views, no copy)."""
        return VisionFeatures(self.embeds_MH[start:stop], self.deepstack_LMH[:, start:stop])

    def at(self, rows_M: Tensor) -> VisualTokens:
        """These features in rows of a step (int64 [M])."""
        return VisualTokens(rows_M, self.embeds_MH, self.deepstack_LMH)

    @staticmethod
    def cat(parts: Sequence[VisionFeatures]) -> VisionFeatures:
        """Visual tokens of several images after each other."""
        if len(parts) == 1:
            return parts[0]
        return VisionFeatures(
            torch.cat([part.embeds_MH for part in parts]), torch.cat([part.deepstack_LMH for part in parts], dim=1)
        )


@dataclass(frozen=True)
class VisualTokens:
    """The image tokens of a step: which rows they are (int64 [M]), and the features of just these, in this order."""

    rows_M: Tensor
    embeds_MH: Tensor
    deepstack_LMH: Tensor


@dataclass(frozen=True)
class Batch:
    """One step. The model takes it with all tensors on its device.

    Attributes:
        input_ids_T: int64 token ids, sequence after sequence; already on the device if the previous step sampled them.
        positions_3T: int64 M-RoPE positions (time, height, width).
        segments: the sequences: their boundaries, and their blocks in the cache.
        slots_T: int64 cache row of each token, ``block * block_size + offset``; None attends within the batch only.
        visual: the step's image tokens, if it has any.
        logit_rows: int64 [R] rows whose logits are wanted; None means all.
        padding_T: bool [T], True for rows that only fill the shape of a CUDA graph: they belong to no sequence, have a
            negative slot, and are sent to no expert. None: there are none.
    """

    input_ids_T: Tensor
    positions_3T: Tensor
    segments: Segments
    slots_T: Tensor | None = None
    visual: VisualTokens | None = None
    logit_rows: Tensor | None = None
    padding_T: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same step with every tensor on a device, in one copy; what is there already stays where it is."""
        parts = [part for part in (self.segments, self.visual, self) if part is not None]
        moved = iter(all_to_device([x for part in parts for x in _tensors(part).values()], device))
        *new, whole = [replace(part, **{name: next(moved) for name in _tensors(part)}) for part in parts]
        assert isinstance(whole, Batch)
        return replace(whole, segments=new[0], visual=new[1] if self.visual is not None else None)


def _tensors(of: Batch | Segments | VisualTokens) -> dict[str, Tensor]:
    values = {field.name: getattr(of, field.name) for field in fields(of)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
