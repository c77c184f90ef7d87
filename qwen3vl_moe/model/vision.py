"""The vision tower: pixel patches to image tokens and DeepStack features.

A Vision Transformer over patches of all images of a step, packed. Learned position embeddings are interpolated from a
square grid to each image's grid, rows and columns are rotated in (2-D rotary), every frame attends to itself only. The
last block's output is merged 2x2 into the decoder's width; three blocks on the way give the DeepStack features
(arXiv 2406.04334). Checked against transformers 5.17 (``Qwen3VLMoeVisionModel``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_moe import ops
from qwen3vl_moe.config import VisionConfig
from qwen3vl_moe.model.batch import VisionFeatures
from qwen3vl_moe.model.rope import Grid, inverse_frequencies, vision_angles, vision_positions
from qwen3vl_moe.ops import ResidualStream, Segments
from qwen3vl_moe.ops.transfer import all_to_device

_NORM_EPS = 1e-6  # fixed in the published model's code, not in its config


@dataclass(frozen=True)
class PatchPlan:
    """Where the patches of a packed set of images are: all that the tower needs beside their pixels.

    Attributes:
        index_P4, weight_P4: which four of the learned positions a patch mixes (int64), and how (fp32).
        positions_P2: int64 row and column, for the rotation.
        segments: one per frame.
    """

    index_P4: Tensor
    weight_P4: Tensor
    positions_P2: Tensor
    segments: Segments

    @classmethod
    def build(cls, grids: Sequence[Grid], config: VisionConfig, device: torch.device | str = "cpu") -> PatchPlan:
        """The plan of these images; the arithmetic on a grid is done once, on the host, and kept on the device."""
        places = [_places(grid, config.grid_side, config.merge_size, torch.device(device)) for grid in grids]
        index_P4, weight_P4, positions_P2 = places[0] if len(places) == 1 else map(torch.cat, zip(*places, strict=True))
        segments = Segments.build([h * w for t, h, w in grids for _ in range(t)], device=device)
        return cls(index_P4, weight_P4, positions_P2, segments)


@functools.lru_cache(maxsize=32)  # 64 bytes per patch: 4 MB for the largest image
def _places(grid: Grid, side: int, merge_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """index_P4, weight_P4 and positions_P2 of one image.

    Learned positions are sampled bilinearly, corners on corners: patch row r of an image with h rows reads row
    ``r * (side - 1) / (h - 1)`` of the square grid; columns alike.
    """
    # An inference tensor would be unusable outside inference mode, and this result is cached for all callers.
    with torch.inference_mode(False):
        positions_P2 = vision_positions([grid], merge_size)
        source_P2 = positions_P2.numpy().astype(np.float32) * np.float32(side - 1)
        source_P2 /= np.maximum(np.array(grid[1:], np.float32) - 1, 1)
        low_P2 = source_P2.astype(np.int64)
        high_P2 = np.minimum(low_P2 + 1, side - 1)
        part_P2 = source_P2 - low_P2.astype(np.float32)
        rows = (low_P2[:, 0], 1 - part_P2[:, 0]), (high_P2[:, 0], part_P2[:, 0])
        columns = (low_P2[:, 1], 1 - part_P2[:, 1]), (high_P2[:, 1], part_P2[:, 1])
        index_P4 = np.stack([row * side + column for row, _ in rows for column, _ in columns], axis=1)
        weight_P4 = np.stack([of_row * of_column for _, of_row in rows for _, of_column in columns], axis=1)
        made = torch.from_numpy(index_P4), torch.from_numpy(weight_P4), positions_P2
        index, weight, positions = all_to_device(made, device)
        return index, weight, positions


class VisionAttention(nn.Module):
    """Attention within a frame, with rotation by row and column."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PC: Tensor, cos_PF: Tensor, sin_PF: Tensor, segments: Segments) -> Tensor:
        q_PND, k_PND, v_PND = ops.rotate_and_store(self.qkv(x_PC), (self.num_heads, self.num_heads), cos_PF, sin_PF)
        return self.out(ops.attention(q_PND, k_PND, v_PND, segments, causal=False).flatten(1))


