"""A step's chunks as one :class:`Batch` on the host: a few NumPy calls over all of them.

The card computes a step of some hundred sequences in a few milliseconds. Host work that grew with every sequence, by a
tensor here and there, would take longer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen3vl_moe.engine.chunks import Chunk, Decoding, Step
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.model import Batch, VisionFeatures
from qwen3vl_moe.model.batch import VisualTokens
from qwen3vl_moe.ops import Segments


@dataclass(frozen=True)
class _Tables:
    """Block tables, int32 [S, B], of sequences that decode; ``admissions`` tells whether one has begun again since."""

    sequences: list[Sequence]
    admissions: list[int]
    rows: np.ndarray

    def are_of(self, sequences: list[Sequence]) -> bool:
        """Whether they are still the tables of these sequences."""
        if sequences is self.sequences:  # handed on from step to step, which nothing has come between
            return True
        return sequences == self.sequences and self.admissions == [sequence.admissions for sequence in sequences]


class Packer:
    """Packs steps over a cache of blocks of ``block_size`` tokens.

    Sequences that only decode keep their block tables from step to step, with a new block where one is full.
    """

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._decoding: _Tables | None = None

    def pack(self, chunks: Step, logit_rows: list[int], sampled_T: Tensor | None) -> Batch:
        """The step that computes these chunks.

        Args:
            chunks: at least one; images that have placeholders in them have their features.
            logit_rows: of the step, whose logits are wanted.
            sampled_T: the chunks' tokens, int64 on the device, where the host does not know them yet.

        Returns:
            A batch with all tensors but those of images and ``sampled_T`` on the host.
        """
        if isinstance(chunks, Decoding):
            return self._pack_decoding(chunks, sampled_T)
        sequences, starts, stops, _ = map(list, zip(*chunks, strict=True))
        starts_S, stops_S = np.array(starts), np.array(stops)
        lens_S = stops_S - starts_S
        begins_S = np.cumsum(lens_S) - lens_S  # rows of the step
        tables = self._tables(sequences, starts_S, lens_S)
        # Of each row: its sequence, and its place within that.
        s_T = np.repeat(np.arange(len(chunks)), lens_S)
        place_T = np.arange(len(s_T)) + np.repeat(starts_S - begins_S, lens_S)
        blocks_T = tables[s_T, place_T // self._block_size].astype(np.int64)
        positions_3T = np.empty((3, len(s_T)), np.int64)
        positions_3T[:] = place_T + np.array([s.position_offset for s in sequences])[s_T]
        reading = [
            (chunk, begin)
            for chunk, begin in zip(chunks, begins_S.tolist(), strict=True)
            if chunk.start < chunk.sequence.num_prompt_tokens
        ]
        for chunk, begin in reading:
            # Within its prompt a token's position is not its place: images have rows and columns.
            known = chunk.sequence.prompt.positions_3T[
                :, chunk.start : min(chunk.stop, chunk.sequence.num_prompt_tokens)
            ]
            positions_3T[:, begin : begin + known.shape[1]] = known.numpy()
        if sampled_T is None:
            tokens = itertools.chain.from_iterable(
                sequence.token_ids[start:stop] for sequence, start, stop in zip(sequences, starts, stops, strict=True)
            )
            sampled_T = torch.from_numpy(np.fromiter(tokens, np.int64, len(s_T)))
        return Batch(
            input_ids_T=sampled_T,
            positions_3T=torch.from_numpy(positions_3T),
            segments=self._segments(lens_S, stops_S, tables),
            slots_T=torch.from_numpy(blocks_T * self._block_size + place_T % self._block_size),
            visual=_visual_tokens(reading),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        )

    def _pack_decoding(self, step: Decoding, sampled_T: Tensor | None) -> Batch:
        """The same for a step of decoding: no row needs to be looked at by itself."""
        assert sampled_T is not None  # such a step is launched before the tokens of the last one are read
        rows_S, places_S, size = np.arange(len(step)), step.stops_S - 1, self._block_size
        tables = self._kept_tables(step.sequences, places_S)
        positions_3S = np.empty((3, len(step)), np.int64)
        positions_3S[:] = places_S + step.offsets_S
        return Batch(
            input_ids_T=sampled_T,
            positions_3T=torch.from_numpy(positions_3S),
            segments=self._segments(np.ones_like(rows_S), step.stops_S, tables),
            slots_T=torch.from_numpy(tables[rows_S, places_S // size].astype(np.int64) * size + places_S % size),
            logit_rows=torch.from_numpy(rows_S),
        )

    def _segments(self, lens_S: np.ndarray, stops_S: np.ndarray, tables: np.ndarray) -> Segments:
        q_starts, kv_starts = (np.zeros(len(lens_S) + 1, np.int32) for _ in range(2))
        np.cumsum(lens_S, out=q_starts[1:])
        np.cumsum(stops_S, out=kv_starts[1:])
        return Segments(
            tuple(lens_S.tolist()),
            tuple(stops_S.tolist()),
            torch.from_numpy(q_starts),
            torch.from_numpy(kv_starts),
            torch.from_numpy(tables),
            self._block_size,
        )

    def _tables(self, sequences: list[Sequence], starts_S: np.ndarray, lens_S: np.ndarray) -> np.ndarray:
        """Block tables, int32 [S, B], padded with 0; valid until the next call."""
        if lens_S.max() > 1:
            self._decoding = None
            return _block_tables(sequences, 0)
        return self._kept_tables(sequences, starts_S)

    def _kept_tables(self, sequences: list[Sequence], starts_S: np.ndarray) -> np.ndarray:
        """:meth:`_tables` of sequences that compute one token each."""
        known, last = self._decoding, int(starts_S.max()) // self._block_size
        if known is None or last >= known.rows.shape[1] or not known.are_of(sequences):
            # Wide enough for some hundred steps to come.
            admissions = [sequence.admissions for sequence in sequences]
            self._decoding = _Tables(sequences, admissions, _block_tables(sequences, last + 8))
            return self._decoding.rows
        for row in np.flatnonzero(starts_S % self._block_size == 0).tolist():
            number = int(starts_S[row]) // self._block_size
            known.rows[row, number] = sequences[row].block_table[number]
        return known.rows


def _block_tables(sequences: list[Sequence], width: int) -> np.ndarray:
    """Block tables, int32 [S, B], B at least ``width``."""
    lens_S = np.array([len(sequence.block_table) for sequence in sequences])
    blocks = itertools.chain.from_iterable(sequence.block_table for sequence in sequences)
    tables = np.zeros((len(sequences), max(width, lens_S.max())), np.int32)
    tables[np.arange(tables.shape[1]) < lens_S[:, None]] = np.fromiter(blocks, np.int32, lens_S.sum())
    return tables


def _visual_tokens(reading: list[tuple[Chunk, int]]) -> VisualTokens | None:
    """The image tokens among chunks of prompts, each with the row of the step at which it begins."""
    features: list[VisionFeatures] = []
    rows: list[np.ndarray] = []
    for chunk, begin in reading:
        # A chunk may begin or end inside an image: it takes the features of exactly its own placeholders.
        for number, image in chunk.sequence.images_in(chunk.start, chunk.stop):
            first, last = max(chunk.start, image.start), min(chunk.stop, image.start + image.num_tokens)
            of_image = chunk.sequence.features[number]
            assert of_image is not None  # encoded just now, or in an earlier step
            features.append(of_image.rows(first - image.start, last - image.start))
            rows.append(np.arange(first, last) + (begin - chunk.start))
    return VisionFeatures.cat(features).at(torch.from_numpy(np.concatenate(rows))) if rows else None
