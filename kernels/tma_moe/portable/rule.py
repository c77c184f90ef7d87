"""Tiles of the portable kernels for what no file lists: safe ones, by rows per expert and shared memory.

None of this was timed. What decides are sizes: a multiprocessor hides the latency of its memory with some 10 to 40 KB
under way, so small loads have tiles of which two fit beside each other; large ones have the largest that fit.
"""

from tma_moe.portable.targets import LEAST_SHARED_MEMORY, SHARED_MEMORY
from tma_moe.tiles import Choice, Tiles, listed

GEMV = Tiles("gemv", 1, 4, 1024, 4, 1), Tiles("gemv", 1, 4, 256, 8, 1)
FP8_GEMV = Tiles("fp8_gemv", 1, 4, 1024, 4, 1), Tiles("fp8_gemv", 1, 4, 256, 8, 1)
_AMPERE = SHARED_MEMORY[8, 0]


def portable_choices_for(
    device: str,
    triton: str,
    sizes: tuple[int, int, int, int],
    fp8: bool,
    a8: bool,
    shared: int,
) -> tuple[Choice, ...]:
    """The choices for a device (by name), a shape (E, K, H, I) and a kind of weights, by rising `max_tokens`.

    Args:
        a8: whether FP8 weights meet activations in FP8.
        shared: bytes of shared memory that a program may have.
    """
    found = listed(device, triton, sizes, fp8, portable=True)
    return found or portable_default_choices(*sizes[:2], fp8, a8, shared)


def portable_default_choices(
    experts: int, topk: int, fp8: bool = False, a8: bool = False, shared: int = LEAST_SHARED_MEMORY
) -> tuple[Choice, ...]:
    """The same by rule."""

    def tokens(rows_per_expert: int) -> int:
        return max(4, rows_per_expert * experts // topk)

    pair = (_a8_pair if a8 else _a16_pair) if fp8 else _pair
    limits = ((tokens(8), 16), (tokens(16), 32), (tokens(48), 64))
    distinct = {most: Choice(most, *pair(rows, shared)) for most, rows in limits if most > 4}
    return Choice(4, *(FP8_GEMV if fp8 else GEMV)), *distinct.values(), Choice(None, *pair(128, shared))


def _pair(rows: int, shared: int) -> tuple[Tiles, Tiles]:
    """Up and down, for tiles of so many rows, of 16-bit weights."""
    if rows < 128:
        stages = 3 if shared <= LEAST_SHARED_MEMORY else 4
        up, down = (Tiles("portable", rows, cols, 64, 4, stages, weights_m=True) for cols in (64, 128))
        return up, down
    block_k, stages = (32, 4) if shared <= LEAST_SHARED_MEMORY else (64, 3)
    return Tiles("portable", 128, 128, block_k, 8, stages), Tiles("portable", 128, 128, block_k, 8, stages)


def _a8_pair(rows: int, shared: int) -> tuple[Tiles, Tiles]:
    """FP8 weights and activations. The up product has to have 128 columns, and so twice as many weight rows."""
    if rows < 64:
        up, down = (Tiles("fp8_portable", rows, 128, 128, warps, 3, weights_m=True) for warps in (8, 4))
        return up, down
    return Tiles("fp8_portable", 64, 128, 128, 8, 3), Tiles("fp8_portable", 64, 128, 128, 8, 3)


def _a16_pair(rows: int, shared: int) -> tuple[Tiles, Tiles]:
    """FP8 weights that become 16-bit ones in registers."""
    if rows < 64:
        up, down = (Tiles("fp8_portable", rows, cols, 128, 4, 3, weights_m=True) for cols in (64, 128))
        return up, down
    rows = 128 if rows == 128 and shared >= _AMPERE else 64
    return Tiles("fp8_portable", rows, 64, 128, 8, 3), Tiles("fp8_portable", rows, 128, 128, 8, 3)
