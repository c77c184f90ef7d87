"""The three descriptor policies: counters, and who keeps what alive. Descriptors are plain objects: no GPU."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import tma_moe
import torch
from tma_moe import descriptors
from tma_moe.descriptors import weight_descriptor

pytest.importorskip("triton.tools.tensor_descriptor")
UP_BLOCK, DOWN_BLOCK = (64, 64), (128, 64)


@pytest.fixture(autouse=True)
def fresh():
    before = descriptors.current_descriptor_policy()
    descriptors.clear_descriptor_cache()
    tma_moe.descriptor_stats(reset=True)
    yield
    descriptors.clear_descriptor_cache()
    tma_moe.set_descriptor_policy(before)


def experts(E: int = 2, H: int = 16, I: int = 8) -> tma_moe.ExpertWeights:  # noqa: E741
    return tma_moe.ExpertWeights(E, H, I, dtype=torch.float16)


def one_forward(layers: list[tma_moe.ExpertWeights]) -> None:
    """The descriptors that one pass over all layers asks for: two weights each."""
    for layer in layers:
        weight_descriptor(layer, "gate_up", UP_BLOCK)
        weight_descriptor(layer, "down", DOWN_BLOCK)


def test_96_weights_never_hit_an_lru_of_64():
    layers = [experts() for _ in range(48)]
    with tma_moe.descriptor_policy("lru"):
        for _ in range(3):
            one_forward(layers)
        stats = tma_moe.descriptor_stats(reset=True)
        assert (stats.hits, stats.misses, stats.built) == (0, 3 * 96, 3 * 96)
        assert stats.evictions == 3 * 96 - 64
        # Half the layers fit, and then every pass after the first hits.
        one_forward(layers[:24])
        tma_moe.descriptor_stats(reset=True)
        one_forward(layers[:24])
        assert tma_moe.descriptor_stats().hits == 48


def test_owned_builds_each_descriptor_once():
    layers = [experts() for _ in range(48)]
    with tma_moe.descriptor_policy("owned"):
        for _ in range(3):
            one_forward(layers)
    stats = tma_moe.descriptor_stats()
    assert (stats.built, stats.hits, stats.misses, stats.allocator_calls) == (96, 0, 0, 0)


def test_per_call_builds_and_sets_the_allocator_every_time():
    layers = [experts() for _ in range(2)]
    with tma_moe.descriptor_policy("per_call"):
        for _ in range(3):
            one_forward(layers)
    stats = tma_moe.descriptor_stats()
    assert (stats.built, stats.allocator_calls) == (12, 12)


@pytest.mark.parametrize(("text", "kept"), [("0", 0), ("1", 1), ("2", 2)])
def test_lru_capacity_comes_from_the_environment(monkeypatch, text, kept):
    monkeypatch.setenv("TMA_MOE_DESC_CACHE_MAX", text)
    layer = experts()
    with tma_moe.descriptor_policy("lru"):
        for _ in range(2):
            one_forward([layer])
    assert tma_moe.descriptor_stats().hits == (2 if kept == 2 else 0)
    assert len(descriptors._lru) == kept


@pytest.mark.parametrize("text", ["-1", "many", ""])
def test_bad_lru_capacity_is_named(monkeypatch, text):
    monkeypatch.setenv("TMA_MOE_DESC_CACHE_MAX", text)
    with (
        tma_moe.descriptor_policy("lru"),
        pytest.raises(ValueError, match="TMA_MOE_DESC_CACHE_MAX must be a whole number"),
    ):
        weight_descriptor(experts(), "down", DOWN_BLOCK)


def test_policy_comes_from_the_environment_and_is_checked(monkeypatch):
    monkeypatch.setattr(descriptors, "_policy", None)
    monkeypatch.setenv("TMA_MOE_DESCRIPTORS", "lru")
    assert descriptors.current_descriptor_policy() == "lru"
    monkeypatch.setattr(descriptors, "_policy", None)
    monkeypatch.setenv("TMA_MOE_DESCRIPTORS", "sometimes")
    with pytest.raises(ValueError, match="'sometimes' is unknown; use one of per_call, lru, owned"):
        descriptors.current_descriptor_policy()


def test_policy_is_restored_after_an_error():
    tma_moe.set_descriptor_policy("owned")
    with pytest.raises(KeyError), tma_moe.descriptor_policy("lru"):
        raise KeyError
    assert descriptors.current_descriptor_policy() == "owned"


def test_blocks_of_rank_4_view_gate_and_up_apart():
    layer = experts(E=3, H=16, I=8)
    flat = weight_descriptor(layer, "gate_up", UP_BLOCK)
    halves = weight_descriptor(layer, "gate_up", (1, 2, 64, 64))
    assert (flat.shape, flat.strides) == ([48, 16], [16, 1])
    assert (halves.shape, halves.strides) == ([3, 2, 8, 16], [256, 128, 16, 1])
    with torch.no_grad():
        layer.gate_up.copy_(torch.arange(layer.gate_up.numel()).view_as(layer.gate_up))
        viewed = torch.as_strided(layer.gate_up, halves.shape, halves.strides)
    gate, up = layer.gate_up.chunk(2, dim=1)
    assert torch.equal(viewed[:, 0], gate)
    assert torch.equal(viewed[:, 1], up)


def test_owned_follows_the_parameter():
    layer = experts()
    tma_moe.set_descriptor_policy("owned")
    first = weight_descriptor(layer, "down", DOWN_BLOCK)
    # In place: the same object, and triton reads address and dtype from the parameter at each launch.
    layer.down.data = torch.empty(2, 16, 8, dtype=torch.float16)
    assert weight_descriptor(layer, "down", DOWN_BLOCK) is first
    assert first.base.data_ptr() == layer.down.data_ptr()
    layer.to(torch.bfloat16)
    assert weight_descriptor(layer, "down", DOWN_BLOCK).base.dtype == torch.bfloat16
    # Re-bound: a new object at once, and the old parameter is not kept.
    old = weakref.ref(layer.down)
    del first
    layer.down = torch.nn.Parameter(torch.empty(2, 16, 8, dtype=torch.float16), requires_grad=False)
    gc.collect()
    assert old() is None
    assert weight_descriptor(layer, "down", DOWN_BLOCK).base is layer.down


def test_owned_notices_a_parameter_that_was_swapped_behind_the_module():
    layer = experts()
    tma_moe.set_descriptor_policy("owned")
    weight_descriptor(layer, "down", DOWN_BLOCK)
    layer._parameters["down"] = torch.nn.Parameter(torch.empty(2, 16, 8), requires_grad=False)
    assert weight_descriptor(layer, "down", DOWN_BLOCK).base is layer.down


@pytest.mark.parametrize("policy", ["per_call", "owned"])
def test_dropping_the_weights_frees_them(policy):
    layer = experts()
    with tma_moe.descriptor_policy(policy):
        one_forward([layer])
    watched = weakref.ref(layer.gate_up)
    del layer
    gc.collect()
    assert watched() is None


def test_lru_keeps_dropped_weights_until_it_is_cleared():
    layer = experts()
    with tma_moe.descriptor_policy("lru"):
        one_forward([layer])
    storage = weakref.ref(layer.gate_up.untyped_storage())
    kept = next(iter(descriptors._lru.values())).base
    assert kept.data_ptr() == layer.gate_up.data_ptr()
    del layer, kept
    gc.collect()
    assert len(descriptors._lru) == 2
    descriptors.clear_descriptor_cache()
    gc.collect()
    assert storage() is None


@pytest.mark.parametrize("policy", ["per_call", "lru", "owned"])
def test_threads_get_descriptors_of_their_own_weights(policy):
    layers = [experts() for _ in range(8)]
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            layer = layers[torch.randint(8, (), generator=generator)]
            if weight_descriptor(layer, "gate_up", UP_BLOCK).base.data_ptr() != layer.gate_up.data_ptr():
                wrong.append(seed)

    with tma_moe.descriptor_policy(policy):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_owned_encoding_is_kept_until_the_address_changes(monkeypatch):
    """What triton 3.6's launcher in C is given: addresses, and of a descriptor what triton makes of it."""
    from tma_moe import kernel
    from triton.backends.nvidia import driver

    encoded, seen = [], []

    class Launcher:  # as the builtin function is, no function in Python
        def __call__(self, *args):
            seen.append(args)

    def encode(descriptor, meta):
        encoded.append(descriptor.base.data_ptr())
        return [f"map of {meta}", descriptor.base.data_ptr()]

    monkeypatch.setattr(kernel.triton, "__version__", "3.6.0")
    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    run = SimpleNamespace(
        launch=Launcher(),
        global_scratch_size=0,
        profile_scratch_size=0,
        launch_cooperative_grid=False,
        launch_pdl=True,
    )
    compiled = SimpleNamespace(
        run=run, function=7, packed_metadata="packed", metadata=SimpleNamespace(tensordesc_meta=["up"])
    )
    launch, layer, x = kernel._direct_launcher(compiled), experts(), torch.zeros(8)

    def launched(policy):
        with tma_moe.descriptor_policy(policy):
            args = (x, weight_descriptor(layer, "gate_up", UP_BLOCK), 3)
        launch((1, 2, 1), 5, args, tuple(map(kernel._kind, args)), (64, "const"))
        return seen[-1][-6:]

    for policy, times in (("owned", 1), ("per_call", 3), ("lru", 3)):
        encoded.clear()
        for _ in range(3):
            end = launched(policy)
            assert end == (x.data_ptr(), "map of up", layer.gate_up.data_ptr(), 3, 64, "const")
        assert len(encoded) == times, policy
    assert seen[-1][:13] == (1, 2, 1, 5, 7, False, True, None, None, "packed", None, None, None)
    layer.gate_up.data = layer.gate_up.data.clone()
    encoded.clear()
    assert launched("owned")[2] == layer.gate_up.data_ptr() == encoded[0]
    run.profile_scratch_size = 16
    assert kernel._direct_launcher(compiled) is None
    monkeypatch.setattr(kernel.triton, "__version__", "3.7.0")
    run.profile_scratch_size = 0
    assert kernel._direct_launcher(compiled) is None
