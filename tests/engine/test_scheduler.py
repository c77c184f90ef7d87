"""Scheduler and cache without a model: random loads finish, in order, and no block leaks or is shared wrongly."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.engine.detokenizer import TextStream
from qwen3vl_moe.engine.kv_cache import KVCache, bytes_per_block, plan_cache
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.engine.outputs import RequestMetrics
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.engine.runner import _prompt_logprob_span
from qwen3vl_moe.engine.scheduler import Scheduler
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.inputs.images import Picture
from qwen3vl_moe.inputs.processor import ImageInput, Prompt

TEXT = SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=2)
PLACEHOLDER = 9


def make_sequence(pieces, num_output, prompt_logprobs=None, eos=()):
    """A request whose prompt is made of tokens (integers) and pictures (name, number of image tokens)."""
    token_ids, images = [], []
    for piece in pieces:
        if isinstance(piece, int):
            token_ids.append(piece)
        else:
            name, count = piece
            picture = Picture(np.empty(0), (1, 2, 2 * count), name.encode() * 32, settings=None)
            images.append(ImageInput(picture, len(token_ids), count))
            token_ids += [PLACEHOLDER] * count
    return Sequence(
        request_id="",
        prompt=Prompt(None, token_ids, torch.arange(len(token_ids)).expand(3, -1), len(token_ids), tuple(images)),
        params=GenerationDefaults().complete(SamplingParams(max_tokens=num_output, prompt_logprobs=prompt_logprobs)),
        max_len=len(token_ids) + num_output,
        eos_token_ids=frozenset(eos),
        text=TextStream(None),
        generator=None,
        metrics=RequestMetrics(arrival_time=0.0),
    )


def histories(sequence, coming=()):
    """What the keys and values of each token depend on: all tokens up to it, and what their pictures show.

    ``coming`` are tokens that the sequence has not been given yet.
    """
    shows = {
        image.start + offset: (image.digest, offset)
        for image in sequence.prompt.images
        for offset in range(image.num_tokens)
    }
    found, history = [], 0
    for place, token in enumerate([*sequence.token_ids, *coming]):
        history = hash((history, token, shows.get(place)))
        found.append(history)
    return found


def to_encode(chunks):
    """Images that a step needs and that have no features yet."""
    return [
        (chunk.sequence, number, image)
        for chunk in chunks
        for number, image in chunk.sequence.images_in(chunk.start, chunk.stop)
        if chunk.sequence.features[number] is None
    ]


class Model:
    """Stands for engine and model: keeps in each row of the cache the history that its keys and values would have."""

    def __init__(self, scheduler):
        self.scheduler, self.cache = scheduler, scheduler.cache
        self.rows = {}

    def row(self, sequence, place):
        return sequence.block_table[place // self.cache.block_size], place % self.cache.block_size

    def compute(self, chunks):
        """A step from its beginning to its end; returns the sequences that it has finished."""
        return self.read(chunks, self.launch(chunks))

    def launch(self, chunks, coming=None):
        """Write the rows of a step and read all that it attends to; returns the next token of each sequence.

        ``coming`` is what the step before has returned, if it has not been read.
        """
        coming = coming or {}
        known = {chunk.sequence: histories(chunk.sequence, coming.get(chunk.sequence, ())) for chunk in chunks}
        for sequence, number, _ in to_encode(chunks):
            sequence.features[number] = "encoded"
        for chunk in chunks:
            for place in range(chunk.start, chunk.stop):
                block, offset = self.row(chunk.sequence, place)
                assert self.cache._references[block] == 1, "a shared block is written"
                assert self.cache._key_of[block] is None, "a block is written that others may find"
                self.rows[block, offset] = known[chunk.sequence][place]
        for chunk in chunks:
            read = [self.rows.get(self.row(chunk.sequence, place)) for place in range(chunk.stop)]
            assert read == known[chunk.sequence][: chunk.stop], "a sequence reads what is not its own past"
        # As of a greedy model: equal histories go on with equal tokens.
        return {chunk.sequence: [known[chunk.sequence][-1] % 2] for chunk in chunks if chunk.samples}

    def read(self, chunks, tokens):
        """Give the sequences what a step has computed; returns those that it has finished."""
        finished = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.finished:
                continue
            sequence.prompt_logprobs += [{} for _ in _prompt_logprob_span(chunk)]
            if chunk.samples:
                sequence.append(*tokens[sequence], None)
            self.scheduler.computed(chunk)
            if sequence.finished:
                self.scheduler.remove(sequence)
                finished.append(sequence)
        return finished


def make_scheduler(
    num_blocks, block_size, max_num_seqs=4, max_prefill_tokens=8, max_encoder_tokens=1000, prefix_caching=True
):
    cache = KVCache(TEXT, num_blocks, block_size, torch.float32, "cpu")
    return Scheduler(cache, max_num_seqs, max_prefill_tokens, max_encoder_tokens, prefix_caching)


def check_cache(scheduler):
    """References are those of the tables, what nobody holds is free, and keys name the blocks that carry them."""
    cache = scheduler.cache
    held = Counter(block for sequence in scheduler.running for block in sequence.block_table)
    assert [held[block] for block in range(cache.num_blocks)] == cache._references
    assert set(cache._free) == set(range(cache.num_blocks)) - set(held)
    assert {block: key for key, block in cache._block_of.items()} == {
        block: key for block, key in enumerate(cache._key_of) if key is not None
    }
    assert all(not sequence.block_table for sequence in scheduler.waiting)


def check_step(scheduler, chunks):
    check_cache(scheduler)
    assert len(scheduler.running) <= scheduler.max_num_seqs
    prefill = sum(chunk.stop - chunk.start for chunk in chunks if chunk.start == 0 or not chunk.samples)
    assert prefill <= scheduler.max_prefill_tokens
    encoded = [image.num_tokens for _, _, image in to_encode(chunks)]
    assert sum(encoded) <= scheduler.max_encoder_tokens or len(encoded) == 1
    for chunk in chunks:
        assert chunk.start == chunk.sequence.num_computed < chunk.stop <= len(chunk.sequence.token_ids)
        assert len(chunk.sequence.block_table) * scheduler.cache.block_size >= chunk.stop
        assert len(set(chunk.sequence.block_table)) == len(chunk.sequence.block_table)
    assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)


def check_step_ahead(scheduler, chunks):
    check_cache(scheduler)
    for chunk in chunks:
        assert chunk.start == len(chunk.sequence.token_ids) == chunk.stop - 1, "its token is the one that is coming"
        assert chunk.stop < chunk.sequence.max_len, "the row after this one may be the last"
        assert len(chunk.sequence.block_table) * scheduler.cache.block_size >= chunk.stop


PIECE = st.one_of(st.integers(0, 1), st.tuples(st.sampled_from("ab"), st.integers(1, 6)))
BEGINNINGS = st.lists(st.lists(PIECE, min_size=1, max_size=8), min_size=1, max_size=2)


@st.composite
def requests(draw, beginnings):
    """(steps after the one before, sequence, steps after which it is given up or None)."""
    beginning = draw(st.sampled_from(beginnings))
    pieces = beginning[: draw(st.integers(0, len(beginning)))] + draw(st.lists(PIECE, max_size=4))
    logprobs, eos = draw(st.sampled_from([None, None, None, 0])), draw(st.sampled_from([(), (), (1,)]))
    sequence = make_sequence(pieces or [0], draw(st.integers(1, 12)), logprobs, eos)
    return draw(st.integers(0, 6)), sequence, draw(st.none() | st.none() | st.integers(0, 20))


def test_random_loads_finish_and_share_only_what_is_equal():
    """The cache holds any one of the requests, and perhaps little more; some steps fail before they compute."""
    seen = Counter()

    @settings(max_examples=200, deadline=None)
    @given(
        arrivals=BEGINNINGS.flatmap(lambda beginnings: st.lists(requests(beginnings), min_size=1, max_size=12)),
        block_size=st.integers(1, 5),
        spare_blocks=st.integers(0, 8),
        max_num_seqs=st.integers(1, 5),
        max_prefill_tokens=st.integers(1, 30),
        max_encoder_tokens=st.integers(1, 20),
        prefix_caching=st.sampled_from([True, True, True, False]),
        failing_steps=st.sets(st.integers(0, 40), max_size=3),
        runs_ahead=st.booleans(),
    )
    def play(arrivals, block_size, spare_blocks, failing_steps, runs_ahead, **options):
        longest = max(sequence.max_len for _, sequence, _ in arrivals)
        num_blocks = -(-longest // block_size) + spare_blocks
        scheduler = make_scheduler(num_blocks, block_size, **options)
        model, added, finished, step, waited = Model(scheduler), [], [], 0, 0
        launched = []  # chunks and tokens of steps that have not been read
        # Recomputing everything for every token is far more than it can take: more steps mean that it hangs.
        work = sum(sequence.max_len * (sequence.params.max_tokens + 1) for _, sequence, _ in arrivals)
        bound = 10 + len(failing_steps) + sum(wait for wait, _, _ in arrivals) + work * len(arrivals)
        give_up = {}
        while len(finished) < len(arrivals):
            while len(added) < len(arrivals) and waited >= arrivals[len(added)][0]:
                _, sequence, patience = arrivals[len(added)]
                added.append(sequence)
                scheduler.add(sequence)
                give_up[id(sequence)] = None if patience is None else step + patience
                waited = 0
            waited += 1
            for sequence in [*scheduler.running, *scheduler.waiting]:
                if give_up[id(sequence)] == step:
                    scheduler.remove(sequence)
                    sequence.finish("abort")
                    finished.append(sequence)
            if launched and all(chunk.sequence.finished for chunk in launched[0][0]):
                launched.clear()
            if not launched:
                chunks = scheduler.schedule()
                assert chunks or not (scheduler.running or scheduler.waiting)
                check_step(scheduler, chunks)
                alone = [image.num_tokens > scheduler.max_encoder_tokens for _, _, image in to_encode(chunks)]
                seen["too large for the encoder's budget"] += any(alone)
                launched.append((chunks, {} if step in failing_steps else model.launch(chunks)))
            # First come, first served: who runs came before everybody who waits.
            order = [added.index(s) for s in [*scheduler.running, *scheduler.waiting]]
            assert order == sorted(order)
            if step in failing_steps:
                launched.clear()
            elif runs_ahead and len(launched) == 1 and (chunks := scheduler.ahead(launched[0][0])):
                check_step_ahead(scheduler, chunks)
                launched.append((chunks, model.launch(chunks, launched[0][1])))
                seen["launched ahead"] += 1
                seen["launched ahead of somebody who waits"] += bool(scheduler.waiting)
            if launched:
                finished += model.read(*launched.pop(0))
            if launched:
                seen["computed for nothing"] += any(chunk.sequence.finish_reason == "stop" for chunk in launched[0][0])
            check_cache(scheduler)
            step += 1
            assert step < bound
        assert sorted(scheduler.cache._free) == list(range(num_blocks))
        assert added[0].metrics.num_preemptions == 0
        for sequence in added:
            if sequence.finish_reason != "abort" and sequence.params.prompt_logprobs is not None:
                assert len(sequence.prompt_logprobs) == sequence.num_prompt_tokens
        assert scheduler.num_cached_tokens == 0 or scheduler.prefix_caching
        seen["found again"] += scheduler.num_cached_tokens
        seen["preempted"] += sum(sequence.metrics.num_preemptions for sequence in added)
        seen["given up"] += sum(sequence.finish_reason == "abort" for sequence in added)

    play()
    assert len(seen) == 7, "the loads are too easy"
    assert min(seen.values()) > 0, "the loads are too easy"


def run(model, *sequences):
    """All of them to their end; returns the number of tokens that were computed."""
    computed = 0
    for sequence in sequences:
        model.scheduler.add(sequence)
    while chunks := model.scheduler.schedule():
        computed += sum(chunk.stop - chunk.start for chunk in chunks)
        model.compute(chunks)
    return computed


def test_decode_goes_on_beside_a_long_prefill():
    scheduler = make_scheduler(100, 4, max_prefill_tokens=8)
    model = Model(scheduler)
    first, long = make_sequence([0] * 4, 10), make_sequence([1] * 40, 1)
    scheduler.add(first)
    model.compute(scheduler.schedule())
    scheduler.add(long)
    for step in range(5):
        chunks = scheduler.schedule()
        assert [(chunk.sequence, chunk.stop - chunk.start) for chunk in chunks] == [(first, 1), (long, 8)]
        assert chunks[1].samples == (step == 4)
        model.compute(chunks)


def test_a_chunk_ends_before_an_image_that_the_encoder_has_no_budget_for():
    scheduler = make_scheduler(100, 4, max_prefill_tokens=100, max_encoder_tokens=10)
    model = Model(scheduler)
    first = make_sequence([0, ("a", 6), 0, ("b", 4), 0, ("c", 1), 0], 1)
    second = make_sequence([("d", 3), 1, 1, ("e", 25), 1], 1)
    text = make_sequence([1] * 5, 1)
    for sequence in (first, second, text):
        scheduler.add(sequence)
    spans = []
    while chunks := scheduler.schedule():
        spans.append([(chunk.sequence, chunk.start, chunk.stop) for chunk in chunks])
        model.compute(chunks)
    assert spans == [
        [(first, 0, 13), (text, 0, 5)],  # a and b; d does not fit, and text need not wait for it
        [(first, 13, 15), (second, 0, 5)],  # c and d; e never fits, so it waits until it is alone
        [(second, 5, 31)],
    ]


def test_an_image_is_paid_for_once_however_many_chunks_it_takes():
    scheduler = make_scheduler(100, 4, max_prefill_tokens=4, max_encoder_tokens=6)
    model = Model(scheduler)
    scheduler.add(make_sequence([("a", 6), ("b", 6)], 1))
    spans = []
    while chunks := scheduler.schedule():
        spans.append([(chunk.start, chunk.stop) for chunk in chunks])
        model.compute(chunks)
    assert spans == [[(0, 4)], [(4, 8)], [(8, 12)]]  # nothing of a is left to encode when b is


def test_images_that_the_cache_holds_cost_nothing():
    scheduler = make_scheduler(100, 4, max_prefill_tokens=100, max_encoder_tokens=8)
    model = Model(scheduler)
    run(model, make_sequence([("a", 8)], 1))
    scheduler.add(make_sequence([("a", 8), ("b", 8), 0], 1))
    [chunk] = scheduler.schedule()
    assert (chunk.start, chunk.stop) == (8, 17)


def test_no_step_is_launched_ahead_of_somebody_who_could_be_admitted():
    scheduler = make_scheduler(8, 4, max_num_seqs=2)
    model = Model(scheduler)
    scheduler.add(make_sequence([0] * 3, 9))
    chunks = scheduler.schedule()
    assert [(c.start, c.stop) for c in scheduler.ahead(chunks)] == [(3, 4)]
    scheduler.add(small := make_sequence([1] * 4, 9))
    assert scheduler.ahead(chunks) == []
    scheduler.remove(small)
    scheduler.add(make_sequence([1] * 30, 1))  # seven blocks are free, and it needs eight
    assert [(c.start, c.stop) for c in scheduler.ahead(chunks)] == [(3, 4)]
    model.compute(chunks)


def test_what_leaves_a_seat_for_somebody_who_waits_is_not_launched_ahead():
    scheduler = make_scheduler(100, 4, max_num_seqs=2)
    first, second, third = make_sequence([0] * 3, 1), make_sequence([1] * 3, 9), make_sequence([1] * 3, 9)
    scheduler.add(first)
    scheduler.add(second)
    chunks = scheduler.schedule()
    assert [c.sequence for c in scheduler.ahead(chunks)] == [second]
    scheduler.add(third)
    assert scheduler.ahead(chunks) == []


def test_nothing_is_launched_ahead_that_would_push_another_out():
    scheduler = make_scheduler(2, 4)
    for token in (0, 1):
        scheduler.add(make_sequence([token] * 3, 5))
    chunks = scheduler.schedule()
    ahead = scheduler.ahead(chunks)
    assert [(c.start, c.stop) for c in ahead] == [(3, 4), (3, 4)]
    Model(scheduler).compute(chunks)
    assert scheduler.ahead(ahead) == []  # each would need a second block


def test_removing_a_waiting_and_a_running_sequence():
    scheduler = make_scheduler(8, 4, max_num_seqs=1)
    running, waiting = make_sequence([0] * 4, 4), make_sequence([0] * 4, 4)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert scheduler.schedule() == []
    assert scheduler.cache.num_free == 8


def test_requests_that_begin_alike_wait_for_the_first_one():
    """All arrive at once: the common beginning is computed once, then everybody goes on together."""
    scheduler = make_scheduler(100, 4, max_num_seqs=8, max_prefill_tokens=100)
    model = Model(scheduler)
    sequences = [make_sequence([0] * 20 + [1] * (1 + number), 3) for number in range(4)]
    # Of 20 + n tokens, and 2 of the answer that are fed back, the last three skip the five blocks that are shared.
    assert run(model, *sequences) == sum(20 + 1 + n + 2 for n in range(4)) - 3 * 20
    assert [sequence.metrics.num_cached_tokens for sequence in sequences] == [0, 20, 20, 20]
    assert scheduler.num_cached_tokens == 60
    assert scheduler.num_queried_tokens == sum(21 + n for n in range(4))


def test_what_may_not_be_taken_from_the_cache():
    """The last token's logits are needed, and for prompt_logprobs those of all tokens."""
    model = Model(make_scheduler(100, 4))
    assert run(model, make_sequence([0] * 12, 1)) == 12
    assert run(model, make_sequence([0] * 12, 1)) == 4
    assert run(model, make_sequence([0] * 13, 1)) == 1
    assert run(model, make_sequence([0] * 12, 1, prompt_logprobs=0)) == 12
    assert (
        run(Model(make_scheduler(100, 4, prefix_caching=False)), *(make_sequence([0] * 12, 1) for _ in range(2))) == 24
    )


