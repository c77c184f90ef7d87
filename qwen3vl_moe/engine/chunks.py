"""What one step computes of each sequence."""

from __future__ import annotations

import collections.abc
from itertools import compress
from typing import NamedTuple, overload

import numpy as np

from qwen3vl_moe.engine.sequence import Sequence, Tally


class Chunk(NamedTuple):
    """Tokens ``start`` to ``stop`` of one sequence, computed in one step.

    ``samples`` tells whether the sequence's next token comes out of it.
    """

    sequence: Sequence
    start: int
    stop: int
    samples: bool

    @property
    def is_prefill(self) -> bool:
        return self.start < self.sequence.num_prompt_tokens or self.stop - self.start > 1


class Decoding(collections.abc.Sequence[Chunk]):
    """A step in which every sequence computes the last token of its answer and samples the next one.

    It reads as a list of chunks. Most steps are of this kind, with the same hundreds of sequences one after the other,
    and an object for each of them in each step costs the host more than all else: so this holds arrays, and what does
    not change from step to step is passed on.

    Attributes:
        sequences: S of them.
        stops_S: int64, where the chunk of each ends.
        left_S: int64, how many more tokens the answer may have, that which this step samples included.
        offsets_S: int64, see :attr:`.Sequence.position_offset`.
        watched_S: bool, whose every token has to be looked at: there are stop strings or log-probabilities.
        endings: int64, tokens of which each ends the answers of some of them.
        tally: of the seconds of these steps, shared by the sequences.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        stops_S: np.ndarray,
        left_S: np.ndarray,
        offsets_S: np.ndarray,
        watched_S: np.ndarray,
        endings: np.ndarray,
        tally: Tally,
    ):
        self.sequences, self.stops_S, self.left_S = sequences, stops_S, left_S
        self.offsets_S, self.watched_S, self.endings, self.tally = offsets_S, watched_S, endings, tally

    @classmethod
    def after(cls, chunks: list[Chunk]) -> Decoding:
        """The step after that of some chunks, all of which sample."""
        sequences = [chunk.sequence for chunk in chunks]
        stops_S = np.array([chunk.stop + 1 for chunk in chunks], np.int64)
        tally = Tally()
        for sequence in sequences:
            sequence.share(tally)
        endings: set[int] = set().union(*{sequence.ending for sequence in sequences})
        return cls(
            sequences,
            stops_S,
            np.array([sequence.most_tokens for sequence in sequences], np.int64) - stops_S,
            np.array([sequence.position_offset for sequence in sequences], np.int64),
            np.array([sequence.watched for sequence in sequences], np.bool_),
            np.array(sorted(endings), np.int64),
            tally,
        )

    def next(self) -> Decoding:
        """The step after this one."""
        return Decoding(
            self.sequences, self.stops_S + 1, self.left_S - 1, self.offsets_S, self.watched_S, self.endings, self.tally
        )

    def where(self, keep_S: np.ndarray) -> Decoding:
        """The same for some of the sequences."""
        if keep_S.all():
            return self
        sequences = list(compress(self.sequences, keep_S.tolist()))
        stops_S, left_S, offsets_S, watched_S = (
            column[keep_S] for column in (self.stops_S, self.left_S, self.offsets_S, self.watched_S)
        )
        return Decoding(sequences, stops_S, left_S, offsets_S, watched_S, self.endings, self.tally)

    def __len__(self) -> int:
        return len(self.sequences)

    @overload
    def __getitem__(self, number: int) -> Chunk: ...
    @overload
    def __getitem__(self, number: slice) -> list[Chunk]: ...
    def __getitem__(self, number: int | slice) -> Chunk | list[Chunk]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        stop = int(self.stops_S[number])
        return Chunk(self.sequences[number], stop - 1, stop, samples=True)


Step = list[Chunk] | Decoding
