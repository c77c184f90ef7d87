"""Which tokens to compute next: continuous batching, chunked prefill mixed with decode, first come first served."""

from __future__ import annotations

from collections import deque

import numpy as np

from qwen3vl_moe.engine.chunks import Chunk, Decoding, Step
from qwen3vl_moe.engine.kv_cache import KVCache
from qwen3vl_moe.engine.sequence import Sequence

_SOON = 128  # tokens of its answer for which a running sequence should find room


class Scheduler:
    """Waiting and running sequences, both oldest first.

    A sequence is admitted when the cache has room for all of its tokens, so prefills never wait for each other
    half-way, and for what it and those that run may need before long. Still, an answer that outgrows the cache takes
    blocks from the youngest running sequence, which goes back to the head of the queue and is computed again. The
    oldest never loses its blocks, and any single sequence fits (``max_model_len``), so every step brings it closer to
    its end: nothing can block for ever.

    A sequence that shares a prefix with an earlier one starts after the shared blocks; a preempted one starts after
    those of its own blocks that are still cached.

    One whose next frames of a video are still being decoded lets others pass: it is not admitted, or is in no step,
    until they are there. Only one at a time begins before all of its frames are: the others may find what it computes,
    if they ask for the same, and hold no blocks meanwhile.

    Args:
        cache: blocks of all sequences.
        max_num_seqs: most sequences in a step.
        max_prefill_tokens: most prompt tokens in a step; decoding sequences add one token each.
        max_encoder_tokens: most tokens of images that are encoded in a step. A chunk ends before an image that does
            not fit into what is left of it; one that is larger than all of it is encoded in a step of its own.
        prefix_caching: whether full blocks are found by their content.

    Attributes:
        num_queried_tokens: tokens of all sequences that were admitted, once more after each preemption.
        num_cached_tokens: how many of them were found in the cache.
    """

    def __init__(
        self,
        cache: KVCache,
        max_num_seqs: int,
        max_prefill_tokens: int,
        max_encoder_tokens: int,
        prefix_caching: bool = True,
    ):
        self.cache, self.max_num_seqs, self.prefix_caching = cache, max_num_seqs, prefix_caching
        self.max_prefill_tokens, self.max_encoder_tokens = max_prefill_tokens, max_encoder_tokens
        self.num_queried_tokens = self.num_cached_tokens = 0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or given up, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.cache.release(sequence.block_table)

    def begin_again(self, sequences: list[Sequence]) -> None:
        """Know these sequences only, all of them waiting, and no blocks but those that can be found."""
        self.waiting = deque(sequences)  # first, so that each is in one of the two at any time
        self.running = []
        for sequence in sequences:
            sequence.block_table = []
            sequence.reset()
        self.cache.release_all()

    def schedule(self) -> list[Chunk]:
        """The next step; empty only when there is nothing left to do before frames are decoded."""
        self._make_room()
        chunks: list[Chunk] = []
        coming: set[bytes] = set()  # full blocks that this step computes, if anybody waits
        budget, encoder_budget = self.max_prefill_tokens, self.max_encoder_tokens

        def take(sequence: Sequence) -> None:
            nonlocal budget, encoder_budget
            if sequence.num_prompt_tokens <= sequence.num_computed == len(sequence.token_ids) - 1:  # nearly always
                chunks.append(Chunk(sequence, sequence.num_computed, len(sequence.token_ids), True))
                if self.waiting:
                    coming.update(self._filled(chunks[-1])[1])
                return
            decodes = sequence.pending == 1 and sequence.num_computed > 0
            start = sequence.num_computed
            stop = start + (1 if decodes else min(sequence.pending, budget))
            part, end_of_part = sequence.part_from(start)
            stop = min(stop, end_of_part) if part is None or part.ready else start
            for number, image in sequence.images_in(start, stop):
                if sequence.features[number] is None:
                    if encoder_budget < min(image.num_tokens, self.max_encoder_tokens):
                        stop = max(start, image.start)
                        break
                    encoder_budget -= image.num_tokens
            if not decodes:
                budget -= stop - start
            if stop > start:
                chunks.append(Chunk(sequence, start, stop, samples=stop == len(sequence.token_ids)))
                if self.waiting:
                    coming.update(self._filled(chunks[-1])[1])

        for sequence in self.running:
            take(sequence)
        # One that was preempted just now is at the head of the queue, and fewer blocks are free than it held: it waits,
        # and so do all that came after it, until one that runs has ended.
        reserved = self._reserve() if self.waiting and budget else 0
        passed = 0  # who are not asked yet
        while passed < len(self.waiting) and budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[passed]
            if self._lacks_frames(sequence):
                passed += 1
                continue
            if not self._admit(sequence, coming, reserved):
                break
            self.running.append(sequence)
            del self.waiting[passed]
            reserved += self._growth(sequence)
            take(sequence)
        return chunks

    def ahead(self, chunks: Step) -> Step:
        """The next step, before this one's tokens are known; empty if it depends on them.

        It does not depend on them while every running sequence decodes without needing its history, each has a cache
        row free, and no waiting sequence can be admitted. Sequences about to reach their length limit are left out. One
        that turns out to have stopped is computed in vain, and no other sequence can find what that writes.
        """
        if isinstance(chunks, Decoding):
            live, goes_on = chunks.next(), [sequence.finish_reason is None for sequence in chunks.sequences]
            if not all(goes_on):
                live = live.where(np.array(goes_on))
        else:
            going = [chunk for chunk in chunks if not chunk.sequence.finished]
            if not all(chunk.samples for chunk in going):
                return []
            live = Decoding.after(going)
        constrained = [sequence for sequence in live.sequences if sequence.constraints is not None]
        if len(live) < len(self.running) and len(live) < sum(not self._lacks_frames(each) for each in self.running):
            return []
        if any(sequence.needs_history for sequence in constrained):
            return []
        following = live.where(live.left_S > 0)
        head = next((sequence for sequence in self.waiting if not self._lacks_frames(sequence)), None)
        if head is not None and (len(following) < len(live) or self._has_room_for(head)):
            return []
        # Another block is needed only where the token is its first one.
        rows = np.flatnonzero((following.stops_S - 1) % self.cache.block_size == 0).tolist()
        growing = [(following.sequences[row].block_table, int(following.stops_S[row])) for row in rows]
        if sum(max(0, self.cache.needed(table, stop)) for table, stop in growing) > self.cache.num_free:
            return []
        for table, stop in growing:
            self.cache.grow(table, stop)
        return following if len(following) else []

    def name_blocks(self, chunks: Step) -> None:
        """Make the keys that :meth:`computed` will need, while the device works on the chunks."""
        size = self.cache.block_size
        for chunk in chunks:
            if chunk.start // size < chunk.stop // size:  # asked here, since it is rarely so and they may be hundreds
                self._filled(chunk)

    def computed(self, chunk: Chunk) -> None:
        """A chunk is in the cache: its sequence goes on, and the blocks that it has filled can be found."""
        chunk.sequence.advance(chunk.stop)
        blocks, keys = self._filled(chunk)
        if blocks:
            self.cache.publish(blocks, keys)

    def _growth(self, sequence: Sequence) -> int:
        """Blocks that a sequence may need for the next tokens of its answer, beyond those for what it has."""
        tokens, size = len(sequence.token_ids), self.cache.block_size
        return -(-(tokens + min(sequence.remaining, _SOON)) // size) - -(-tokens // size)

    def _reserve(self) -> int:
        """Blocks that running sequences may need before long. Given away, they would be taken back by preemption."""
        return sum(self._growth(sequence) for sequence in self.running)

    def _fits(self, sequence: Sequence, found: list[int], reserved: int) -> bool:
        """Whether there is room for a waiting sequence beside these blocks; alone, it needs room only for itself."""
        left = self.cache.num_free - self.cache.needed(sequence.block_table, len(sequence.token_ids), found)
        return left >= (reserved + self._growth(sequence) if self.running else 0)

    def _admit(self, sequence: Sequence, coming: set[bytes], reserved: int) -> bool:
        """Blocks for a waiting sequence, or False if it has to wait."""
        size = self.cache.block_size
        found, missing = self._cached(sequence)
        # What it needs next is computed in this very step: reading it in the next one is cheaper than doing it twice.
        if missing in coming or not self._fits(sequence, found, reserved):
            return False
        if not self.cache.grow(sequence.block_table, len(sequence.token_ids), found):
            return False
        sequence.start_at(len(found) * size)
        self.num_queried_tokens += len(sequence.token_ids)
        self.num_cached_tokens += len(found) * size
        return True

    def _lacks_frames(self, sequence: Sequence) -> bool:
        """Whether a sequence can compute nothing before more frames of its videos are decoded."""
        if not sequence.undecoded:
            return False
        begun = bool(sequence.block_table)
        start = sequence.num_computed if begun else len(self._cached(sequence)[0]) * self.cache.block_size
        part, _ = sequence.part_from(start)
        if part is None:
            return False
        return not part.ready or (not begun and any(each.undecoded for each in self.running))

    def _has_room_for(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence could be admitted."""
        if len(self.running) >= self.max_num_seqs:
            return False
        found, _ = self._cached(sequence)
        return self._fits(sequence, found, 0) and self._fits(sequence, found, self._reserve())

    def _cached(self, sequence: Sequence) -> tuple[list[int], bytes | None]:
        """Full blocks that a sequence may take from the cache, and the key of the one after them that it lacks.

        Keys are made one by one: most prompts find nothing, and the device waits for this.
        """
        size, found = self.cache.block_size, []
        for number in range(sequence.reusable // size if self.prefix_caching else 0):
            [key] = sequence.block_keys(number, number + 1, size)
            block = self.cache.find(key)
            if block is None:
                return found, key
            found.append(block)
        return found, None

    def _filled(self, chunk: Chunk) -> tuple[list[int], list[bytes]]:
        """The blocks that are full when a chunk is computed and were not before, and their keys."""
        size = self.cache.block_size
        first, last = chunk.start // size, chunk.stop // size
        if first == last or not self.prefix_caching:
            return [], []
        return chunk.sequence.block_table[first:last], chunk.sequence.block_keys(first, last, size)

    def _make_room(self) -> None:
        """A cache row for every token of every running sequence, oldest first; the youngest give way."""
        number = 0
        while number < len(self.running):
            sequence = self.running[number]
            tokens, table = len(sequence.token_ids), sequence.block_table
            if tokens <= len(table) * self.cache.block_size or self.cache.grow(table, tokens):
                number += 1
                continue
            youngest = self.running[-1]
            self.waiting.appendleft(youngest)
            self.running.pop()
            self.cache.release(youngest.block_table)
            youngest.reset()
