"""Prompts for comparing models: token ids with image placeholders among text, and the pixels that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RawPrompt:
    """One prompt as a model takes it: ids [T], patches [P, patch_dim] or None, grids [(t, h, w), ...]."""

    ids: list[int]
    pixels: Tensor | None
    grids: list[tuple[int, int, int]]

    def oracle_inputs(self, config: Any) -> dict[str, Tensor]:
        """The arguments of transformers' forward and generate."""
        ids = torch.tensor([self.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        if self.pixels is not None:
            inputs |= {"pixel_values": self.pixels, "image_grid_thw": torch.tensor(self.grids)}
        return inputs

    def our_inputs(self) -> tuple:
        """The arguments of ``Qwen3VLMoe.logits``."""
        return self.ids, self.pixels, self.grids or None


def make_prompt(config: Any, images: list[tuple[int, int]], seed: int = 0, text: int = 5) -> RawPrompt:
    """Random text with images of the given sizes (rows, columns in merged tokens) between its pieces."""
    generator = torch.Generator().manual_seed(seed)
    vision = config.vision_config
    merge = vision.spatial_merge_size

    def words() -> list[int]:
        return torch.randint(0, 400, (text,), generator=generator).tolist()

    ids, grids = words(), []
    for rows, columns in images:
        placeholders = [config.image_token_id] * (rows * columns)
        ids += [config.vision_start_token_id, *placeholders, config.vision_end_token_id, *words()]
        grids.append((1, rows * merge, columns * merge))
    patches = sum(t * h * w for t, h, w in grids)
    patch_dim = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches, patch_dim, generator=generator) if grids else None
    return RawPrompt(ids, pixels, grids)


CASES: dict[str, list[tuple[int, int]]] = {
    "text": [],
    "one image": [(3, 4)],
    "three odd images": [(1, 5), (7, 2), (3, 3)],
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
