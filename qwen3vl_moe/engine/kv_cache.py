"""The paged KV cache: one tensor cut into blocks, handed out to sequences through their block tables.

A full block is named by its content (:func:`block_key`), so that a sequence that begins like an earlier one finds its
beginning computed. Any number of sequences may hold such a block: nobody writes into it any more. When the last one
has let go of it, it is free, but stays findable until its memory is needed; the least recently used goes first.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qwen3vl_moe.config import TextConfig
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops.fp8_cache import FP8_CACHE, SCALE_BYTES

_CPU_BYTES = 4 << 30  # on a CPU, or a quarter of its memory if that is less


def block_key(parent: bytes, token_ids: Sequence[int], images: Sequence[tuple[bytes, int]]) -> bytes:
    """Name of a full block, by all that its keys and values depend on: itself and everything before it.

    Positions need no mention: they follow from the tokens and the images' grids.

    Args:
        parent: name of the block before it; empty for the first one.
        token_ids: of the block.
        images: digest of each image with placeholders in the block, and where its first placeholder is, counted from
            the block's first token. Placeholders look alike; only this tells one picture from another.
    """
    key = hashlib.sha256(parent + array("q", token_ids).tobytes())
    for digest, offset in images:
        key.update(digest + offset.to_bytes(8, "little", signed=True))
    return key.digest()


def cache_shape(config: TextConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> tuple[int, ...]:
    """[L, 2, num_blocks, block_size, G, D]: keys and values of all layers; D + 4 bytes of an FP8 cache."""
    width = config.head_dim + (SCALE_BYTES if dtype == FP8_CACHE else 0)
    return config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, width


def cached_sizes(model: Qwen3VLMoe) -> TextConfig:
    """Sizes of a decoder with the key/value heads that this rank holds."""
    return replace(model.config.text, num_kv_heads=len(model.part.kv_heads))


class KVCache:
    """Keys and values of all running sequences, and of past ones while there is room.

    Args:
        config: sizes of the decoder.
        num_blocks: blocks to hold, of ``block_size`` tokens each.
        dtype: that of the model, or ``FP8_CACHE``.
        device: that of the model.

    Attributes:
        tensor: as :func:`cache_shape` says; token t of a sequence is at row
            ``table[t // block_size] * block_size + t % block_size`` of the flattened blocks.
    """

    def __init__(
        self, config: TextConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ):
        needed, there = num_blocks * bytes_per_block(config, block_size, dtype), _total_bytes(torch.device(device))
        if needed > there:
            raise OptionError(
                f"num_blocks={num_blocks} with block_size={block_size} takes {needed / 1e9:.1f} GB, but {device} has "
                f"{there / 1e9:.1f} GB; lower one of them"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self.tensor = _zeros(cache_shape(config, num_blocks, block_size, dtype), dtype, torch.device(device))
        self._references = [0] * num_blocks  # block tables that hold the block
        self._free = OrderedDict.fromkeys(range(num_blocks))  # blocks without references; the next to be reused first
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, findable or not."""
        return len(self._free)

    def find(self, key: bytes) -> int | None:
        """The block with the content that ``key`` names, if it is here."""
        return self._block_of.get(key)

    def needed(self, table: Sequence[int], num_tokens: int, found: Sequence[int] = ()) -> int:
        """How many of the free blocks :meth:`grow` would take."""
        revived = sum(self._references[block] == 0 for block in found)
        return -(-num_tokens // self.block_size) - len(table) - len(found) + revived

    def grow(self, table: list[int], num_tokens: int, found: Sequence[int] = ()) -> bool:
        """Extend a block table to hold ``num_tokens``; False, with nothing taken, if too few blocks are free.

        Args:
            table: of a sequence; empty where there are ``found`` blocks.
            num_tokens: of the whole sequence, more than the found blocks hold.
            found: blocks to begin with, shared with whoever else holds them.
        """
        if self.needed(table, num_tokens, found) > len(self._free):
            return False
        for block in found:
            self._free.pop(block, None)
            self._references[block] += 1
        table.extend(found)
        while len(table) * self.block_size < num_tokens:
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            table.append(block)
        return True

    def publish(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Make full blocks findable, now that they are computed. Their content must not change after this."""
        for block, key in zip(blocks, keys, strict=True):
            if key not in self._block_of:  # of equal blocks the first one serves
                self._key_of[block] = key  # first: a block that can be found has to know its name
                self._block_of[key] = block

    def release(self, table: list[int]) -> None:
        """Give a sequence's blocks back and empty its table."""
        # The last block first: a beginning is of use without what follows it, but not the other way round.
        for block in reversed(table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:  # nobody can find it, so it is the first to be reused
                    self._free.move_to_end(block, last=False)
        table.clear()

    def release_all(self) -> None:
        """Take all blocks back from all tables, however far another change has come; who holds one has to drop it."""
        self._references = [0] * self.num_blocks
        self._block_of = {}
        for block, key in enumerate(self._key_of):
            # A name counts only while it is the only one: of equal blocks the first one serves.
            if key is not None and self._block_of.setdefault(key, block) != block:
                self._key_of[block] = None
        # Those that nobody can find are the first to be reused.
        is_named = [key is not None for key in self._key_of]
        self._free = OrderedDict.fromkeys(sorted(range(self.num_blocks), key=is_named.__getitem__))

    def forget_all(self) -> None:
        """Let no block be found any more; those that sequences hold stay theirs."""
        self._block_of, self._key_of = {}, [None] * self.num_blocks

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            self._key_of[block] = None
            self._block_of.pop(key, None)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros. On a CPU its pages take memory only once they are written; torch.zeros writes them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def bytes_per_block(config: TextConfig, block_size: int, dtype: torch.dtype) -> int:
    return math.prod(cache_shape(config, 1, block_size, dtype)) * dtype.itemsize


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_bytes() -> int:
    return min(_CPU_BYTES, _total_bytes(torch.device("cpu")) // 4)


def plan_cache(
    config: TextConfig, dtype: torch.dtype, options: EngineOptions, free_bytes: int | None
) -> tuple[int, int]:
    """How many blocks to hold, and the longest sequence to accept: any single one of that length fits.

    Args:
        config: of the model.
        dtype: of the cache.
        options: ``num_blocks`` is taken as it is where given; else as many blocks as ``max_num_seqs`` sequences can
            fill, or as fit into memory.
        free_bytes: memory for the cache; None on a CPU, where a fixed bound applies.

    Raises:
        OptionError: the memory does not hold a single block, or not a sequence of the length that was asked for.
    """
    size, model_len, num_blocks = options.block_size, options.model_len(config.max_positions), options.num_blocks
    block_bytes = bytes_per_block(config, size, dtype)
    if num_blocks is None:
        fitting = (_cpu_bytes() if free_bytes is None else free_bytes) // block_bytes
        num_blocks = min(options.seats * -(-model_len // size), fitting)
    if num_blocks < 1:
        way_out = "lower block_size"
        if free_bytes is not None:
            way_out += ", raise gpu_memory_utilization, lower max_prefill_tokens, or free the device"
        raise OptionError(
            f"no memory is left for the KV cache (a block of block_size={size} tokens takes {block_bytes / 1e6:.2f} "
            f"MB): {way_out}"
        )
    if options.max_model_len is not None and options.max_model_len > num_blocks * size:
        raise OptionError(
            f"max_model_len={options.max_model_len} does not fit: the KV cache holds {num_blocks * size} tokens "
            f"({num_blocks} blocks of {size}); lower max_model_len or give the cache more memory"
        )
    return num_blocks, min(model_len, num_blocks * size)
