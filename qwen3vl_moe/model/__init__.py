"""The model definition: positions, attention, both towers."""

from qwen3vl_moe.model.batch import Batch, Segments, VisionFeatures
from qwen3vl_moe.model.qwen3vl import Qwen3VLMoe, resolve_moe

__all__ = ["Batch", "Qwen3VLMoe", "Segments", "VisionFeatures", "resolve_moe"]
