"""Requests whose videos are still being decoded: waited for, failed, or no longer wanted."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, wait

from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import UserError

_PATIENCE = 0.02  # seconds until whoever waits looks what other threads have done meanwhile


class Arrivals:
    """Sequences of an engine that lack frames. They may be computed meanwhile, as far as they can."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Look after a sequence, if it lacks frames."""
        if sequence.undecoded:
            self._sequences = [*self._sequences, sequence]

    def failed(self) -> list[tuple[Sequence, UserError]]:
        """Those whose frames cannot be decoded, and why."""
        found = [(sequence, sequence.undecodable) for sequence in self._sequences]
        return [(sequence, error) for sequence, error in found if error is not None]

    def forget(self) -> None:
        """Forget those that have ended, and end the decoding of what they alone wanted; and those that lack nothing."""
        if not self._sequences:
            return
        left = [sequence for sequence in self._sequences if not sequence.finished and sequence.undecoded]
        wanted = {part for sequence in left for part in sequence.undecoded}
        for part in {part for sequence in self._sequences for part in sequence.undecoded} - wanted:
            part.wanted = False
        self._sequences = left

    def wait(self) -> None:
        """Wait until frames are there that were not, or a moment; the time counts as that of making the prompts."""
        sequences, started = self._sequences, time.time()
        wait([part for sequence in sequences for part in sequence.undecoded], _PATIENCE, FIRST_COMPLETED)
        for sequence in sequences:
            sequence.metrics.stages["preprocess"] += time.time() - started
