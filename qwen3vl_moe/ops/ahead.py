"""Operations that are called without being launched: to compile their kernels ahead, or only to allocate memory."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from tma_moe import ExpertWeights
from tma_moe.launcher import compile_ahead, instead_of_launching

__all__ = ["allocate_only", "compile_ahead", "sizes_to_compile"]


def allocate_only() -> AbstractContextManager[None]:
    """Within it, operations allocate their results and launch none of our kernels."""
    return instead_of_launching(lambda launch, grid, args: None)


def sizes_to_compile(most: int, experts: Iterable[ExpertWeights], k: int, backend: str) -> list[int]:
    """Numbers of tokens that stand for all up to ``most``: a step of these launches every kernel that any step would.

    The experts' kernels change where their tiles do; all others where tokens pass some power of two.

    Args:
        most: the last of them.
        experts: of every kind that runs in kernels, each token choosing ``k``.
        backend: of ``tma_moe.fused_moe``.
    """
    sizes = {most, *(1 << power for power in range(most.bit_length()))}
    for each in experts:
        from tma_moe.recipe import call_ends  # needs triton

        sizes.update(call_ends(each, k, most, backend))
    return sorted(sizes)
