"""The model over its cache: what a step computes on the device, the same on each rank."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from qwen3vl_moe.engine import announced
from qwen3vl_moe.engine.cuda_graphs import StepGraphs, VisionGraphs, uses_graphs
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.engine.workers import Workers
from qwen3vl_moe.model import Batch, Qwen3VLMoe, VisionFeatures
from qwen3vl_moe.model.rope import Grid


class Executor:
    """Encodes images and computes steps, replayed from CUDA graphs where they are small.

    Each rank has one. The first one announces its calls, and the others make the same ones (:meth:`follow`).

    Args:
        model: any device and dtype.
        cache: of :class:`.KVCache`.
        options: of the engine.
        max_model_len: most tokens of a sequence.
        workers: the processes of the other ranks, on the first one; None elsewhere, and where there are none.
    """

    def __init__(
        self, model: Qwen3VLMoe, cache: Tensor, options: EngineOptions, max_model_len: int, workers: Workers | None
    ):
        self.model, self.cache, self.ranks, self.workers = model, cache, model.ranks, workers
        self._steps: StepGraphs | None = None
        self._images: VisionGraphs | None = None
        self._hidden_RH: Tensor | None = None
        if uses_graphs(model, options):
            self._steps = StepGraphs(model, cache, options.seats, max_model_len)
            self._images = VisionGraphs(model)
            if workers is not None:
                workers.before_end(self._steps.forget)

    @torch.inference_mode()
    def warm_up(self, progress: bool) -> None:
        """Capture what a step of any small shape will replay. All ranks have to."""
        if self._steps is not None and self._images is not None:
            kinds = [*self._steps.makers(), *self._images.makers()]
            for make in tqdm([make for kind in kinds for make in kind], desc="CUDA graphs", disable=not progress):
                make()

    def together(self) -> AbstractContextManager[None]:
        """What all ranks do together, or wait for: within it no interrupt strikes, and the end of one ends all."""
        return nullcontext() if self.workers is None else self.workers.together()

    def compute(self, batch: Batch, num_logits: int, replay: bool) -> Tensor:
        """Logits [R, V] of a step on the first rank; overwritten by the next call if it was replayed.

        Args:
            batch: on the host, but for ids that the step before has sampled, and for images.
            num_logits: of how many of its rows, the first ones.
            replay: take a graph if there is one; if not, :meth:`logits` can be asked for the other rows.
        """
        with self.together():
            if self.workers is not None:
                announced.tell(announced.COMPUTE, [num_logits, replay], *announced.arrays_of(batch))
            return self._compute(batch, num_logits, replay)

    def logits(self, rows: slice) -> Tensor:
        """Logits [R, V] of other rows of the last step, on the first rank."""
        with self.together():
            if self.workers is not None:
                announced.tell(announced.LOGITS, [rows.start, rows.stop])
            return self._logits(rows)

    def encode(self, pixel_values_PC: Tensor, grids: list[Grid], replay: bool) -> VisionFeatures:
        """Features of pictures in one packed call, from a graph where they are few. Each rank encodes some of them.

        Args:
            pixel_values_PC: patches on the device, in the model's dtype.
            replay: whether to take a graph.
        """
        if self.workers is None or len(grids) == 1:
            return self._encode(pixel_values_PC, grids, replay)
        with self.together():
            announced.tell(announced.ENCODE, [replay], [side for grid in grids for side in grid])
            features = self._encode_shared(pixel_values_PC, grids, replay)
            assert features is not None  # this is the first rank
            return features

    def follow(self) -> None:
        """Make the calls that the first rank announces, until it ends."""
        while True:
            kind, arrays = announced.hear()
            if kind == announced.END:
                return
            if kind == announced.COMPUTE:
                (num_logits, replay), *step = arrays[0].tolist(), *arrays[1:]
                config = self.model.config.text
                batch = announced.batch_of(step, self.model.device, config.hidden_size, self.model.dtype)
                self._compute(batch, num_logits, bool(replay))
            elif kind == announced.LOGITS:
                self._logits(slice(*arrays[0].tolist()))
            else:
                grids = [(t, rows, columns) for t, rows, columns in arrays[1].reshape(-1, 3).tolist()]
                self._encode_shared(None, grids, bool(arrays[0][0]))

    @torch.inference_mode()
    def _compute(self, batch: Batch, num_logits: int, replay: bool) -> Tensor:
        if not self.ranks.alone:
            batch = announced.complete(batch, self.ranks)
        self._hidden_RH = None
        logits_RV = self._steps.run(batch) if replay and self._steps is not None else None
        if logits_RV is not None:
            return logits_RV
        self._hidden_RH = hidden_RH = self.model.text(batch.to(self.model.device), self.cache)
        return self.model.compute_logits(hidden_RH[:num_logits])

    @torch.inference_mode()
    def _logits(self, rows: slice) -> Tensor:
        assert self._hidden_RH is not None  # the last step was not replayed
        return self.model.compute_logits(self._hidden_RH[rows])

    @torch.inference_mode()
    def _encode(self, pixel_values_PC: Tensor, grids: list[Grid], replay: bool) -> VisionFeatures:
        features = self._images.run(pixel_values_PC, grids) if replay and self._images is not None else None
        return self.model.encode_images(pixel_values_PC, grids) if features is None else features

    @torch.inference_mode()
    def _encode_shared(self, pixel_values_PC: Tensor | None, grids: list[Grid], replay: bool) -> VisionFeatures | None:
        """Each rank's share of the pictures. The first one has the patches, and gets the features of all of them."""
        ranks, config, model = self.ranks, self.model.config, self.model
        shares = announced.shares_of(grids, ranks.size)
        own = shares[ranks.rank]
        counts = [[math.prod(grid) for grid in grids[share.start : share.stop]] for share in shares]
        nothing: list[Tensor | None] = [None] * ranks.size

        def room(rows: int, *shape: int) -> Tensor:
            return torch.empty(rows, *shape, dtype=model.dtype, device=model.device)

        if ranks.first:
            assert pixel_values_PC is not None
            parts = pixel_values_PC.split([sum(count) for count in counts])
            ranks.exchange([None, *parts[1:]], nothing)
            patches = parts[0]
        else:
            patches = room(sum(counts[ranks.rank]), config.vision.patch_dim)
            ranks.exchange(nothing, [patches, *nothing[1:]])
        packed, square = None, config.vision.merge_size**2
        layers = 1 + len(config.vision.deepstack_indexes)
        if own:
            features = self._encode(patches, grids[own.start : own.stop], replay)
            packed = torch.cat([features.embeds_MH[None], features.deepstack_LMH]).transpose(0, 1)
        if not ranks.first:
            ranks.exchange([packed, *nothing[1:]], nothing)
            return None
        features_MLH = room(sum(map(sum, counts)) // square, layers, config.text.hidden_size)
        places = list(features_MLH.split([sum(count) // square for count in counts]))
        ranks.exchange([packed, *nothing[1:]], places)
        features_LMH = features_MLH.transpose(0, 1).contiguous()
        return VisionFeatures(features_LMH[0], features_LMH[1:])
