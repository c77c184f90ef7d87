"""transformers' processor with its video part, which needs torchvision for four functions; and videos for both."""

from __future__ import annotations

import importlib.util
import types
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3VLProcessor, image_processing_backends, video_processing_utils
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from qwen3vl_moe.inputs.processor import Processor
from tests.pictures import transformers_images


def _resize(video: torch.Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> torch.Tensor:
    """torchvision's for frames in 8 bits, of which it leaves all to torch."""
    assert interpolation == "bicubic"
    if video.shape[-2:] == torch.Size(size):
        return video
    flat = video.reshape(-1, *video.shape[-3:])
    made = F.interpolate(flat, size=size, mode=interpolation, align_corners=False, antialias=antialias)
    return made.reshape(*video.shape[:-2], *size)


def _normalize(video: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    mean, std = (torch.as_tensor(each, dtype=video.dtype).view(-1, 1, 1) for each in (mean, std))
    return (video - mean) / std


def with_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers' video processor calls of torchvision, where that is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    functions = types.SimpleNamespace(
        resize=_resize,
        normalize=_normalize,
        grayscale_to_rgb=lambda video: video,
        InterpolationMode=types.SimpleNamespace(BILINEAR="bilinear", BICUBIC="bicubic", LANCZOS="lanczos"),
    )
    monkeypatch.setattr(image_processing_backends, "tvF", functions, raising=False)
    monkeypatch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", {3: "bicubic"})
    monkeypatch.setattr(video_processing_utils, "tvF", functions, raising=False)


class WholeProcessor(Qwen3VLProcessor):
    """With a tokenizer of any class."""

    def check_argument_for_proper_class(self, *_):
        pass


def oracle_for(processor: Processor, **options: Any) -> WholeProcessor:
    """transformers' processor of the same settings."""
    image, video = processor.image_settings, processor.video_settings
    videos = Qwen3VLVideoProcessor(
        size={"shortest_edge": video.min_pixels, "longest_edge": video.max_pixels},
        cap_pixels_per_frame=video.frame_tokens is not None,
        max_video_tokens=video.frame_tokens or 768,
        image_mean=list(image.mean),
        image_std=list(image.std),
        **{name: asdict(image)[name] for name in ("patch_size", "temporal_patch_size", "merge_size")},
        **options,
    )
    images = transformers_images(image)
    return WholeProcessor(images, processor.tokenizer, videos, chat_template=processor.chat_template)


def clip(frames: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Noise, uint8 [frames, height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
