"""What of a card decides about the portable kernels: its compute capability."""

import torch
from torch import Tensor

# Bytes of shared memory that a program may have, by capability; the least of all for one that is not known.
SHARED_MEMORY = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
LEAST_SHARED_MEMORY = 101_376


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a program may have."""
    return SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)


def as_stored(weights: Tensor, a8: bool) -> Tensor:
    """FP8 weights as a kernel takes them: as bytes where the card knows no FP8, and triton no such type for it."""
    return weights if a8 else weights.view(torch.uint8)
