"""The three descriptor policies: counters, and who keeps what alive. Descriptors are plain objects: no GPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tma_moe
from tma_moe import descriptor_policies, support
from tma_moe.descriptors import weight_descriptor

pytest.importorskip("triton.tools.tensor_descriptor")
from tma_moe.gemm.product import all_rows
from tma_moe.launcher import Launch

UP, DOWN = ("gate_up", all_rows, (64, 64)), ("down", all_rows, (128, 64))


@pytest.fixture(autouse=True)
def fresh():
    before = descriptor_policies.current_descriptor_policy()
    descriptor_policies.clear_descriptor_cache()
    tma_moe.descriptor_stats(reset=True)
    yield
    descriptor_policies.clear_descriptor_cache()
    tma_moe.set_descriptor_policy(before)


def experts(E: int = 2, H: int = 16, I: int = 8) -> tma_moe.ExpertWeights:  # noqa: E741
    return tma_moe.ExpertWeights(E, H, I, dtype=torch.float16)


def one_forward(layers: list[tma_moe.ExpertWeights]) -> None:
    """The descriptors that one pass over all layers asks for: two weights each."""
    for layer in layers:
        weight_descriptor(layer, *UP)
        weight_descriptor(layer, *DOWN)


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
    assert len(descriptor_policies._lru) == kept


@pytest.mark.parametrize("text", ["-1", "many", ""])
def test_bad_lru_capacity_is_named(monkeypatch, text):
    monkeypatch.setenv("TMA_MOE_DESC_CACHE_MAX", text)
    with (
        tma_moe.descriptor_policy("lru"),
        pytest.raises(ValueError, match="TMA_MOE_DESC_CACHE_MAX must be a whole number"),
    ):
        weight_descriptor(experts(), *DOWN)


def test_policy_comes_from_the_environment_and_is_checked(monkeypatch):
    monkeypatch.setattr(descriptor_policies, "_policy", None)
    monkeypatch.setenv("TMA_MOE_DESCRIPTORS", "lru")
    assert descriptor_policies.current_descriptor_policy() == "lru"
    monkeypatch.setattr(descriptor_policies, "_policy", None)
    monkeypatch.setenv("TMA_MOE_DESCRIPTORS", "sometimes")
    with pytest.raises(ValueError, match="'sometimes' is unknown; use one of per_call, lru, owned"):
        descriptor_policies.current_descriptor_policy()


@pytest.mark.parametrize(("text", "counted"), [(None, (1, 0, 0)), ("lru", (1, 1, 1)), ("per_call", (2, 0, 2))])
def test_the_first_weight_asks_the_environment(text, counted):
    """In a process of its own, as only there nobody has asked before: objects, hits and calls of the allocator."""
    code = f"""
import tma_moe
from tma_moe.descriptors import weight_descriptor
from tma_moe.gemm.product import all_rows
layer = tma_moe.ExpertWeights(2, 16, 8)
for _ in range(2):
    weight_descriptor(layer, "down", all_rows, (128, 64))
