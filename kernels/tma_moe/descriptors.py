"""TMA descriptors of the weights: three ways to own them, selectable so that they can be compared.

A descriptor tells the tensor memory accelerator where a matrix lies and which block one load brings. Triton encodes it
anew at every launch from a small Python object; the policies differ in where that object comes from.

    per_call  a new object and a new scratch allocator at every launch, as SGLang did before its pull request 18782;
    lru       that pull request's mechanism: the allocator is set once, objects are kept in a bounded
              least-recently-used table (TMA_MOE_DESC_CACHE_MAX entries, default 64, 0 keeps none). A table smaller than
              the number of weights that a forward pass cycles through never hits. An entry keeps its weights' memory
              alive until it is evicted or `clear_descriptor_cache` is called;
    owned     the default: `ExpertWeights` holds one object per matrix and block shape. It refers to the live
              nn.Parameter, so it follows `.to()` and `param.data = ...`, is dropped when the parameter is re-bound and
              pins nothing. With triton 3.6 its encoding is kept, too, until the address changes (kernel.py). No
              allocator: descriptors made on the host need no scratch memory.

Descriptors of activations are made for one call and never kept.
"""

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tma_moe.experts import ExpertWeights

POLICIES = ("per_call", "lru", "owned")
_lock = threading.Lock()
_policy: str | None = None
_allocator_is_set = threading.local()  # triton keeps its allocator in a context variable: one per thread


@dataclass
class DescriptorStats:
    """What the policies did since `reset`: objects built, table hits, misses and evictions, allocator calls."""

    built: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    allocator_calls: int = 0


_stats = DescriptorStats()
_lru: "OrderedDict[tuple, object]" = OrderedDict()


def descriptor_stats(*, reset: bool = False) -> DescriptorStats:
    """A copy of the counters of this process; with `reset` they start again from zero."""
    global _stats
    with _lock:
        stats = replace(_stats)
        if reset:
            _stats = DescriptorStats()
    return stats


def clear_descriptor_cache() -> None:
    """Empties the table of policy "lru"."""
    with _lock:
        _lru.clear()


def current_descriptor_policy() -> str:
    """The policy in force: the one set last, else TMA_MOE_DESCRIPTORS, else "owned"."""
    if _policy is None:
        set_descriptor_policy(os.environ.get("TMA_MOE_DESCRIPTORS", "owned"))
    return _policy


def set_descriptor_policy(policy: str) -> None:
    """Selects the policy of the whole process. Raises ValueError for an unknown name."""
    global _policy
    if policy not in POLICIES:
        raise ValueError(f"descriptor policy {policy!r} is unknown; use one of {', '.join(POLICIES)}")
    _policy = policy


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


def _view(weight: Tensor, rank: int) -> tuple[list[int], list[int]]:
    """Shape and strides under which a block of this rank addresses a weight [E, N, K].

    Rank 2 is all rows of all experts. For gate_up, one block of the others holds rows of the gate half and the rows of
    the up half that belong to them, with no repacking: rank 4 is [E, 2, I, H], all gate rows before all up rows; rank 5
    is [E, I/8, 2, 8, H], eight and eight in turns.
    """
    E, N, K = weight.shape
    if rank == 2:
        return [E * N, K], [K, 1]
    if rank == 4:
        return [E, 2, N // 2, K], [N * K, N // 2 * K, K, 1]
    return [E, N // 16, 2, 8, K], [N * K, 8 * K, N // 2 * K, K, 1]


@functools.cache
def _descriptor_type(gluon: bool, bits: int, rank: int) -> Callable:
    """The class of a descriptor. A Gluon kernel's also states the shared-memory layout: swizzled rows of 128 bytes."""
    if not gluon:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=rank)
    return functools.partial(TensorDescriptor, layout=layout)


def _describe(tensor: Tensor, shape: list[int], strides: list[int], block: tuple[int, ...], gluon: bool):
    return _descriptor_type(gluon, 8 * tensor.element_size(), len(block))(tensor, shape, strides, list(block))


def _build(weight: Tensor, block: tuple[int, ...], gluon: bool):
    _stats.built += 1
    return _describe(weight, *_view(weight, len(block)), block, gluon)


def _set_allocator() -> None:
    import triton

    _stats.allocator_calls += 1
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def _from_lru(weight: Tensor, block: tuple[int, ...], gluon: bool):
    if not getattr(_allocator_is_set, "done", False):
        _set_allocator()
        _allocator_is_set.done = True
    capacity = lru_capacity()
    key = (weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight.device, block, gluon)
    with _lock:
        if key in _lru:
            _stats.hits += 1
            _lru.move_to_end(key)
            return _lru[key]
        _stats.misses += 1
        # The entry holds the weights themselves, so their address cannot be given to other weights while it is here.
        descriptor = _build(weight.detach(), block, gluon)
        if capacity:
            _lru[key] = descriptor
        while len(_lru) > capacity:
            _lru.popitem(last=False)
            _stats.evictions += 1
        return descriptor


def weight_descriptor(experts: ExpertWeights, name: str, block: tuple[int, ...], gluon: bool = False):
    """The descriptor of parameter `name` ("gate_up" or "down") for one block shape, under the policy in force.

    `gluon` asks for the kind that Gluon kernels take.
    """
    weight = experts._parameters[name]
    policy = current_descriptor_policy()
    if policy == "owned":
        descriptor = experts.descriptors.get((name, block, gluon))
        # Identity is the whole check: each launch reads the address from the parameter itself.
        if descriptor is None or descriptor.base is not weight:
            # Two threads may both get here; either object serves.
            descriptor = _build(weight, block, gluon)
            descriptor.keeps_encoding = True  # kernel.py encodes it anew when the address has changed
            experts.descriptors[name, block, gluon] = descriptor
        return descriptor
    if policy == "lru":
        return _from_lru(weight, block, gluon)
    _set_allocator()
    return _build(weight, block, gluon)


def activation_descriptor(tensor: Tensor, block: tuple[int, int], gluon: bool = False):
    """A descriptor of a matrix for this call only."""
    return _describe(tensor, list(tensor.shape), [tensor.shape[1], 1], block, gluon)
