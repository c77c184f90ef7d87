"""Prompts for comparing models: token ids with image placeholders among text, and the pixels that go with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen3vl_moe.model.rope import frames_apart


@dataclass(frozen=True)
class RawPrompt:
    """One prompt as a model takes it: ids [T], patches [P, patch_dim] or None, grids [(t, h, w), ...], each twice."""

    ids: list[int]
    pixels: Tensor | None
    grids: list[tuple[int, int, int]]
    video_pixels: Tensor | None = None
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)

    def oracle_inputs(self, config: Any) -> dict[str, Tensor]:
        """The arguments of transformers' forward and generate."""
        ids = torch.tensor([self.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        if self.pixels is not None:
            inputs |= {"pixel_values": self.pixels, "image_grid_thw": torch.tensor(self.grids)}
        if self.video_pixels is not None:
            inputs |= {"pixel_values_videos": self.video_pixels, "video_grid_thw": torch.tensor(self.video_grids)}
        return inputs

    def our_inputs(self) -> tuple:
        """The arguments of ``Qwen3VLMoe.logits``."""
        return self.ids, self.pixels, self.grids or None, self.video_pixels, self.video_grids or None

    def our_grids(self, config: Any) -> dict[int, list[tuple[int, int, int]]]:
        """The grids as ``mrope_positions`` takes them."""
        return {config.image_token_id: self.grids, config.video_token_id: frames_apart(self.video_grids)}


def make_prompt(config: Any, images: list[tuple[int, ...]], seed: int = 0, text: int = 5) -> RawPrompt:
    """Random text with images (rows, columns) and videos (frames, rows, columns), in merged tokens, between its pieces.

    The frames of a video stand in a pair of vision tokens of their own, with text before each, as prompts tell times.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = config.vision_config
    merge = vision.spatial_merge_size
    start, end = config.vision_start_token_id, config.vision_end_token_id

    def words() -> list[int]:
        return torch.randint(0, 400, (text,), generator=generator).tolist()

    ids, grids, video_grids = words(), [], []
    for *frames, rows, columns in images:
        if frames:
            pads = [start, *[config.video_token_id] * (rows * columns), end]
            ids += [start, *(token for _ in range(frames[0]) for token in (*words(), *pads)), end, *words()]
            video_grids.append((frames[0], rows * merge, columns * merge))
        else:
            ids += [start, *[config.image_token_id] * (rows * columns), end, *words()]
            grids.append((1, rows * merge, columns * merge))
    patch_dim = 3 * vision.temporal_patch_size * vision.patch_size**2

    def patches(of: list[tuple[int, int, int]]) -> Tensor | None:
        return torch.randn(sum(t * h * w for t, h, w in of), patch_dim, generator=generator) if of else None

    return RawPrompt(ids, patches(grids), grids, patches(video_grids), video_grids)


CASES: dict[str, list[tuple[int, ...]]] = {
    "text": [],
    "one image": [(3, 4)],
    "three odd images": [(1, 5), (7, 2), (3, 3)],
}
VIDEO_CASES: dict[str, list[tuple[int, ...]]] = {
    "one video": [(3, 2, 4)],
    "one frame": [(1, 3, 2)],
    "two videos and an image": [(2, 5, 1), (2, 3), (4, 1, 3)],
}


def oracle_logits(oracle: Any, prompt: RawPrompt) -> Tensor:
    """transformers' logits [T, V] for one prompt."""
    with torch.no_grad():
        return oracle(**prompt.oracle_inputs(oracle.config)).logits[0]


def assert_close_to_scale(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """fp32 results of the same mathematics in another order: the largest difference, relative to the largest value."""
    scale = theirs.abs().max()
    error = (ours - theirs).abs().max() / scale
    assert torch.isfinite(ours).all()
    assert error <= tolerance, f"largest difference is {error:.2e} of the scale {scale:.3g}"
