"""The paged KV cache: one tensor cut into blocks, handed out to sequences through their block tables."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3vl_moe.config import TextConfig
from qwen3vl_moe.engine.params import EngineOptions
from qwen3vl_moe.errors import OptionError

_CPU_BYTES = 4 << 30  # on a CPU: pages of the zeroed cache take memory only once they are written


class KVCache:
    """Keys and values of all running sequences.

    Args:
        config: sizes of the decoder.
        num_blocks: blocks to hold, of ``block_size`` tokens each.
        dtype, device: those of the model.

    Attributes:
        tensor: [L, 2, num_blocks, block_size, G, D]; token t of a sequence is at row
            ``table[t // block_size] * block_size + t % block_size`` of the flattened blocks.
    """

    def __init__(
        self, config: TextConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.tensor: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(num_blocks))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend a block table to hold ``num_tokens``; False, with nothing taken, if too few blocks are free."""
        missing = -(-num_tokens // self.block_size) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def release(self, table: list[int]) -> None:
        """Give a sequence's blocks back and empty its table."""
        self._free.extend(reversed(table))
        table.clear()


def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def plan_cache(
    config: TextConfig, dtype: torch.dtype, options: EngineOptions, free_bytes: int | None
) -> tuple[int, int]:
    """How many blocks to hold, and the longest sequence to accept: any single one of that length fits.

    Args:
        config, dtype: of the model.
        options: ``num_blocks`` is taken as it is where given; else as many blocks as ``max_num_seqs`` sequences can
            fill, or as fit into memory.
        free_bytes: memory for the cache; None on a CPU, where a fixed bound applies.

    Raises:
        OptionError: the memory does not hold a single block, or not a sequence of the length that was asked for.
    """
    size, model_len, num_blocks = options.block_size, options.model_len(config.max_positions), options.num_blocks
    if num_blocks is None:
        block_bytes = bytes_per_block(config, size, dtype)
        fitting = (_CPU_BYTES if free_bytes is None else free_bytes) // block_bytes
        num_blocks = min(options.max_num_seqs * -(-model_len // size), fitting)
    if num_blocks < 1:
        raise OptionError(
            f"no memory is left for the KV cache (a block takes {block_bytes / 1e6:.2f} MB): raise "
            "gpu_memory_utilization, lower max_prefill_tokens, or free the device"
        )
    if options.max_model_len is not None and options.max_model_len > num_blocks * size:
        raise OptionError(
            f"max_model_len={options.max_model_len} does not fit: the KV cache holds {num_blocks * size} tokens "
            f"({num_blocks} blocks of {size}); lower max_model_len or give the cache more memory"
        )
    return num_blocks, min(model_len, num_blocks * size)
