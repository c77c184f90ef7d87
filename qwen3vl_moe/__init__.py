"""Qwen3-VL-MoE: the model and its offline engine."""

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.model import Qwen3VLMoe

__all__ = ["LLM", "Qwen3VLMoe", "Qwen3VLMoeConfig", "SamplingParams"]
