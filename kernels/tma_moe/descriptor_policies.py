"""The story of SGLang's pull request 18782, with its three ways to obtain a weight's TMA descriptor.

A kernel that loads weights by TMA takes a descriptor, which Triton's Python side makes from a small object at each
launch. SGLang made that object anew in every call, after it had registered a scratch allocator with Triton:

    per_call  a new object and a new allocator at every launch: SGLang before the pull request.

The pull request moved both out of the way, and measured about 10 % less time to first token with four GPUs:

    lru       the allocator is set once (for each thread: Triton keeps it in a context variable), and objects are
              kept in a bounded table, the least recently used one going first. TMA_MOE_DESC_CACHE_MAX says how many
              entries, 64 if it is not set; 0 keeps none. An entry keeps its weights in memory until it is evicted,
              or until `clear_descriptor_cache` is called.

Two things can be learned from it. Descriptors that are made on the host need no scratch memory, so the allocator need
not be set at all. And a table that is smaller than the number of weights which a forward pass cycles through never
hits: 48 layers with two weights each are 96 keys, and each look-up in 64 entries evicts just what is asked for next. So

    owned     the default: each weight's owner keeps its descriptors (descriptors.py). There is no table, no bound and
              no key to compute.

`set_descriptor_policy`, or TMA_MOE_DESCRIPTORS in the environment, selects one for the whole process, so that they can
be compared: scripts/bench_moe.py and scripts/ttft.py --compare do.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tma_moe import descriptors
from tma_moe.descriptors import View, build
from tma_moe.expert_weights import ExpertWeights

POLICIES = ("per_call", "lru", "owned")
_lock = threading.Lock()
_policy: str | None = None
_allocator_is_set = threading.local()
_lru: "OrderedDict[tuple, Any]" = OrderedDict()


@dataclass
class DescriptorStats:
    """What the policies did since `reset`: objects built, table hits, misses and evictions, allocator calls."""

    built: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    allocator_calls: int = 0


_stats = DescriptorStats()


def descriptor_stats(*, reset: bool = False) -> DescriptorStats:
    """A copy of the counters of this process; with `reset` they start again from zero."""
    global _stats
    with _lock:
        stats = replace(_stats, built=descriptors.built)
        if reset:
            _stats, descriptors.built = DescriptorStats(), 0
    return stats


def current_descriptor_policy() -> str:
    """The policy in force: the one set last, else TMA_MOE_DESCRIPTORS, else "owned"."""
    if _policy is None:
        set_descriptor_policy(os.environ.get("TMA_MOE_DESCRIPTORS", "owned"))
    assert _policy is not None
    return _policy


def set_descriptor_policy(policy: str) -> None:
    """Selects the policy of the whole process. Raises ValueError for an unknown name."""
    global _policy
    if policy not in POLICIES:
        raise ValueError(f"descriptor policy {policy!r} is unknown; use one of {', '.join(POLICIES)}")
    _policy = policy
    descriptors.override = {"per_call": _per_call, "lru": _from_lru, "owned": None}[policy]


@contextlib.contextmanager
def descriptor_policy(policy: str) -> Iterator[None]:
    """Selects the policy of the whole process until the block ends."""
    before = current_descriptor_policy()
    set_descriptor_policy(policy)
    try:
        yield
    finally:
        set_descriptor_policy(before)


def lru_capacity() -> int:
    """Entries that policy "lru" keeps, from TMA_MOE_DESC_CACHE_MAX. Raises ValueError unless it is an integer >= 0."""
    text = os.environ.get("TMA_MOE_DESC_CACHE_MAX", "64")
    if not text.strip().isdigit():
        raise ValueError(f"TMA_MOE_DESC_CACHE_MAX must be a whole number of entries, 0 or more, got {text!r}")
    return int(text)


def clear_descriptor_cache() -> None:
    """Empties the table of policy "lru"."""
    with _lock:
        _lru.clear()


def _per_call(experts: ExpertWeights, name: str, view: View, block: tuple[int, ...], gluon: bool) -> Any:
    _set_allocator()
    return build(experts.parameter(name), view, block, gluon)


def _from_lru(experts: ExpertWeights, name: str, view: View, block: tuple[int, ...], gluon: bool) -> Any:
    if not getattr(_allocator_is_set, "done", False):
        _set_allocator()
        _allocator_is_set.done = True
    capacity, weight = lru_capacity(), experts.parameter(name)
    key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device, view, block, gluon)
    with _lock:
        if key in _lru:
            _stats.hits += 1
            _lru.move_to_end(key)
            return _lru[key]
        _stats.misses += 1
        # The entry holds the weights themselves, so their address cannot be given to other weights while it is here.
        descriptor = build(weight.detach(), view, block, gluon)
        if capacity:
            _lru[key] = descriptor
        while len(_lru) > capacity:
            _lru.popitem(last=False)
            _stats.evictions += 1
        return descriptor


def _set_allocator() -> None:
    import triton

    _stats.allocator_calls += 1

    def allocate(size: int, alignment: int, stream: int | None) -> Any:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(allocate)


def _as_the_environment_says(*asked: Any) -> Any:
    """First use: read TMA_MOE_DESCRIPTORS, then go through its policy."""
    current_descriptor_policy()
    return descriptors.weight_descriptor(*asked)


descriptors.override = _as_the_environment_says