def test_pictures_are_told_apart_by_content_and_place():
    model = Model(make_scheduler(100, 4))
    assert run(model, make_sequence([0, 0, ("a", 8), 0, 0, 0], 1)) == 13
    assert run(model, make_sequence([0, 0, ("a", 8), 0, 0, 1], 1)) == 1
    assert run(model, make_sequence([0, 0, ("b", 8), 0, 0, 0], 1)) == 13
    # Two pictures without anything between them: nine placeholders, divided at another place.
    assert run(model, make_sequence([("a", 4), ("a", 5)], 1)) == 9
    assert run(model, make_sequence([("a", 5), ("a", 4)], 1)) == 5
    assert run(model, make_sequence([("a", 5), ("b", 4)], 1)) == 5


def test_the_least_recently_used_goes_first_and_its_end_before_its_beginning():
    model = Model(make_scheduler(6, 4))
    old, new = [0] * 9, [1] * 9
    for pieces in (old, new, old):  # two full blocks each
        run(model, make_sequence(pieces, 1))
    assert model.scheduler.num_cached_tokens == 8
    run(model, make_sequence([0, 1] * 6, 1))  # takes three: two that hold nothing, and one of `new`
    keys = [make_sequence(pieces, 1).block_keys(0, 2, 4) for pieces in (old, new)]
    assert [[model.cache.find(key) is not None for key in two] for two in keys] == [[True, True], [True, False]]


