"""Ranks that are threads of one process: the arithmetic of many ranks, without starting any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from qwen3vl_moe.ops import Ranks


class ThreadRanks(Ranks):
    """A rank whose messages lie in a list that the others read."""

    def __init__(self, rank: int, size: int, table: list[Any], barrier: threading.Barrier):
        super().__init__(rank, size)
        self._table, self._barrier = table, barrier

    def _all(self, value: Any) -> list[Any]:
        """What each rank has brought."""
        self._table[self.rank] = value
        self._barrier.wait(60)
        everybody = list(self._table)
        self._barrier.wait(60)
        return everybody

    def sum(self, part):
        parts = self._all(part.clone())
        total = parts[0].clone()
        for each in parts[1:]:
            total += each
        return part.copy_(total)

    def columns(self, part_RV, out=None):
        parts = self._all(part_RV.clone())
        return torch.cat(parts, dim=1, out=out) if self.first else part_RV

    def from_first(self, x):
        return x.copy_(self._all(x.clone())[0])

    def exchange(self, send, receive):
        everybody = self._all([None if x is None else x.clone() for x in send])
        for other, x in enumerate(receive):
            if x is not None and x.numel():
                x.copy_(everybody[other][self.rank])

    def least(self, number):
        return min(self._all(number))

    def of_all(self, number):
        return self._all(number)


def on_ranks(size: int, run: Callable[[Ranks], Any]) -> list[Any]:
    """What ``run`` returns on each of ``size`` ranks."""
    table, barrier = [None] * size, threading.Barrier(size)

    def of(rank: int) -> Any:
        try:
            return run(ThreadRanks(rank, size, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(of, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
