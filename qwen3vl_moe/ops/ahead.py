"""Operations that are called without being launched: to compile their kernels ahead, or only to allocate memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from tma_moe import ExpertWeights
from tma_moe.support import triton_problem


def allocate_only() -> AbstractContextManager[None]:
    """Within it, operations allocate their results and launch none of our kernels."""
    if triton_problem() is not None:  # without triton there are none
        return nullcontext()
    from tma_moe.launcher import instead_of_launching

    return instead_of_launching(lambda launch, grid, args: None)


def compile_ahead(report: Callable[[int, int], None]) -> AbstractContextManager[None]:
    """Within it, launches only compile their kernels; ``report`` and the rest as in :mod:`tma_moe.launcher`."""
    from tma_moe import launcher  # needs triton

    return launcher.compile_ahead(report)


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
