"""Qwen3-VL-MoE: both towers, the whole forward, logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tma_moe
import torch
from torch import Tensor, nn

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model.batch import Batch, Segments, VisionFeatures
from qwen3vl_moe.model.rope import Grid, mrope_positions
from qwen3vl_moe.model.text import Decoder
from qwen3vl_moe.model.vision import VisionTower
from qwen3vl_moe.placement import parse_device, require_memory

MOE_BACKENDS = ("auto", "tma", "reference")


def resolve_moe(moe: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """``"tma"`` or ``"reference"`` for a device and dtype; ``"auto"`` takes the fused kernel where it can run.

    Raises:
        OptionError: an unknown name, or ``"tma"`` where something that it needs is missing.
    """
    if moe not in MOE_BACKENDS:
        raise OptionError(f"moe={moe!r} is unknown; choose from {', '.join(MOE_BACKENDS)}")
    if moe == "reference":
        return moe
    reason = tma_moe.unavailable(torch.device(device), dtype)
    if reason is None:
        return "tma"
    if moe == "tma":
        raise OptionError(f"moe='tma' cannot run here: {reason}; use moe='auto' or moe='reference'")
    return "reference"


class Qwen3VLMoe(nn.Module):
    """The model. Build it with :meth:`from_pretrained` or :meth:`random`; the constructor leaves weights as they come.

    Args:
        config: sizes.
        moe: which implementation of the experts the layers call, ``"tma"`` or ``"reference"``.
    """

    def __init__(self, config: Qwen3VLMoeConfig, moe: str = "reference"):
        super().__init__()
        self.config, self.moe = config, moe
        self.vision = VisionTower(config.vision)
        self.text = Decoder(config.text, moe)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        moe: str = "auto",
        *,
        expert_layout: str | None = None,
        progress: bool = True,
    ) -> Qwen3VLMoe:
        """Load a Hugging Face checkpoint, a local directory or a hub id: :func:`qwen3vl_moe.checkpoint.load_model`."""
        from qwen3vl_moe.checkpoint import load_model  # the loader imports the model

        return load_model(path, device=device, dtype=dtype, moe=moe, expert_layout=expert_layout, progress=progress)

    @classmethod
    def random(
        cls,
        config: Qwen3VLMoeConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        moe: str = "auto",
    ) -> Qwen3VLMoe:
        """Random weights at any size, made on the device: N(0, 0.02) matrices, norms at 1, biases at 0.

        For measurements without the real weights: the work per token is the same, the text is noise.

        Raises:
            OptionError: an unknown or unavailable device or moe; not enough memory.
        """
        device, dtype = parse_device(device), dtype or config.dtype
        with torch.device("meta"):
            model = cls(config, resolve_moe(moe, device, dtype)).to(dtype)
        require_memory(device, sum(parameter.nbytes for parameter in model.parameters()), "a model of this size", dtype)
        model = model.to_empty(device=device)
        generator = torch.Generator(device=device).manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        return model

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @torch.no_grad()
    def encode_images(self, pixel_values_PC: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Features of one or more images in one packed call: see :meth:`VisionTower.forward`."""
        return self.vision(pixel_values_PC.to(self.device, non_blocking=True), grids)

    @torch.no_grad()
    def forward(self, batch: Batch, kv_cache: Tensor | None = None) -> Tensor:
        """Logits of one packed step, [R, V] in the model's dtype (R: ``batch.logit_rows``, or all T rows).

        Args:
            batch: the step.
            kv_cache: [L, 2, blocks, block_size, G, D] in the model's dtype, updated in place at ``batch.slots_T``;
                None attends within the batch only.
        """
        return self.lm_head(self.text(batch, kv_cache))

    def logits(
        self,
        input_ids_T: Tensor | Sequence[int],
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | Sequence[Grid] | None = None,
    ) -> Tensor:
        """Logits [T, V] at every position of one sequence, without a cache: the plain door for parity checks.

        Args:
            input_ids_T: token ids with each image's placeholders expanded (one per merged token).
            pixel_values: [P, patch_dim] patches of all images.
            image_grid_thw: (frames, rows, columns) in patches per image.

        Raises:
            ValueError: placeholders, grids and patches do not match.
        """
        ids = torch.as_tensor(input_ids_T, dtype=torch.int64)
        grids = [] if image_grid_thw is None else [tuple(grid) for grid in torch.as_tensor(image_grid_thw).tolist()]
        if (pixel_values is None) != (not grids):
            raise ValueError("pixel_values and image_grid_thw go together: pass both or neither")
        config = self.config
        positions_3T, _ = mrope_positions(ids.tolist(), grids, config.vision.merge_size, config.image_token_id)
        batch = Batch(
            input_ids_T=ids.to(self.device),
            positions_3T=positions_3T.to(self.device),
            segments=Segments.build([len(ids)], device=self.device),
            visual_rows=(ids == config.image_token_id).nonzero().flatten().to(self.device) if grids else None,
            visual=self.encode_images(pixel_values, grids) if grids else None,
        )
        return self(batch)
