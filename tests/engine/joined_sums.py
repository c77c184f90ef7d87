"""Sums that the norm after them takes by itself, in a long chain, beside each step on its own. Runs on each rank."""

from __future__ import annotations

import torch

from qwen3vl_moe.ops import Ranks
from qwen3vl_moe.ops.kernels.ranks import sum_add_norm
from qwen3vl_moe.ops.kernels.residual import add_norm

SUMS, REPLAYS, WIDTH, EPS = 64, 20, 2048, 1e-6


def check_joined(ranks: Ranks, device: torch.device) -> None:
    """In a graph, with fresh parts for each replay, whose times differ between the ranks."""
    shared = ranks.shared
    assert shared is not None
    generator = torch.Generator(device).manual_seed(1)
    x_TH = torch.randn(128, WIDTH, device=device, dtype=torch.bfloat16, generator=generator)
    weight_H = torch.rand(WIDTH, device=device, dtype=torch.bfloat16, generator=generator)
    generator.manual_seed(2 + ranks.rank)  # parts differ
    for T in (1, 33, 128):
        begin, parts = x_TH[:T], torch.empty(SUMS, T, WIDTH, device=device, dtype=torch.bfloat16)
        stream, outs, work = torch.empty_like(begin), [], torch.empty(4096, 4096, device=device)

        def chain(T=T, begin=begin, parts=parts, stream=stream, outs=outs, work=work) -> None:
            stream.copy_(begin)
            outs.clear()
            for number, part in enumerate(parts):
                if number % 7 == 3 * ranks.rank:
                    work.sqrt_()  # now this rank is late, now the other one
                outs.append(sum_add_norm(stream, part, shared, weight_H, EPS))

        parts.normal_(generator=generator)
        chain()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(REPLAYS):
            parts.normal_(generator=generator)
            for out in outs:
                out.fill_(torch.nan)
            graph.replay()
            expected = begin.clone()
            for part, out in zip(parts, outs, strict=True):
                right = add_norm(expected, ranks.sum(part.clone()), weight_H, EPS)
                torch.testing.assert_close(out, right)
            assert torch.equal(stream, expected), f"rank {ranks.rank}: {T} rows"
