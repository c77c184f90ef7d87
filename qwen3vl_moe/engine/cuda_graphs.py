"""CUDA graphs of whole steps, by bucket of shapes.

A step of the decoder is some seven hundred launches, and the host takes longer to make them than a small step takes to
run. A graph makes them once. Its shapes are fixed, so a step is padded to the next bucket: rows with a negative slot,
which no expert sees, and sequences without tokens. Everything that varies is read from device memory: one buffer of
int32, filled on the host and copied in one piece per step.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.model.batch import Batch, VisionFeatures, VisualTokens
from qwen3vl_moe.model.qwen3vl import Qwen3VLMoe
from qwen3vl_moe.model.rope import Grid
from qwen3vl_moe.model.vision import PatchPlan
from qwen3vl_moe.ops import Segments
from qwen3vl_moe.ops.dispatch import attention_takes, takes_kernels
from qwen3vl_moe.ops.transfer import to_device

# Padding is cheap where experts skip it; each graph takes time and memory to make.
_DECODE = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)
# Beyond the last ones the card needs longer for a step than the host for its launches.
_TOKENS = (128, 256, 384, 512, 768, 1024, 1536, 2048)
# Each sequence of a graph costs something, whether it has tokens or not. A step of more of them and a prompt keeps the
# card busy for longer than its launches take.
_MIXED_SEQS = 128
_PATCHES = (256, 512, 768, 1024, 1296, 1600, 2048, 3072, 4096)
_IMAGES = 32  # in one graph of the vision tower


def can_capture(model: Qwen3VLMoe) -> bool:
    """Whether every part of a step runs in kernels that need nothing from the host."""
    widths = model.config.text.head_dim, model.config.vision.head_dim
    return takes_kernels(model.lm_head.weight) and model.moe != "reference" and all(map(attention_takes, widths))


def uses_graphs(model: Qwen3VLMoe, options: EngineOptions) -> bool:
    """Whether small steps are replayed from CUDA graphs rather than launched one kernel at a time."""
    return not options.enforce_eager and can_capture(model)


def bucket_of(size: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds ``size``; None if none does."""
    place = bisect.bisect_left(buckets, size)
    return buckets[place] if place < len(buckets) else None


