"""Load generators: one request at a time, and a closed loop that keeps a number of requests going."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from benchmarking.inputs import TimedRequest
from benchmarking.statistics import Record
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.engine.sequence import Sequence as EngineSequence
from qwen3vl_moe.inputs.processor import Prompt

_MARKERS = 2  # vision_start and vision_end around every image


def sampling(request: TimedRequest, temperature: float) -> SamplingParams:
    return SamplingParams(max_tokens=request.output_len, temperature=temperature, ignore_eos=True)


def single_stream(llm: LLM, request: TimedRequest, temperature: float = 0.0) -> Record:
    """One request with nothing beside it, from encoded bytes and text to its tokens on the host."""
    wall, start = time.time(), time.perf_counter()
    prompt, preprocess = _prepare(llm, request, ahead=True)
    sequence = llm.engine.request(prompt, sampling(request, temperature), wall)
    llm.engine.add(sequence)
    tracked = _Tracked(start, sequence, preprocess)
    while not sequence.finished:
        llm.engine.step()
        tracked.note(time.perf_counter())
        llm.engine.wait_for_frames()
    if sequence.error is not None:
        raise sequence.error
    return tracked.record()


def _prepare(llm: LLM, request: TimedRequest, ahead: bool = False) -> tuple[Prompt, float]:
    """The prompt of a request, and the seconds of the work on it, but for frames that are decoded afterwards."""
    started = time.perf_counter()
    return llm.processor.chat(request.messages, ahead=ahead), time.perf_counter() - started


@dataclass
class _Tracked:
    """A request in the engine, and when its tokens came."""

    start: float
    sequence: EngineSequence
    preprocess: float
    token_times: list[float] = field(default_factory=list)

    def note(self, now: float) -> None:
        """Called after each step: what the sequence has gained since is on the host now."""
        produced = len(self.sequence.token_ids) - self.sequence.num_prompt_tokens
        self.token_times += [now] * (produced - len(self.token_times))

    def record(self) -> Record:
        images = self.sequence.prompt.images
        vision = sum(image.num_tokens + _MARKERS for image in images)
        text = self.sequence.num_prompt_tokens - vision
        stages = dict(self.sequence.metrics.stages)
        # Whatever of the time before the first step was no work on the prompt was waiting: for a thread, or for a seat.
        waited = stages["preprocess"]  # for frames, while there was nothing to compute
        stages |= {"preprocess": waited + self.preprocess, "queue": stages["queue"] - self.preprocess}
        return Record(self.start, self.token_times, text, vision, stages)


def closed_loop(
    llm: LLM,
    requests: Sequence[TimedRequest],
    max_concurrency: int,
    temperature: float = 0.0,
    threads: int | None = None,
    done: Callable[[], object] = lambda: None,
) -> tuple[list[Record], float]:
    """Run requests, ``max_concurrency`` at a time: whenever one ends, the next is submitted.

    A request's clock starts at its submission; its images are then decoded by a pool of threads beside the engine,
    which takes prompts as they become ready.

    Args:
        requests: all made beforehand, so that making them costs no time here.
        threads: of the pool; None: as many as there are cores, at most 8.
        done: called whenever a request has ended.

    Returns:
        One record per request, in the order in which they ended, and the seconds of the whole run.

    Raises:
        PromptError: a request does not fit; the others are given up.
    """
    todo = deque(requests)
    preparing: dict[Future[tuple[Prompt, float]], tuple[float, float, TimedRequest]] = {}
    running: list[_Tracked] = []
    records: list[Record] = []
    began = time.perf_counter()
    pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1), thread_name_prefix="request")
    try:
        while todo or preparing or running:
            while todo and len(preparing) + len(running) < max_concurrency:
                request = todo.popleft()
                submitted = time.time(), time.perf_counter(), request
                preparing[pool.submit(_prepare, llm, request)] = submitted
            if not running:  # the engine has nothing to do
                wait(preparing, return_when=FIRST_COMPLETED)
            for future in [future for future in preparing if future.done()]:
                wall, start, request = preparing.pop(future)
                prompt, preprocess = future.result()
                sequence = llm.engine.request(prompt, sampling(request, temperature), wall)
                llm.engine.add(sequence)
                running.append(_Tracked(start, sequence, preprocess))
            llm.engine.step()
            now = time.perf_counter()
            for tracked in running:
                tracked.note(now)
            for tracked in [tracked for tracked in running if tracked.sequence.finished]:
                running.remove(tracked)
                records.append(tracked.record())
                done()
        return records, time.perf_counter() - began
    finally:
        # After an error or Ctrl-C nothing stays behind in the engine.
        pool.shutdown(wait=False, cancel_futures=True)
        for tracked in running:
            llm.engine.abort(tracked.sequence)
