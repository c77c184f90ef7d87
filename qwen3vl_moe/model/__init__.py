"""The model definition. Read :mod:`.qwen3vl` first, then :mod:`.text`, :mod:`.vision` and :mod:`.rope`."""

from qwen3vl_moe.model.batch import Batch, VisionFeatures
from qwen3vl_moe.model.qwen3vl import Qwen3VLMoe

__all__ = ["Batch", "Qwen3VLMoe", "VisionFeatures"]
