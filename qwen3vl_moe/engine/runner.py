"""One step on the device: encode its images and videos, pack its tokens into a batch, run the model, choose tokens."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qwen3vl_moe.engine.chunks import Chunk, Decoding, Step
from qwen3vl_moe.engine.executor import Executor
from qwen3vl_moe.engine.packing import Packer
from qwen3vl_moe.engine.sampler import SamplingPlan, TokenLogprob, readable, sample, token_logprobs
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.inputs.images import Picture, copy_pixels, cut_patches
from qwen3vl_moe.model import VisionFeatures
from qwen3vl_moe.ops.transfer import to_device

Mark = torch.cuda.Event | float
_PROMPT_LOGIT_ROWS = 256  # logits held at once for prompt_logprobs: 150 MB in fp32 at the published vocabulary


@dataclass
class ChunkResult:
    """What one chunk gave: the next token if it reached the sequence's end, and log-probabilities if asked for.

    ``highest_logit`` is not finite where the token means nothing (see :func:`.sampler.sample`).
    """

    token_id: int | None = None
    highest_logit: float = 0.0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)


@dataclass(frozen=True)
class Launched:
    """A step that the device may still be working on.

    Attributes:
        chunks: what it computes.
        tokens_R: int64 on the device, the next token of each chunk that samples.
        host_tokens_R: the same on the host, valid once the last mark is reached.
        host_highest_R: fp32 on the host, the highest logit of each of them; so is this.
        asked: which of them log-probabilities are asked for, and of how many other tokens.
        logprobs: these, of :func:`.sampler.token_logprobs`, on the host; so are they.
        prompt_logprobs: of chunks for which they are asked for, by their number.
        encoded: the sequences whose images it encodes.
        marks: points in the device's work: where copying pixels, encoding and the decoder begin and end.
        started: when the host began with it, in seconds since the epoch.
    """

    chunks: Step
    tokens_R: Tensor
    host_tokens_R: Tensor
    host_highest_R: Tensor
    asked: list[tuple[int, int]]
    logprobs: tuple[Tensor, ...]
    prompt_logprobs: dict[int, list[list[TokenLogprob]]]
    encoded: list[Sequence]
    marks: dict[str, Mark]
    started: float

    @property
    def in_vain(self) -> bool:
        """Whether all of its sequences have ended meanwhile."""
        return all(chunk.sequence.finished for chunk in self.chunks)


@dataclass(frozen=True)
class StepResult:
    """What a step gave.

    Attributes:
        tokens_R: int64, the next token of each chunk that samples, one after the other.
        highest_R: fp32, the highest logit of each of these (see :func:`.sampler.sample`).
        logprobs: of those of them for which they are asked for, by their number.
        prompt_logprobs: of chunks for which they are asked for, by their number.
        encoded: the sequences whose images were encoded.
        seconds: of parts of the step: ``host_to_device`` (pixels), ``vision`` and ``sample`` (from logits to tokens on
            the host).
    """

    tokens_R: np.ndarray
    highest_R: np.ndarray
    logprobs: dict[int, list[TokenLogprob]]
    prompt_logprobs: dict[int, list[list[TokenLogprob]]]
    encoded: list[Sequence]
    seconds: dict[str, float]

    def of(self, number: int, row: int | None) -> ChunkResult:
        """The part of one chunk.

        Args:
            number: of the chunk.
            row: its number among those that sample; None if it does not.
        """
        prompt_logprobs = self.prompt_logprobs.get(number, [])
        if row is None:
            return ChunkResult(prompt_logprobs=prompt_logprobs)
        return ChunkResult(int(self.tokens_R[row]), float(self.highest_R[row]), self.logprobs.get(row), prompt_logprobs)


class Runner:
    """Runs steps, and chooses tokens.

    Args:
        executor: what computes.
        block_size: of the cache whose blocks the sequences' block tables name.
        seed: of tokens whose request has none.

    Attributes:
        replays: set to False to launch every kernel of the steps that follow, as a debugger or a hook needs.
    """

    def __init__(self, executor: Executor, block_size: int, seed: int):
        self.executor, self.model, self.replays = executor, executor.model, True
        self._packer, self._plan = Packer(block_size), SamplingPlan.of([], self.model.device)
        self._generator = torch.Generator(self.model.device).manual_seed(seed)

    @torch.inference_mode()
    def launch(self, chunks: Step, after: Launched | None = None) -> Launched:
        """Start to compute the chunks and to write them into the cache; their tokens are chosen on the device.

        Args:
            chunks: at least one.
            after: the step before, if its tokens have not been read: the chunks then begin with them.
        """
        started = time.time()
        encoded, marks, spans, prompt_rows = [], {}, {}, []
        if isinstance(chunks, Decoding):
            sequences, sample_rows = chunks.sequences, list(range(len(chunks)))
        else:
            reading = {n: chunk for n, chunk in enumerate(chunks) if chunk.start < chunk.sequence.num_prompt_tokens}
            encoded, marks = self._encode_images(list(reading.values()))
            spans = {number: _prompt_logprob_span(chunk) for number, chunk in reading.items()}
            begins = [0, *itertools.accumulate(chunk.stop - chunk.start for chunk in chunks)]
            sequences = [chunk.sequence for chunk in chunks if chunk.samples]
            sample_rows = [stop - 1 for chunk, stop in zip(chunks, begins[1:], strict=True) if chunk.samples]
            prompt_rows = [begins[i] + place - chunks[i].start for i, span in spans.items() for place in span]
        sampled_T = None if after is None else _sampled_for(sequences, after)
        batch = self._packer.pack(chunks, sample_rows + prompt_rows, sampled_T)
        logits_RV = self.executor.compute(batch, len(sequences), replay=self.replays and not prompt_rows)
        tokens_R = host_tokens_R = torch.empty(0, dtype=torch.int64)
        host_highest_R = torch.empty(0)
        asked: list[tuple[int, int]] = []
        logprobs: tuple[Tensor, ...] = ()
        if sequences:
            marks["computed"] = _now(self.model.device)
            if not self._plan.serves(sequences, pending=sampled_T is not None):
                self._plan = SamplingPlan.of(sequences, self.model.device, sampled_T)
            tokens_R, highest_R = sample(logits_RV, self._plan, self._generator)
            host_tokens_R, host_highest_R = _to_host(tokens_R), _to_host(highest_R)
            if asked := self._plan.asked:
                rows = to_device(torch.tensor([row for row, _ in asked]), tokens_R.device)
                most = max(_num_top(count, logits_RV) for _, count in asked)
                logprobs = tuple(map(_to_host, token_logprobs(logits_RV[rows], tokens_R[rows], most)))
            marks["sampled"] = _now(self.model.device)
        prompt_logprobs, row = {}, len(sequences)
        for number, span in spans.items() if prompt_rows else ():
            prompt_logprobs[number] = self._prompt_logprobs(row, chunks[number].sequence, span)
            row += len(span)
        return Launched(
            chunks, tokens_R, host_tokens_R, host_highest_R, asked, logprobs, prompt_logprobs, encoded, marks, started
        )

    @torch.inference_mode()
    def read(self, step: Launched) -> StepResult:
        """Wait for a step's tokens, if it gives any, and for nothing that was launched after it."""
        last = list(step.marks.values())[-1:]
        if last and isinstance(last[0], torch.cuda.Event):
            with self.executor.together():
                last[0].synchronize()
        logprobs = {
            row: entry if count == -1 else entry[: 1 + count]
            for (row, count), entry in zip(step.asked, readable(step.logprobs), strict=True)
        }
        seconds = {
            stage: seconds_between(step.marks[start], step.marks[stop]) if start in step.marks else 0.0
            for stage, start, stop in (
                ("host_to_device", "begun", "copied"),
                ("vision", "copied", "encoded"),
                ("sample", "computed", "sampled"),
            )
        }
        tokens_R, highest_R = step.host_tokens_R.numpy(), step.host_highest_R.numpy()
        return StepResult(tokens_R, highest_R, logprobs, step.prompt_logprobs, step.encoded, seconds)

    def _encode_images(self, chunks: list[Chunk]) -> tuple[list[Sequence], dict[str, Mark]]:
        """Vision features of all images that the step needs and that have none yet; whose they are, and when."""
        todo = [
            (chunk.sequence, number, image)
            for chunk in chunks
            for number, image in chunk.sequence.images_in(chunk.start, chunk.stop)
            if chunk.sequence.features[number] is None
        ]
        if not todo:
            return [], {}
        features, marks = self.encode([image.picture for _, _, image in todo])
        start = 0
        for sequence, number, image in todo:
            sequence.features[number] = features.rows(start, start + image.num_tokens)
            start += image.num_tokens
        return [sequence for sequence, _, _ in todo], marks

    def encode(self, pictures: list[Picture]) -> tuple[VisionFeatures, dict[str, Mark]]:
        """Features of pictures in one packed call, replayed from a graph where they are few.

        Also returns when, in the device's work, it was begun, their pixels were copied, and they were encoded.
        """
        device = self.model.device
        marks = {"begun": _now(device)}
        pixels = copy_pixels(pictures, device)
        marks["copied"] = _now(device)
        grids = [picture.grid for picture in pictures]
        pixel_values_PC = cut_patches(pixels, pictures, self.model.dtype)
        del pixels  # before the tower needs the memory
        features = self.executor.encode(pixel_values_PC, grids, self.replays)
        marks["encoded"] = _now(device)
        return features, marks

    def _prompt_logprobs(self, first_row: int, sequence: Sequence, span: range) -> list[list[TokenLogprob]]:
        """Log-probabilities of the tokens after each position of a span, which begins at a row of the step."""
        entries: list[list[TokenLogprob]] = []
        for start in range(0, len(span), _PROMPT_LOGIT_ROWS):
            places = span[start : start + _PROMPT_LOGIT_ROWS]
            targets = torch.tensor([sequence.token_ids[place + 1] for place in places], device=self.model.device)
            row = first_row + start
            logits_RV = self.executor.logits(slice(row, row + len(places)))
            most = _num_top(sequence.params.prompt_logprobs, logits_RV)
            entries += readable(token_logprobs(logits_RV, targets, most))
        return entries


