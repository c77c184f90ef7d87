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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_moe.config import VisionConfig
from qwen3vl_moe.model.attention import attention, runs_kernels
from qwen3vl_moe.model.batch import Segments, VisionFeatures, to_device
from qwen3vl_moe.model.rope import Grid, inverse_frequencies, rotate, vision_angles, vision_positions

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
        joined = places[0] if len(places) == 1 else map(torch.cat, zip(*places, strict=True))
        return cls(*joined, Segments.build([h * w for t, h, w in grids for _ in range(t)], device=device))


@functools.lru_cache(maxsize=32)  # a picture of the largest size takes 4 MB of them
def _places(grid: Grid, side: int, merge_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """index_P4, weight_P4 and positions_P2 of one image.

    Learned positions are sampled bilinearly, corners on corners: patch row r of an image with h rows reads row
    ``r * (side - 1) / (h - 1)`` of the square grid; columns alike.
    """
    with torch.inference_mode(False):  # whoever asks first: what is kept has to serve everybody
        positions_P2 = vision_positions([grid], merge_size)
        source_P2 = positions_P2.float() * (side - 1) / (torch.tensor(grid[1:]) - 1).clamp(min=1)
        low_P2 = source_P2.long()
        high_P2 = (low_P2 + 1).clamp(max=side - 1)
        part_P2 = source_P2 - low_P2
        rows = (low_P2[:, 0], 1 - part_P2[:, 0]), (high_P2[:, 0], part_P2[:, 0])
        columns = (low_P2[:, 1], 1 - part_P2[:, 1]), (high_P2[:, 1], part_P2[:, 1])
        index_P4 = torch.stack([row * side + column for row, _ in rows for column, _ in columns], dim=1)
        weight_P4 = torch.stack([of_row * of_column for _, of_row in rows for _, of_column in columns], dim=1)
        return to_device(index_P4, device), to_device(weight_P4, device), to_device(positions_P2, device)


def mix_positions(table_SC: Tensor, index_P4: Tensor, weight_P4: Tensor) -> Tensor:
    """Weighted sum of four learned positions per patch, fp32 [P, C]; corner by corner, to keep memory at one [P, C]."""
    out_PC = table_SC[index_P4[:, 0]] * weight_P4[:, :1]
    for corner in range(1, 4):
        out_PC += table_SC[index_P4[:, corner]] * weight_P4[:, corner, None]
    return out_PC


def add_positions(x_PC: Tensor, table_SC: Tensor, plan: PatchPlan) -> Tensor:
    """Patches with their learned positions."""
    if runs_kernels(x_PC):
        from qwen3vl_moe.model import vision_ops  # needs triton, which a CPU may lack

        return vision_ops.add_positions(x_PC, table_SC, plan.index_P4, plan.weight_P4)
    return x_PC + mix_positions(table_SC, plan.index_P4, plan.weight_P4).to(x_PC.dtype)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_PC: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        qkv = self.qkv(x_PC)
        if runs_kernels(x_PC):
            from qwen3vl_moe.model.fused_ops import norm_rotate_store  # needs triton, which a CPU may lack

            q, k, v = norm_rotate_store(qkv, (self.num_heads, self.num_heads), cos, sin)
        else:
            q, k, v = qkv.view(len(x_PC), 3, self.num_heads, -1).unbind(1)
            # The rotation is done in fp32: its angles are large and bf16 would round them away.
            q, k = (rotate(x.float(), cos, sin).to(x_PC.dtype) for x in (q, k))
        return self.out(attention(q, k, v, segments, causal=False).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_PC: Tensor) -> Tensor:
        if runs_kernels(x_PC):
            # cuBLAS applies the (tanh) GELU while the product is still in registers.
            return self.fc2(torch._addmm_activation(self.fc1.bias, x_PC, self.fc1.weight.T, use_gelu=True))
        return self.fc2(F.gelu(self.fc1(x_PC), approximate="tanh"))


def add_norm(x_PC: Tensor, y_PC: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream (None: nothing yet), and norm the sum for the next one."""
    if runs_kernels(x_PC):
        from qwen3vl_moe.model import fused_ops  # needs triton, which a CPU may lack

        return fused_ops.add_norm(x_PC, y_PC, norm.weight, norm.eps, norm.bias)
    x_PC = x_PC if y_PC is None else x_PC + y_PC
    return x_PC, norm(x_PC)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_NORM_EPS)
        self.mlp = VisionMLP(config)

    def forward(
        self, x_PC: Tensor, y_PC: Tensor | None, cos: Tensor, sin: Tensor, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what the block before left to add to it; returns the same of this block."""
        x_PC, normed_PC = add_norm(x_PC, y_PC, self.norm1)
        x_PC, normed_PC = add_norm(x_PC, self.attn(normed_PC, cos, sin, segments), self.norm2)
        return x_PC, self.mlp(normed_PC)


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
        x_PC = add_positions(x_PC, self.pos_embed.weight, plan)
        frequencies = inverse_frequencies(config.head_dim // 2, config.rope_theta, device=x_PC.device)
        cos, sin = vision_angles(plan.positions_P2, frequencies)

        deepstack, y_PC = [], None
        for number, block in enumerate(self.blocks):
            x_PC, y_PC = block(x_PC, y_PC, cos, sin, plan.segments)
            if number in config.deepstack_indexes:
                deepstack.append(self.deepstack_mergers[config.deepstack_indexes.index(number)](x_PC + y_PC))
        embeds_MH = self.merger(x_PC + y_PC)
        none = embeds_MH.new_empty(0, *embeds_MH.shape)
        return VisionFeatures(embeds_MH, torch.stack(deepstack) if deepstack else none)
