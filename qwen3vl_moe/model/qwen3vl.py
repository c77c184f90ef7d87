"""Qwen3-VL-MoE: both towers, the whole forward, logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.model.batch import Batch, VisionFeatures
from qwen3vl_moe.model.part import Part
from qwen3vl_moe.model.rope import Grid, frames_apart, mrope_positions
from qwen3vl_moe.model.text import Decoder
from qwen3vl_moe.model.vision import VisionTower
from qwen3vl_moe.ops import ALONE, Ranks, Segments
from tma_moe import FP8


class Qwen3VLMoe(nn.Module):
    """The model. The constructor does not load weights; use ``Qwen3VLMoe.from_pretrained``.

    Args:
        config: sizes.
        moe: which implementation of the experts the layers call, ``"tma"``, ``"triton"`` or ``"reference"``.
        ranks: the processes that compute it together. Each of them makes all calls, with the same arguments.

    Attributes:
        part: what this rank holds of the decoder.
    """

    # Set to `load_model` when `qwen3vl_moe.weights` is imported, so that this module need not import it.
    from_pretrained: ClassVar[Callable[..., Qwen3VLMoe]]

    def __init__(self, config: Qwen3VLMoeConfig, moe: str = "reference", ranks: Ranks = ALONE):
        super().__init__()
        self.config, self.moe, self.ranks = config, moe, ranks
        self.part = Part.of(config.text, ranks.rank, ranks.size)
        self.vision = VisionTower(config.vision)
        self.text = Decoder(config.text, self.part, ranks, moe)
        self.lm_head = nn.Linear(config.text.hidden_size, len(self.part.vocabulary), bias=False)
        self.requires_grad_(False).eval()

    def set_dtype(self, dtype: torch.dtype) -> Qwen3VLMoe:
        """Cast all parameters but FP8 weights and their scales, which ``.to(dtype)`` would cast, too."""
        for name, parameter in self.named_parameters():
            if parameter.dtype != FP8 and not name.endswith("scale"):
                parameter.data = parameter.data.to(dtype)
        return self

    def set_moe(self, moe: str) -> None:
        """Have all layers call another implementation of the experts from now on."""
        self.moe = moe
        self.text.set_moe(moe)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @torch.no_grad()
    def encode_images(self, pixel_values_PC: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Features of one or more images, or frames of videos, in one packed call: see :meth:`VisionTower.forward`."""
        return self.vision(pixel_values_PC.to(self.device, non_blocking=True), grids)

    @torch.no_grad()
    def forward(self, batch: Batch, kv_cache: Tensor | None = None) -> Tensor:
        """Logits of one packed step, [R, V] in the model's dtype (R: ``batch.logit_rows``, or all T rows).

        Args:
            batch: the step.
            kv_cache: [L, 2, blocks, block_size, G, D] in the model's dtype, or FP8, updated at ``batch.slots_T``;
                None attends within the batch only.
        """
        return self.compute_logits(self.text(batch, kv_cache))

    def compute_logits(self, hidden_RH: Tensor, out: Tensor | None = None) -> Tensor:
        """From the decoder's normed hidden states to logits [R, V], written into ``out`` where that is given.

        Of several ranks the first one gets them; the others, those of their part of the vocabulary.
        """
        if self.ranks.alone:
            return torch.mm(hidden_RH, self.lm_head.weight.T, out=out)
        return self.ranks.columns(self.lm_head(hidden_RH), out)

    def logits(
        self,
        input_ids_T: Tensor | Sequence[int],
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | Sequence[Grid] | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | Sequence[Grid] | None = None,
    ) -> Tensor:
        """Logits [T, V] at every position of one sequence, without a cache: the plain door for parity checks.

        Args:
            input_ids_T: token ids with the placeholders of each image and frame expanded (one per merged token).
            pixel_values, pixel_values_videos: [P, patch_dim] patches of all images, and of all videos.
            image_grid_thw, video_grid_thw: (frames, rows, columns) in patches per image, and per video.

        Raises:
            ValueError: placeholders, grids and patches do not match.
        """
        ids = torch.as_tensor(input_ids_T, dtype=torch.int64)
        config = self.config
        grids = {
            config.image_token_id: _as_grids(pixel_values, image_grid_thw, "pixel_values and image_grid_thw"),
            config.video_token_id: frames_apart(
                _as_grids(pixel_values_videos, video_grid_thw, "pixel_values_videos and video_grid_thw")
            ),
        }
        positions_3T, _ = mrope_positions(ids.tolist(), grids, config.vision.merge_size)
        visual = None
        if parts := [pixels for pixels in (pixel_values, pixel_values_videos) if pixels is not None]:
            rows_M = torch.cat([(ids == token).nonzero().flatten() for token in grids]).to(self.device)
            visual = self.encode_images(torch.cat(parts), [grid for of in grids.values() for grid in of]).at(rows_M)
        batch = Batch(
            input_ids_T=ids.to(self.device),
            positions_3T=positions_3T.to(self.device),
            segments=Segments.build([len(ids)], device=self.device),
            visual=visual,
        )
        return self(batch)


def _as_grids(pixels: Tensor | None, grids: Tensor | Sequence[Grid] | None, names: str) -> list[Grid]:
    listed = [] if grids is None else [tuple(grid) for grid in torch.as_tensor(grids).tolist()]
    if (pixels is None) != (not listed):
        raise ValueError(f"{names} go together: pass both or neither")
    return listed