def test_size_of_the_published_cache():
    """96 KiB a token: 48 layers x 2 x 4 heads x 128 x 2 bytes."""
    text = Qwen3VLMoeConfig.qwen3_vl_30b_a3b().text
    options = EngineOptions(max_num_seqs=128)
    assert bytes_per_block(text, 16, torch.bfloat16) == 16 * 96 * 1024
    assert plan_cache(text, torch.bfloat16, options, 10 * 2**30) == (10 * 2**30 // (16 * 96 * 1024), 32768)
    assert plan_cache(text, torch.bfloat16, options, 2**50) == (128 * 2048, 32768)
    assert plan_cache(text, torch.bfloat16, options, 2**30) == (682, 682 * 16)
    with pytest.raises(OptionError, match="no memory is left for the KV cache"):
        plan_cache(text, torch.bfloat16, options, -5)


@pytest.mark.parametrize(
    ("asked", "num_blocks", "on_gpu", "seats"),
    [
        (7, 10**6, True, 7),  # as asked for
        (None, None, True, 512),  # at most
        (None, 10**6, True, 512),
        (None, 800, True, 100),  # 128 tokens for each
        (None, 3, True, 1),
        (None, 800, False, 128),
    ],
)
def test_seats_by_the_size_of_the_cache(asked, num_blocks, on_gpu, seats):
    options = EngineOptions(max_num_seqs=asked, block_size=16)
    assert options.with_seats(num_blocks, on_gpu).seats == seats
