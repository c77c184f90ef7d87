"""How fast this machine is: memory, products, and one MoE layer beside the least time that it could take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import tma_moe
from benchmarking.card import Ceilings, median_seconds
from benchmarking.moe import Candidate, CudaTimer, MoeShape, draw_routing, floor_us, random_experts, spread

_ROTATION = 4  # weight sets, so that no cache holds them


@dataclass(frozen=True)
class Layer:
    """Microseconds of one layer for so many tokens, by each backend, and of its floor."""

    weights: str
    tokens: int
    floor: float
    limit: str
    took: dict[str, float]


def layers(device: torch.device, dtype: torch.dtype, ceilings: Ceilings, free: int) -> Iterator[Layer]:
    """One layer of the 30B model on a card, a small one on a CPU; less of it where memory is short."""
    on_card = device.type == "cuda"
    base = MoeShape() if on_card else MoeShape(16, 4, 256, 128)
    for fp8 in (False, True):
        shape = MoeShape(base.num_experts, base.experts_per_token, base.hidden_size, base.expert_width, fp8=fp8)
        itemsize = 1 if fp8 else dtype.itemsize
        if _ROTATION * shape.num_experts * shape.expert_bytes(itemsize) + 2 * 2**30 > free:
            continue
        experts = [random_experts(shape, str(device), dtype) for _ in range(_ROTATION)]
        backends = [name for name in ("tma", "triton") if tma_moe.unavailable(device, dtype, backend=name) is None]
        for T in (1, 32, 450, 2048) if on_card else (1, 64):
            x_TH = torch.randn(T, shape.hidden_size, device=device, dtype=dtype)
            routes = [draw_routing("uniform", T, shape, seed=seed, device=device) for seed in range(_ROTATION)]
            floors = [floor_us(shape, ids, ceilings, itemsize) for ids, _ in routes]
            took = _times(x_TH, routes, experts, backends or ["reference"])
            weights = "FP8" if fp8 else str(dtype).removeprefix("torch.")
            yield Layer(weights, T, sum(us for us, _ in floors) / _ROTATION, floors[0][1], took)


def _times(
    x_TH: Tensor,
    routes: list[tuple[Tensor, Tensor]],
    experts: list[tma_moe.ExpertWeights],
    backends: list[str],
) -> dict[str, float]:
    def candidate(backend: str) -> Candidate:
        def run() -> None:
            for route, weights in zip(routes, experts, strict=True):
                tma_moe.fused_moe(x_TH, *route, weights, backend=backend)

        return Candidate(run, len(experts))

    candidates = {backend: candidate(backend) for backend in backends}
    if x_TH.is_cuda and backends != ["reference"]:
        samples = CudaTimer(samples=5, sample_us=1000.0).graph_us(candidates)
        return {name: spread(values)["median"] for name, values in samples.items()}
    return {
        name: 1e6 * median_seconds(each.run, x_TH.device, times=3) / each.num_calls for name, each in candidates.items()
    }
