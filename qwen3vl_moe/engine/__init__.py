"""The engine: prompts in, answers out. Start at :mod:`qwen3vl_moe.engine.llm`."""

from qwen3vl_moe.engine.llm import LLM
from qwen3vl_moe.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from qwen3vl_moe.engine.params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "SamplingParams"]
