"""From the files of a checkpoint to a model on its device."""

from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.weights.checkpoint import load_model
from qwen3vl_moe.weights.source import resolve

Qwen3VLMoe.from_pretrained = staticmethod(load_model)  # declared there, where nothing is known of files

__all__ = ["Qwen3VLMoe", "load_model", "resolve"]
