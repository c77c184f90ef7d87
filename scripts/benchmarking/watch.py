"""What would make a figure another's than the engine's: kernels that compile while it is taken, and long stalls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_moe import LLM

STALL_SECONDS = 0.25


@dataclass
class Watch:
    """While it is open, counts compiled kernels, and names what lies between steps that end long after each other.

    Attributes:
        compiled: names of kernels that were compiled, or loaded from Triton's cache, since.
        stalls: seconds, and what happened in them.
    """

    llm: LLM
    clock: Callable[[], float] = time.perf_counter
    compiled: list[str] = field(default_factory=list)
    stalls: list[tuple[float, str]] = field(default_factory=list)

    def __enter__(self) -> Watch:
        engine, runner = self.llm.engine, self.llm.engine.runner
        step, launch = engine.step, runner.launch
        last, chunks = None, []

        def noted_launch(launched: list, *args: Any) -> Any:
            chunks.extend(launched)
            return launch(launched, *args)

        def noted_step() -> None:
            nonlocal last
            began, compiled = self.clock(), len(self.compiled)
            chunks.clear()
            waited = began - last if last is not None else 0.0
            step()
            ended = self.clock()
            if ended - began + waited > STALL_SECONDS:
                new = self.compiled[compiled:]
                self.stalls.append((ended - began + waited, _cause(new, chunks, waited, ended - began)))
            # With nobody left to wait, whatever comes before the next step is no stall.
            last = ended if engine.scheduler.running or engine.scheduler.waiting else None

        engine.step, runner.launch = noted_step, noted_launch
        self._undo = lambda: (engine.__dict__.pop("step"), runner.__dict__.pop("launch"))
        self._watch_compiler(lambda **made: self.compiled.append(made["fn"].name))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo()
        self._watch_compiler(None)

    def lines(self) -> list[str]:
        """For people."""
        names = ", ".join(f"{name} ({self.compiled.count(name)})" for name in dict.fromkeys(self.compiled))
        return [
            f"kernels compiled after the warm-up: {names or 'none'}",
            f"stalls over {1e3 * STALL_SECONDS:.0f} ms: {'none' if not self.stalls else ''}".rstrip(),
            *(f"  {1e3 * seconds:.0f} ms: {cause}" for seconds, cause in self.stalls),
        ]

    @staticmethod
    def _watch_compiler(hook: Callable[..., None] | None) -> None:
        try:
            from triton import knobs
        except ImportError:  # no kernels, then
            return
        knobs.runtime.jit_post_compile_hook = hook


def _cause(compiled: list[str], chunks: list, waited: float, seconds: float) -> str:
    if compiled:
        return f"compiling {', '.join(dict.fromkeys(compiled))}"
    if waited > seconds:
        return f"{1e3 * waited:.0f} ms between two steps: the engine was not called"
    prompt = sum(chunk.stop - chunk.start for chunk in chunks if chunk.is_prefill)
    images = sum(len(chunk.sequence.images_in(chunk.start, chunk.stop)) for chunk in chunks)
    return f"steps of {prompt} prompt tokens, {images} images, {sum(not c.is_prefill for c in chunks)} decoding"
