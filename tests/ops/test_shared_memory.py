"""Which groups of GPUs take sums through memory that they share; that it is right is in engine/test_two_gpus.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qwen3vl_moe.ops import shared_memory
from qwen3vl_moe.ops.shared_memory import SharedMemory


@pytest.fixture
def asked(monkeypatch):
    """Pairs of GPUs that were asked about; ``links``: what the driver says of a pair, True of those not named."""
    found, links = [], {}

    def reach(index, other):
        found.append((index, other))
        return links.get((index, other)) != "nothing"

    def attribute(value, what, index, other):
        assert what == 3
        value._obj.value = int((index, other) not in links)
        return 999 if links.get((index, other)) == "an error" else 0

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reach)
    driver = SimpleNamespace(cuDeviceGetP2PAttribute=attribute)
    monkeypatch.setattr(shared_memory.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(shared_memory, "_had_some", False)
    return SimpleNamespace(pairs=found, links=links)


def test_a_rank_asks_about_the_others_of_its_group_alone(asked):
    assert SharedMemory.problem(torch.bfloat16, torch.device("cuda", 3), 1, 3) is None
    assert asked.pairs == [(3, 2), (3, 4)]


@pytest.mark.parametrize("link", ["nothing", "PCIe", "an error"])
def test_without_atomic_operations_there_is_none(asked, link):
    asked.links[0, 1] = link
    assert "no atomic operations" in SharedMemory.problem(torch.float32, torch.device("cuda", 0), 0, 2)


def test_neither_of_other_dtypes_nor_a_second_time(asked, monkeypatch):
    assert "torch.float16" in SharedMemory.problem(torch.float16, torch.device("cuda", 0), 0, 2)
    monkeypatch.setattr(shared_memory, "_had_some", True)
    assert "has ended" in SharedMemory.problem(torch.bfloat16, torch.device("cuda", 0), 0, 2)