stats = tma_moe.descriptor_stats()
assert (stats.built, stats.hits, stats.allocator_calls) == {counted}, stats
"""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "kernels"), os.environ.get("PYTHONPATH", "")])}
    env.pop("TMA_MOE_DESCRIPTORS", None)
    env |= {} if text is None else {"TMA_MOE_DESCRIPTORS": text}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def test_policy_is_restored_after_an_error():
    tma_moe.set_descriptor_policy("owned")
    with pytest.raises(KeyError), tma_moe.descriptor_policy("lru"):
        raise KeyError
    assert descriptor_policies.current_descriptor_policy() == "owned"


def test_views_address_the_weights_where_they_lie():
    """As the rows of all experts; and as eight rows of gate in turns with the eight of up that belong to them."""
    if support.gluon_problem() is not None:
        pytest.skip(f"no Gluon here: {support.gluon_problem()}")
    from tma_moe.gemm.weights_m_ws import interleaved

    layer = experts(E=3, H=16, I=24)
    with torch.no_grad():
        layer.gate_up.copy_(torch.randn(layer.gate_up.shape))

    def viewed(*asked, **kind) -> torch.Tensor:
        descriptor = weight_descriptor(layer, *asked, **kind)
        assert descriptor.base.data_ptr() == layer.gate_up.data_ptr()
        assert descriptor.block_shape == list(asked[-1])
        return torch.as_strided(layer.gate_up, descriptor.shape, descriptor.strides)

    assert torch.equal(viewed(*UP), layer.gate_up.reshape(144, 16))
    turns = viewed("gate_up", interleaved, (1, 8, 2, 8, 64), gluon=True)
    gate, up = layer.gate_up.chunk(2, dim=1)
    assert torch.equal(turns[:, :, 0], gate.reshape(3, 3, 8, 16))
    assert torch.equal(turns[:, :, 1], up.reshape(3, 3, 8, 16))


@pytest.mark.parametrize("policy", ["lru", "owned"])
def test_kept_descriptors_differ_by_view_block_and_kind(policy):
    layer, other = experts(), lambda weight: ([3, 8], [8, 1])
    asked = [DOWN, ("down", all_rows, (64, 64)), ("down", other, (128, 64)), (*DOWN, True), UP]
    with tma_moe.descriptor_policy(policy):
        made = [weight_descriptor(layer, *each) for each in asked]
        assert len({id(descriptor) for descriptor in made}) == len(asked)
        assert all(weight_descriptor(layer, *each) is kept for each, kept in zip(asked, made, strict=True))
    assert made[2].shape == [3, 8]
    # A kernel in Gluon is told how the block lies in shared memory.
    assert [hasattr(descriptor, "layout") for descriptor in made] == [False, False, False, True, False]
    assert tma_moe.descriptor_stats().built == len(asked)


def test_owned_follows_the_parameter():
    layer = experts()
    tma_moe.set_descriptor_policy("owned")
    first = weight_descriptor(layer, *DOWN)
    # In place: the same object, and triton reads address and dtype from the parameter at each launch.
    layer.down.data = torch.empty(2, 16, 8, dtype=torch.float16)
    assert weight_descriptor(layer, *DOWN) is first
    assert first.base.data_ptr() == layer.down.data_ptr()
    layer.to(torch.bfloat16)
    assert weight_descriptor(layer, *DOWN).base.dtype == torch.bfloat16
    # Re-bound: a new object at once, and the old parameter is not kept.
    old = weakref.ref(layer.down)
    del first
    layer.down = torch.nn.Parameter(torch.empty(2, 16, 8, dtype=torch.float16), requires_grad=False)
    gc.collect()
    assert old() is None
    assert weight_descriptor(layer, *DOWN).base is layer.down


def test_owned_notices_a_parameter_that_was_swapped_behind_the_module():
    layer = experts()
    tma_moe.set_descriptor_policy("owned")
    weight_descriptor(layer, *DOWN)
    layer._parameters["down"] = torch.nn.Parameter(torch.empty(2, 16, 8), requires_grad=False)
    assert weight_descriptor(layer, *DOWN).base is layer.down


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
    kept = next(iter(descriptor_policies._lru.values())).base
    assert kept.data_ptr() == layer.gate_up.data_ptr()
    del layer, kept
    gc.collect()
    assert len(descriptor_policies._lru) == 2
    descriptor_policies.clear_descriptor_cache()
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
            if weight_descriptor(layer, *UP).base.data_ptr() != layer.gate_up.data_ptr():
                wrong.append(seed)

    with tma_moe.descriptor_policy(policy):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_later_launches_pass_addresses_and_the_descriptor_itself():
    """What triton's compiled kernel is given after the first launch: no tensor, which triton would ask the driver
    about, but its address as it is now; and the descriptor, whose address triton reads from the live parameter."""
    launched = []
    compiled = SimpleNamespace(function=7, packed_metadata="packed", run=lambda *given: launched.append(given))
    compiles = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **options: compiles.append((grid, given, options)) or compiled

    layer, x = experts(), torch.zeros(8)
    launch = Launch(Kernel(), (64, "const"), warps=8, stages=3)
    tma_moe.set_descriptor_policy("owned")
    for _ in range(3):
        launch(5, (1, 2, 1), x, weight_descriptor(layer, *UP), 3)
    descriptor = weight_descriptor(layer, *UP)
    options = {"num_warps": 8, "num_stages": 3} | ({} if support.interpreting() else {"launch_pdl": True})
    assert compiles == [((1, 2, 1), (x, descriptor, 3, 64, "const"), options)]
    expected = (1, 2, 1, 5, 7, "packed", None, None, None, x.data_ptr(), descriptor, 3, 64, "const")
    assert launched == [expected, expected]
    assert launched[0][10] is descriptor, "policy owned has one object for all launches"
    layer.gate_up.data = layer.gate_up.data.clone()
    assert descriptor.base.data_ptr() == layer.gate_up.data_ptr()
