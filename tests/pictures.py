"""Pictures to test with: noisy ones, encoded files of them, and how this package reads either."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen3vl_moe.inputs.image_source import decode_rgb, open_image
from qwen3vl_moe.inputs.images import ImageSettings


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of smooth colours and noise: flat or pure-noise images would hide mistakes of the resize."""
    generator = np.random.default_rng(width * 1000 + height)
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1)
    pixels = (smooth + generator.integers(0, 64, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb(source) -> Image.Image:
    return decode_rgb(open_image(source, 0))


def transformers_images(settings: ImageSettings) -> Qwen2VLImageProcessorPil:
    """transformers' image processor (the one that needs no torchvision) with the same settings."""
    return Qwen2VLImageProcessorPil(
        patch_size=settings.patch_size,
        temporal_patch_size=settings.temporal_patch_size,
        merge_size=settings.merge_size,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels},
    )
