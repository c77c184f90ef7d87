"""A step of training, repeated as one CUDA graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from demo_training.pictures import Tensors

WARM_UP = 3
AHEAD = 2  # steps that the host may be ahead of the device: more would make a schedule by the clock wrong


class Repeated:
    """``function(batch) -> tensors``, captured on a GPU in its first call and replayed from then on.

    The function has to launch the same work for every batch and read nothing back. Its first batch is learned from
    WARM_UP times more, at the rate of the first step.
    """

    def __init__(self, function: Callable[[Any], Sequence[Tensor]], device: torch.device, graphs: bool = True):
        self._function, self._device = function, device
        self._graphs = graphs and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pending: deque[torch.cuda.Event] = deque()

    def __call__(self, batch: Tensors) -> Sequence[Tensor]:
        """The results; on a GPU they are overwritten by the next call."""
        if not self._graphs:
            return self._function(batch.to(self._device))
        if self._graph is None:
            self._capture(batch.to(self._device))
        if len(self._pending) == AHEAD:
            self._pending.popleft().synchronize()
        for own, new in zip(self._batch.flat(), batch.flat(), strict=True):
            own.copy_(new, non_blocking=True)
        self._graph.replay()
        self._pending.append(torch.cuda.Event())
        self._pending[-1].record()
        return self._results

    def _capture(self, batch: Tensors) -> None:
        self._batch = batch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._function(batch)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # By thread: another one pins the memory of the next batches meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = self._function(batch)