def _sampled_for(sequences: list[Sequence], step: Launched) -> Tensor:
    """The next tokens, int64 [T] on the device, that a step gives to sequences in it."""
    if isinstance(step.chunks, Decoding):
        sampling = step.chunks.sequences
    else:
        sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
    if sequences == sampling:
        return step.tokens_R
    row_of = {sequence: row for row, sequence in enumerate(sampling)}
    return step.tokens_R[to_device(torch.tensor([row_of[sequence] for sequence in sequences]), step.tokens_R.device)]


def _to_host(x: Tensor) -> Tensor:
    """A copy on the host, valid once the device has reached the next mark."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _num_top(asked: int | None, logits_RV: Tensor) -> int:
    """How many of the most likely tokens a request wants to know of."""
    return logits_RV.shape[1] if asked == -1 else asked or 0


def _now(device: torch.device) -> Mark:
    """A point in the device's work, taken without making the host wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Mark, stop: Mark) -> float:
    """Between two marks that the device has reached."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(stop, torch.cuda.Event)  # marks of one device are of one kind
        return start.elapsed_time(stop) / 1000
    assert isinstance(stop, float)
    return stop - start


def _prompt_logprob_span(chunk: Chunk) -> range:
    """Positions of a chunk whose logits give a prompt log-probability that is not known yet."""
    sequence = chunk.sequence
    if sequence.params.prompt_logprobs is None:
        return range(0)
    return range(max(chunk.start, len(sequence.prompt_logprobs) - 1), min(chunk.stop, sequence.num_prompt_tokens - 1))