class VisionMLP(nn.Module):
    """Two products with GELU between them: the tanh form here, the exact one in the mergers, as published."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        return self.fc2(ops.linear_gelu(x_PC, self.fc1))


class VisionBlock(nn.Module):
    """Attention and MLP; each reads a norm of the residual stream and adds its output to it."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.mlp = VisionMLP(config)

    def forward(self, stream: ResidualStream, cos_PF: Tensor, sin_PF: Tensor, segments: Segments) -> None:
        stream.add(self.attn(stream.normed(self.norm1), cos_PF, sin_PF, segments))
        stream.add(self.mlp(stream.normed(self.norm2)))


class Merger(nn.Module):
    """merge_size x merge_size neighbouring patches -> one token of the decoder's width.

    The final merger norms each patch before they are put side by side; the DeepStack mergers norm the whole row after.
    """

    def __init__(self, config: VisionConfig, *, norm_merged: bool):
        super().__init__()
        self.norm_merged = norm_merged
        self.width = config.merged_width
        self.norm = nn.LayerNorm(self.width if norm_merged else config.hidden_size, eps=_NORM_EPS)
        self.fc1 = nn.Linear(self.width, self.width)
        self.fc2 = nn.Linear(self.width, config.out_hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        x = self.norm(x_PC.view(-1, self.width)) if self.norm_merged else self.norm(x_PC).view(-1, self.width)
        return self.fc2(F.gelu(self.fc1(x)))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        # The checkpoint's Conv3d has stride = kernel, so it is this linear over flattened patches; cuDNN's Conv3d runs
        # many times slower on such shapes.
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size)
        self.pos_embed = nn.Embedding(config.num_positions, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, norm_merged=False)
        self.deepstack_mergers = nn.ModuleList(Merger(config, norm_merged=True) for _ in config.deepstack_indexes)

    def forward(self, pixel_values_PC: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Encode all images of a step in one call.

        Args:
            pixel_values_PC: normalised patches [P, patch_dim] of all images, any float dtype.
            grids: (frames, rows, columns) in patches of each image.

        Returns:
            features of all images, packed; M = P / merge_size**2.

        Raises:
            ValueError: the patches are not as many or as wide as the grids and the config say.
        """
        expected = (sum(t * h * w for t, h, w in grids), self.config.patch_dim)
        if tuple(pixel_values_PC.shape) != expected:
            raise ValueError(f"pixel_values have shape {tuple(pixel_values_PC.shape)}, but the grids say {expected}")
        weight = self.patch_embed.weight
        return self.encode(pixel_values_PC.to(weight), PatchPlan.build(grids, self.config, weight.device))

    def encode(self, pixel_values_PC: Tensor, plan: PatchPlan) -> VisionFeatures:
        """The same with the grid arithmetic done: launches only, in the tower's dtype and on its device."""
        config = self.config
        x_PC = self.patch_embed(pixel_values_PC)
        x_PC = ops.add_positions(x_PC, self.pos_embed.weight, plan.index_P4, plan.weight_P4)
        frequencies = inverse_frequencies(config.head_dim // 2, config.rope_theta, device=x_PC.device)
        cos_PF, sin_PF = vision_angles(plan.positions_P2, frequencies)

        stream, deepstack = ResidualStream(x_PC), []
        for number, block in enumerate(self.blocks):
            block(stream, cos_PF, sin_PF, plan.segments)
            if number in config.deepstack_indexes:
                deepstack.append(self.deepstack_mergers[config.deepstack_indexes.index(number)](stream.total()))
        embeds_MH = self.merger(stream.total())
        none = embeds_MH.new_empty(0, *embeds_MH.shape)
        return VisionFeatures(embeds_MH, torch.stack(deepstack) if deepstack else none)
