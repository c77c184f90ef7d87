"""The scheduler alone, without a model: random loads finish, in order, and no block leaks or is shared."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine.kv_cache import KVCache, bytes_per_block, plan_cache
from qwen3vl_moe.engine.params import EngineOptions
from qwen3vl_moe.engine.scheduler import Scheduler
from qwen3vl_moe.errors import OptionError

TEXT = SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=2)


class FakeSequence:
    """A sequence that generates ``num_output`` tokens, whatever they are."""

    def __init__(self, num_prompt, num_output):
        self.num_prompt_tokens, self.length = num_prompt, num_prompt + num_output
        self.token_ids, self.num_computed, self.block_table = [0] * num_prompt, 0, []
        self.preemptions = 0

    @property
    def pending(self):
        return len(self.token_ids) - self.num_computed

    def reset(self):
        self.num_computed = 0
        self.preemptions += 1


def make_scheduler(num_blocks, block_size, max_num_seqs=4, max_prefill_tokens=8):
    cache = KVCache(TEXT, num_blocks, block_size, torch.float32, "cpu")
    return Scheduler(cache, max_num_seqs, max_prefill_tokens)


def check_step(scheduler, chunks):
    cache = scheduler.cache
    held = [block for sequence in scheduler.running for block in sequence.block_table]
    assert sorted(held + cache._free) == list(range(cache.num_blocks)), "every block is held once or free"
    assert all(not sequence.block_table for sequence in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_num_seqs
    prefill = sum(chunk.stop - chunk.start for chunk in chunks if chunk.sequence.num_computed == 0 or not chunk.samples)
    assert prefill <= scheduler.max_prefill_tokens
    for chunk in chunks:
        assert chunk.start == chunk.sequence.num_computed < chunk.stop <= len(chunk.sequence.token_ids)
        assert len(chunk.sequence.block_table) * cache.block_size >= chunk.stop
    assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)


def play(scheduler, chunks):
    """What the model would do: compute the chunks, add a token where one comes out. Returns what finished."""
    finished = []
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.num_computed = chunk.stop
        if samples:
            chunk.sequence.token_ids.append(0)
            if len(chunk.sequence.token_ids) == chunk.sequence.length:
                scheduler.remove(chunk.sequence)
                finished.append(chunk.sequence)
    return finished


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12),
    block_size=st.integers(1, 7),
    spare_blocks=st.integers(0, 8),
    max_num_seqs=st.integers(1, 5),
    max_prefill_tokens=st.integers(1, 30),
)
def test_random_loads_finish_and_leak_nothing(arrivals, block_size, spare_blocks, max_num_seqs, max_prefill_tokens):
    """Arrivals are (steps after the one before, prompt tokens, answer tokens); the cache holds any one of them."""
    longest = max(prompt + output for _, prompt, output in arrivals)
    scheduler = make_scheduler(-(-longest // block_size) + spare_blocks, block_size, max_num_seqs, max_prefill_tokens)
    todo = [(wait, FakeSequence(prompt, output)) for wait, prompt, output in arrivals]
    added, finished, steps = [], [], 0
    # Recomputing everything for every token is far more than it can take: more steps mean that it hangs.
    bound = 10 + sum(wait for wait, _, _ in arrivals) + sum((p + o) * (o + 1) for _, p, o in arrivals) * len(arrivals)
    wait = 0
    while len(finished) < len(todo):
        while len(added) < len(todo) and wait >= todo[len(added)][0]:
            added.append(todo[len(added)][1])
            scheduler.add(added[-1])
            wait = 0
        wait += 1
        chunks = scheduler.schedule()
        assert chunks or not (scheduler.running or scheduler.waiting)
        check_step(scheduler, chunks)
        # First come, first served: who runs came before everybody who waits.
        order = [added.index(s) for s in [*scheduler.running, *scheduler.waiting]]
        assert order == sorted(order)
        finished += play(scheduler, chunks)
        steps += 1
        assert steps < bound
    assert added[0].preemptions == 0
    assert sorted(scheduler.cache._free) == list(range(scheduler.cache.num_blocks))


def test_decode_goes_on_beside_a_long_prefill():
    scheduler = make_scheduler(100, 4, max_prefill_tokens=8)
    first, long = FakeSequence(4, 10), FakeSequence(40, 1)
    scheduler.add(first)
    play(scheduler, scheduler.schedule())
    scheduler.add(long)
    for step in range(5):
        chunks = scheduler.schedule()
        assert [(chunk.sequence, chunk.stop - chunk.start) for chunk in chunks] == [(first, 1), (long, 8)]
        assert chunks[1].samples == (step == 4)
        play(scheduler, chunks)


def test_removing_a_waiting_and_a_running_sequence():
    scheduler = make_scheduler(8, 4, max_num_seqs=1)
    running, waiting = FakeSequence(4, 4), FakeSequence(4, 4)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert scheduler.schedule() == []
    assert scheduler.cache.num_free == 8


def test_size_of_the_published_cache():
    """96 KiB a token: 48 layers x 2 x 4 heads x 128 x 2 bytes."""
    text = Qwen3VLMoeConfig.qwen3_vl_30b_a3b().text
    assert bytes_per_block(text, 16, torch.bfloat16) == 16 * 96 * 1024
    assert plan_cache(text, torch.bfloat16, EngineOptions(), 10 * 2**30) == (10 * 2**30 // (16 * 96 * 1024), 32768)
    assert plan_cache(text, torch.bfloat16, EngineOptions(), 2**50) == (128 * 2048, 32768)
    assert plan_cache(text, torch.bfloat16, EngineOptions(), 2**30) == (682, 682 * 16)
    with pytest.raises(OptionError, match="no memory is left for the KV cache"):
        plan_cache(text, torch.bfloat16, EngineOptions(), -5)
