"""A device that is not there: its steps take their time, and none of this machine's cores.

On a machine without a GPU it shows what the host adds: for how long the device would have stood idle before a step,
although there was work. What the host does for a step (scheduling, packing, choosing tokens) is the real thing, but for
its launches, which are made up: each lets go of the interpreter, as a real one does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen3vl_moe.engine import LLM
from qwen3vl_moe.engine.chunks import Decoding, Step
from qwen3vl_moe.engine.runner import Launched, Mark, StepResult
from qwen3vl_moe.inputs.images import Picture, copy_pixels
from qwen3vl_moe.model import Batch, VisionFeatures

# Estimates for an H200: a step of 32 answers takes 14 ms, a prompt with an image 15 more; 80 launches beside a graph,
# and 700 without one. Only ratios of what comes of them mean anything.
_STEP_S, _ANSWER_S, _IMAGE_S = 0.010, 0.000125, 0.015
_LAUNCH_S, _REPLAYED, _EAGER, _MOST_REPLAYED = 8e-6, 80, 700, 2048  # of the host; up to so many tokens from a graph


class PretendedDevice:
    """Takes the place of the device of an engine on a CPU.

    Args:
        llm: its answers are of one token, again and again, from then on.

    Attributes:
        idle: seconds for which the device waited for the host before each step that goes on with an answer.
    """

    def __init__(self, llm: LLM):
        engine = llm.engine
        runner, self._config, self._free_at = engine.runner, engine.model.config, 0.0
        self.idle: list[float] = []
        self._images, self._ends = 0, {}
        self._launch, self._read = runner.launch, runner.read
        [self._token] = llm.get_tokenizer().encode("a", add_special_tokens=False)
        llm.processor.resize_on_device = engine._runs_ahead = True
        for name in ("launch", "read", "encode"):
            setattr(runner, name, getattr(self, name))
        runner.executor.compute = self._compute

    def launch(self, chunks: Step, after: Launched | None = None) -> Launched:
        self._images = 0
        step, now = self._launch(chunks, after), time.perf_counter()
        if isinstance(chunks, Decoding) or not all(chunk.is_prefill for chunk in chunks):
            self.idle.append(max(0.0, now - self._free_at))
        self._free_at = max(now, self._free_at) + _STEP_S + _ANSWER_S * len(chunks) + _IMAGE_S * self._images
        self._ends[id(step)] = self._free_at
        return step

    def read(self, step: Launched) -> StepResult:
        time.sleep(max(0.0, self._ends.pop(id(step)) - time.perf_counter()))
        return self._read(step)

    def encode(self, pictures: Sequence[Picture]) -> tuple[VisionFeatures, dict[str, Mark]]:
        copy_pixels(pictures, "cpu")
        self._images += len(pictures)
        _launches(_REPLAYED)
        count = sum(picture.settings.num_tokens(picture.grid) for picture in pictures)
        width, layers = self._config.text.hidden_size, len(self._config.vision.deepstack_indexes)
        now = time.perf_counter()
        features = VisionFeatures(torch.zeros(count, width), torch.zeros(layers, count, width))
        return features, {"begun": now, "copied": now, "encoded": now}

    def _compute(self, batch: Batch, num_logits: int, **_: Any) -> Tensor:
        _launches(_REPLAYED if len(batch.input_ids_T) <= _MOST_REPLAYED else _EAGER)
        logits_RV = torch.zeros(num_logits, self._config.text.vocab_size)
        logits_RV[:, self._token] = 1.0
        return logits_RV


def _launches(count: int) -> None:
    for _ in range(count):
        until = time.perf_counter() + _LAUNCH_S
        while time.perf_counter() < until:
            pass
        time.sleep(0)  # lets go of the interpreter