class _Inputs:
    """What varies from step to step, as views of one int32 buffer: filled on the host, read on the device.

    Sections begin at multiples of 16 bytes, which lets kernels be launched from the cache (ops/kernels/launch.py).
    """

    def __init__(self, T: int, S: int, width: int, device: torch.device):
        shapes = {
            "ids_T": (T,),
            "positions_3T": (3, T),
            "slots_T": (T,),
            "q_starts": (S + 1,),
            "kv_starts": (S + 1,),
            "logit_rows": (S,),
            "tables": (S, width),
        }
        begins, size = {}, 0
        for name, shape in shapes.items():
            begins[name] = size
            size += -(-torch.Size(shape).numel() // 4) * 4
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event()

        def views(buffer: Tensor) -> dict[str, Tensor]:
            return {
                name: buffer[begin : begin + torch.Size(shapes[name]).numel()].view(shapes[name])
                for name, begin in begins.items()
            }

        self.device = views(self._device)
        # NumPy writes a few numbers in half the time that torch takes, and many in this thread alone.
        self.host = {name: view.numpy() for name, view in views(self._host).items()}

    def fill(self, batch: Batch) -> None:
        """Copy a step (tensors on the host) to the device, padded to this bucket."""
        # The host buffer must not be overwritten while its last copy is in flight. This blocks only after steps that
        # sampled nothing; otherwise reading their tokens has already waited past the copy.
        self._copied.synchronize()
        host, T, segments = self.host, len(batch.input_ids_T), batch.segments
        sampled = batch.input_ids_T.is_cuda  # by the step before, and not seen by the host yet
        tables, logit_rows = segments.block_tables, batch.logit_rows
        assert tables is not None
        assert logit_rows is not None
        assert batch.slots_T is not None
        S, width = len(tables), min(tables.shape[1], host["tables"].shape[1])
        if not sampled:
            host["ids_T"][:T] = batch.input_ids_T.numpy()
        host["ids_T"][T:] = 0
        host["positions_3T"][:, :T] = batch.positions_3T.numpy()
        host["slots_T"][:T] = batch.slots_T.numpy()
        host["slots_T"][T:] = -1
        for name, starts in (("q_starts", segments.q_starts.numpy()), ("kv_starts", segments.kv_starts.numpy())):
            host[name][: S + 1] = starts
            host[name][S + 1 :] = starts[-1]
        host["logit_rows"][: len(logit_rows)] = logit_rows.numpy()
        host["tables"][:S, :width] = tables[:, :width].numpy()
        used = self._host.numel() - (len(host["tables"]) - S) * host["tables"].shape[1]  # the tables come last
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        self._copied.record()
        if sampled:
            self.device["ids_T"][:T] = batch.input_ids_T


@dataclass(frozen=True)
class _Graph:
    inputs: _Inputs
    graph: torch.cuda.CUDAGraph


class StepGraphs:
    """Decode steps and small prefill or mixed steps of a model over one cache.

    Args:
        model: one that :func:`can_capture`.
        cache: [L, 2, blocks, block_size, G, D].
        max_num_seqs: most sequences in a step.
        max_model_len: longest sequence, which bounds the block tables.
    """

    def __init__(self, model: Qwen3VLMoe, cache: Tensor, max_num_seqs: int, max_model_len: int):
        self.model, self.cache, self.max_num_seqs = model, cache, max_num_seqs
        self._table_width = -(-max_model_len // cache.shape[3])
        self._decode = (*(size for size in _DECODE if size < max_num_seqs), max_num_seqs)
        self._mixed_seqs = min(max_num_seqs, _MIXED_SEQS)
        config, device, dtype = model.config.text, model.device, model.dtype
        rows, layers = _TOKENS[-1], len(model.config.vision.deepstack_indexes)
        # One set of buffers serves all buckets: graphs run one after the other.
        self._x_TH = torch.zeros(rows, config.hidden_size, dtype=dtype, device=device)
        self._deepstack_LTH = torch.zeros(layers, rows, config.hidden_size, dtype=dtype, device=device)
        self._all_rows = torch.arange(rows, device=device)
        self._logits_SV = torch.zeros(max_num_seqs, config.vocab_size, dtype=dtype, device=device)
        self._has_deepstack = False
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def makers(self) -> list[list[Callable[[], object]]]:
        """Calls that make a graph each, by kind, the largest first: smaller ones fit into its memory.

        A step whose graph is missing makes it.
        """
        kinds = (True, self._decode), (False, _TOKENS)
        return [[partial(self._graph, size, decoding) for size in reversed(sizes)] for decoding, sizes in kinds]

    def run(self, batch: Batch) -> Tensor | None:
        """Logits [R, V] of a step, or None if no bucket fits it.

        The step's tensors are on the host, but for the ids of a decode step, which may be on the device. The result is
        overwritten by the next call.
        """
        decoding = batch.segments.max_q == 1 and batch.visual is None
        assert batch.logit_rows is not None
        num_logits = len(batch.logit_rows)
        if max(len(batch.segments.q_lens), num_logits) > (self.max_num_seqs if decoding else self._mixed_seqs):
            return None
        size = bucket_of(len(batch.input_ids_T), self._decode if decoding else _TOKENS)
        if size is None:
            return None
        made = self._graph(size, decoding)
        made.inputs.fill(batch)
        if not decoding:
            self._embed(batch, made.inputs.device["ids_T"])
        made.graph.replay()
        return self._logits_SV[:num_logits]

    def forget(self) -> None:
        """Free all graphs; what is replayed afterwards is captured anew."""
        self._graphs.clear()

    def _embed(self, batch: Batch, ids_T: Tensor) -> None:
        """Embeddings and DeepStack rows of this step, in the buffers that all prefill graphs read."""
        self._x_TH[: len(ids_T)] = self.model.text.embed(ids_T)
        if self._has_deepstack:
            self._deepstack_LTH.zero_()
        self._has_deepstack = batch.visual is not None
        if batch.visual is not None:
            rows = to_device(batch.visual.rows_M, self.model.device)
            self._x_TH.index_copy_(0, rows, batch.visual.embeds_MH)
            self._deepstack_LTH.index_copy_(1, rows, batch.visual.deepstack_LMH)

    def _graph(self, size: int, decoding: bool) -> _Graph:
        if (size, decoding) not in self._graphs:
            S = size if decoding else self._mixed_seqs
            inputs = _Inputs(size, S, self._table_width, self.model.device)
            inputs.host["slots_T"][:] = -1
            inputs._device.copy_(inputs._host)
            graph = _capture(lambda: self._step(inputs.device, size, decoding), self._pool)
            self._graphs[size, decoding] = _Graph(inputs, graph)
        return self._graphs[size, decoding]

    def _step(self, inputs: dict[str, Tensor], size: int, decoding: bool) -> None:
        # These lengths only select kernels: decode (one new token each, with a past) or mixed.
        q_lens, kv_lens = ((1,) * size, (2,) * size) if decoding else ((size,), (size + 1,))
        all_rows = self._all_rows[:size]
        batch = Batch(
            input_ids_T=inputs["ids_T"],
            positions_3T=inputs["positions_3T"],
            segments=Segments(
                q_lens,
                kv_lens,
                inputs["q_starts"],
                inputs["kv_starts"],
                block_tables=inputs["tables"],
                block_size=self.cache.shape[3],
                padded=size > 1,
            ),
            slots_T=inputs["slots_T"],
            visual=None if decoding else VisualTokens(all_rows, self._x_TH[:size], self._deepstack_LTH[:, :size]),
            logit_rows=inputs["logit_rows"],
            padding_T=None if size == 1 else inputs["slots_T"] < 0,  # one row is never padding
        )
        text = self.model.text
        x_TH = text.embed(batch.input_ids_T) if decoding else self._x_TH[:size]
        hidden_RH = text.run_layers(x_TH, batch, self.cache)
        self.model.compute_logits(hidden_RH, out=self._logits_SV[: len(hidden_RH)])


class VisionGraphs:
    """The vision tower on a few images at a time; many at once keep the card busy without a graph.

    Args:
        model: one that :func:`can_capture`.
    """

    def __init__(self, model: Qwen3VLMoe):
        self.model = model
        config, device = model.config.vision, model.device
        self._pixels_PC = torch.zeros(_PATCHES[-1], config.patch_dim, dtype=model.dtype, device=device)
        self._graphs: dict[int, tuple[PatchPlan, VisionFeatures, torch.cuda.CUDAGraph]] = {}
        self._grids: dict[int, list[Grid]] = {}  # whose plan a graph's buffers hold
        self._pool = torch.cuda.graph_pool_handle()
        square = config.merge_size**2
        self._buckets = tuple(size for size in _PATCHES if size % square == 0)

    def makers(self) -> list[list[Callable[[], object]]]:
        """As :meth:`StepGraphs.makers`."""
        return [[partial(self._graph, size) for size in reversed(self._buckets)]]

    def run(self, pixel_values_PC: Tensor, grids: list[Grid]) -> VisionFeatures | None:
        """Features of a few images (patches on the device) in memory of their own, or None if no bucket fits them."""
        config = self.model.config.vision
        P, frames = len(pixel_values_PC), sum(t for t, _, _ in grids)
        size = bucket_of(P, self._buckets)
        if size is None or frames > _IMAGES:
            return None
        static, features, graph = self._graph(size)
        self._pixels_PC[:P].copy_(pixel_values_PC)
        if self._grids.get(size) != grids:
            plan = PatchPlan.build(grids, config, self.model.device)
            for name in ("index_P4", "weight_P4", "positions_P2"):
                getattr(static, name)[:P].copy_(getattr(plan, name))
            # Patches that fill the bucket are one more image, which sees only itself; what they hold does not matter.
            static.segments.q_starts.fill_(size)
            static.segments.q_starts[: frames + 1].copy_(plan.segments.q_starts)
            self._grids[size] = list(grids)
        graph.replay()
        made = features.rows(0, P // config.merge_size**2)
        return VisionFeatures(made.embeds_MH.clone(), made.deepstack_LMH.clone())

    def _graph(self, size: int) -> tuple[PatchPlan, VisionFeatures, torch.cuda.CUDAGraph]:
        if size not in self._graphs:
            device = self.model.device
            starts = torch.full((_IMAGES + 2,), size, dtype=torch.int32, device=device)
            starts[0] = 0
            plan = PatchPlan(
                torch.zeros(size, 4, dtype=torch.int64, device=device),
                torch.zeros(size, 4, device=device),
                torch.zeros(size, 2, dtype=torch.int64, device=device),
                Segments((size,), (size,), starts, starts),
            )
            out: list[VisionFeatures] = []

            def step() -> None:
                out[:] = [self.model.vision.encode(self._pixels_PC[:size], plan)]

            graph = _capture(step, self._pool)
            self._graphs[size] = (plan, out[0], graph)
        return self._graphs[size]


def _capture(step: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """Run once on a side stream, so that everything is compiled and allocated, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph
