"""One step on the device: encode its images, pack its tokens into a batch, run the model, choose tokens."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from qwen3vl_moe.engine.kv_cache import KVCache
from qwen3vl_moe.engine.sampler import TokenLogprob, sample, token_logprobs
from qwen3vl_moe.engine.scheduler import Chunk
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.images import Picture, copy_pixels, cut_patches
from qwen3vl_moe.model import Batch, Qwen3VLMoe, Segments, VisionFeatures
from qwen3vl_moe.model.graphs import StepGraphs, VisionGraphs, can_capture
from qwen3vl_moe.params import EngineOptions

_GRAPH_BYTES = 3 << 30  # what all graphs of the published model take
_PROMPT_LOGIT_ROWS = 256  # logits held at once for prompt_logprobs: 150 MB in fp32 at the published vocabulary


@dataclass
class ChunkResult:
    """What one chunk gave: the next token if it reached the sequence's end, and log-probabilities if asked for."""

    token_id: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """One result per chunk; the sequences whose images were encoded; and seconds of parts of the step.

    ``seconds`` has the keys ``host_to_device`` (pixels), ``vision`` and ``sample`` (from logits to tokens on the host).
    """

    results: list[ChunkResult]
    encoded: list[Sequence]
    seconds: dict[str, float]


class Runner:
    """Runs steps of a model over one cache.

    Args:
        model: any device and dtype.
        cache: the cache whose blocks the sequences' block tables name.
        options: of the engine.
        max_model_len: most tokens of a sequence.

    Attributes:
        replays: set to False to launch every kernel of the steps that follow, as a debugger or a hook needs.
    """

    def __init__(self, model: Qwen3VLMoe, cache: KVCache, options: EngineOptions, max_model_len: int):
        self.model, self.cache, self.replays = model, cache, True
        self._generator = torch.Generator(model.device).manual_seed(options.seed)
        self._steps: StepGraphs | None = None
        self._images: VisionGraphs | None = None
        if uses_graphs(model, options):
            self._steps = StepGraphs(model, cache.tensor, options.max_num_seqs, max_model_len)
            self._images = VisionGraphs(model)

    @torch.inference_mode()
    def warm_up(self, progress: bool) -> None:
        """Compile and capture before the first request what a step of any small shape will replay."""
        if self._steps is not None:
            with tqdm(total=len(self._steps) + len(self._images), desc="CUDA graphs", disable=not progress) as bar:
                for graphs in (self._steps, self._images):
                    for _ in graphs.capture_all():
                        bar.update()

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> StepResult:
        """Compute the chunks and write them into the cache."""
        encoded, marks = self._encode_images(chunks)
        sampling = [number for number, chunk in enumerate(chunks) if chunk.samples]
        spans = [_prompt_logprob_span(chunk) for chunk in chunks]
        begins = [0, *itertools.accumulate(chunk.stop - chunk.start for chunk in chunks)]
        sample_rows = [begins[number + 1] - 1 for number in sampling]
        prompt_rows = [begins[i] + place - chunks[i].start for i, span in enumerate(spans) for place in span]
        batch = self._pack(chunks, sample_rows + prompt_rows)
        results = [ChunkResult() for _ in chunks]
        replayed = self.replays and self._steps is not None and not prompt_rows
        logits_RV = self._steps.run(batch) if replayed else None
        hidden_RH = None
        if logits_RV is None:
            hidden_RH = self.model.text(batch.to(self.model.device), self.cache.tensor)
            logits_RV = self.model.lm_head(hidden_RH[: len(sampling)])
        if sampling:
            sequences = [chunks[number].sequence for number in sampling]
            computed = _now(self.model.device)
            self._sample(logits_RV, sequences, [results[number] for number in sampling])
            sampled = _now(self.model.device)
        row = len(sampling)
        for chunk, span, result in zip(chunks, spans, results, strict=True):
            if not span:
                continue
            result.prompt_logprobs = self._prompt_logprobs(hidden_RH[row : row + len(span)], chunk.sequence, span)
            row += len(span)
        # Read only now: asking a mark for its time waits for the device.
        seconds = {
            "host_to_device": _seconds(marks[0], marks[1]) if encoded else 0.0,
            "vision": _seconds(marks[1], marks[2]) if encoded else 0.0,
            "sample": _seconds(computed, sampled) if sampling else 0.0,
        }
        return StepResult(results, encoded, seconds)

    def _encode_images(self, chunks: list[Chunk]) -> tuple[list[Sequence], list[torch.cuda.Event | float]]:
        """Vision features of all images that the step needs and that have none yet; whose they are, and when."""
        todo = [
            (chunk.sequence, number, image)
            for chunk in chunks
            for number, image in chunk.sequence.images_in(chunk.start, chunk.stop)
            if chunk.sequence.features[number] is None
        ]
        marks = []
        if todo:
            features, marks = self.encode([image.picture for _, _, image in todo])
            start = 0
            for sequence, number, image in todo:
                sequence.features[number] = features.rows(start, start + image.num_tokens)
                start += image.num_tokens
        return [sequence for sequence, _, _ in todo], marks

    def encode(self, pictures: list[Picture]) -> tuple[VisionFeatures, list[torch.cuda.Event | float]]:
        """Features of pictures in one packed call, replayed from a graph where they are few.

        Also returns when, in the device's work, their pixels began to be copied, were there, and were encoded.
        """
        device = self.model.device
        marks = [_now(device)]
        pixels = copy_pixels(pictures, device)
        marks.append(_now(device))
        grids = [picture.grid for picture in pictures]
        pixel_values_PC = cut_patches(pixels, pictures, self.model.dtype)
        replayed = self.replays and self._images is not None
        features = self._images.run(pixel_values_PC, grids) if replayed else None
        if features is None:
            features = self.model.encode_images(pixel_values_PC, grids)
        marks.append(_now(device))
        return features, marks

    def _pack(self, chunks: list[Chunk], logit_rows: list[int]) -> Batch:
        """The step as one batch on the host."""
        block_size = self.cache.block_size
        token_ids: list[int] = []
        slots: list[Tensor] = []
        tables = torch.zeros(len(chunks), max(len(c.sequence.block_table) for c in chunks), dtype=torch.int32)
        visual: list[VisionFeatures] = []
        visual_rows: list[int] = []
        for number, chunk in enumerate(chunks):
            sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
            table = torch.tensor(sequence.block_table, dtype=torch.int32)
            tables[number, : len(table)] = table
            place = torch.arange(start, stop)
            slots.append(table[place // block_size].long() * block_size + place % block_size)
            # A chunk may begin or end inside an image: it takes the features of exactly its own placeholders.
            for i, image in sequence.images_in(start, stop):
                first, last = max(start, image.start), min(stop, image.start + image.num_tokens)
                visual.append(sequence.features[i].rows(first - image.start, last - image.start))
                visual_rows.extend(range(len(token_ids) + first - start, len(token_ids) + last - start))
            token_ids.extend(sequence.token_ids[start:stop])

        return Batch(
            input_ids_T=torch.tensor(token_ids),
            positions_3T=torch.cat([c.sequence.positions(c.start, c.stop) for c in chunks], dim=1),
            segments=Segments.build([c.stop - c.start for c in chunks], [c.stop for c in chunks]),
            slots_T=torch.cat(slots),
            block_tables=tables,
            block_size=block_size,
            visual_rows=torch.tensor(visual_rows) if visual else None,
            visual=VisionFeatures.cat(visual) if visual else None,
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )

    def _sample(self, logits_RV: Tensor, sequences: list[Sequence], results: list[ChunkResult]) -> None:
        tokens_R = sample(logits_RV, sequences, self._generator)
        for result, token_id in zip(results, tokens_R.tolist(), strict=True):
            result.token_id = token_id
        asked = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
        if asked:
            num_top = [sequences[row].params.logprobs for row in asked]
            rows = torch.tensor(asked, device=logits_RV.device)
            entries = token_logprobs(logits_RV[rows], tokens_R[rows], max(num_top))
            for row, count, entry in zip(asked, num_top, entries, strict=True):
                results[row].logprobs = entry[: 1 + count]

    def _prompt_logprobs(self, hidden_RH: Tensor, sequence: Sequence, span: range) -> list[list[TokenLogprob]]:
        entries: list[list[TokenLogprob]] = []
        for start in range(0, len(span), _PROMPT_LOGIT_ROWS):
            rows = span[start : start + _PROMPT_LOGIT_ROWS]
            targets = torch.tensor([sequence.token_ids[row + 1] for row in rows], device=hidden_RH.device)
            logits_RV = self.model.lm_head(hidden_RH[start : start + len(rows)])
            entries += token_logprobs(logits_RV, targets, sequence.params.prompt_logprobs)
        return entries


def _now(device: torch.device) -> torch.cuda.Event | float:
    """A point in the device's work, taken without making the host wait for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: torch.cuda.Event | float, stop: torch.cuda.Event | float) -> float:
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1000


def _prompt_logprob_span(chunk: Chunk) -> range:
    """Positions of a chunk whose logits give a prompt log-probability that is not known yet."""
    sequence = chunk.sequence
    if sequence.params.prompt_logprobs is None:
        return range(0)
    return range(max(chunk.start, len(sequence.prompt_logprobs) - 1), min(chunk.stop, sequence.num_prompt_tokens - 1))


def uses_graphs(model: Qwen3VLMoe, options: EngineOptions) -> bool:
    """Whether small steps are replayed from CUDA graphs rather than launched one kernel at a time."""
    return not options.enforce_eager and can_capture(model)


@torch.inference_mode()
def free_cache_bytes(model: Qwen3VLMoe, options: EngineOptions) -> int | None:
    """Device memory that the cache may take: what is left of ``gpu_memory_utilization`` beside the model and a step.

    The step is measured: images of ``max_encoder_tokens`` (a thousand each), whose features are kept while
    ``max_prefill_tokens`` go through the decoder, with logits for ``max_num_seqs`` of them. None on a CPU, where the
    cache has a bound of its own.
    """
    device = model.device
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    vision = model.config.vision
    grid = (-(-options.max_encoder_tokens // 1024), 32 * vision.merge_size, 32 * vision.merge_size)
    pixels = (math.prod(grid), vision.patch_dim)
    features = model.encode_images(torch.zeros(pixels, dtype=model.dtype, device=device), [grid])
    places = torch.arange(options.max_prefill_tokens, device=device)
    segments = Segments.build([len(places)], device=device)
    logit_rows = places[: options.max_num_seqs]
    model(Batch(torch.zeros_like(places), places.expand(3, -1), segments, logit_rows=logit_rows)).float().softmax(-1)
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    del features
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    graph_bytes = _GRAPH_BYTES if uses_graphs(model, options) else 0
    return int(free - (1 - options.gpu_memory_utilization) * total - step_bytes - graph_bytes)
