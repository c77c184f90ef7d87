"""Tensors that ranks divide along their last dimension, of which a rank's part lies all over the file.

Reading every row to keep a part of it would have each rank read the whole tensor. So each reads some of the rows, once,
and the ranks send each other the columns: over the links between GPUs that takes next to no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from qwen3vl_moe.ops import Ranks
from qwen3vl_moe.weights.shards import StoredTensor, part_of, staging, stream

_STEP_BYTES = 128 << 20  # of one rank's rows that are under way at once


def own_rows(stored: StoredTensor, ranks: Ranks) -> StoredTensor:
    """The rows (along the first dimension) of a tensor that this rank reads."""
    rows = _rows(stored.shape[0], ranks)[ranks.rank]
    [(own, _)] = part_of(stored, torch.empty(stored.shape, device="meta")[: len(rows)], 0, [rows])
    return own


def read_columns(
    stored: StoredTensor,
    destination: torch.Tensor,
    ranges: Sequence[Sequence[range]],
    ranks: Ranks,
    on_read: Callable[[int], None],
) -> None:
    """Fill a destination with the columns that this rank holds of a stored tensor. All ranks have to call it.

    Args:
        destination: [..., columns], on the device, of any floating dtype and strides.
        ranges: of each rank: which columns (indexes of the last dimension) it holds.
        on_read: called with a number of bytes after each piece that was read here.

    Raises:
        CheckpointError: the file cannot be read to its end.
    """
    rows_of = _rows(stored.shape[0], ranks)
    step = max(1, _STEP_BYTES // (stored.nbytes // stored.shape[0]))
    for begin in range(0, max(map(len, rows_of)), step):
        now = [rows[begin : begin + step] for rows in rows_of]
        own, read = now[ranks.rank], None
        if own:
            read = staging(stored, (len(own), *stored.shape[1:]), destination.device)
            stream(part_of(stored, read, 0, [own]), destination.device, on_read)
            read = _raw(read)
        send = [None if read is None else _columns(read, wanted) for wanted in ranges]
        width = sum(map(len, ranges[ranks.rank]))
        shape = *stored.shape[1:-1], width
        receive = [_raw(staging(stored, (len(rows), *shape), destination.device)) for rows in now]
        ranks.exchange(send, receive)
        for rows, received in zip(now, receive, strict=True):
            _raw(destination)[rows.start : rows.stop].copy_(received)


def _rows(count: int, ranks: Ranks) -> list[range]:
    return [range(count * rank // ranks.size, count * (rank + 1) // ranks.size) for rank in range(ranks.size)]


def _raw(x: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: little else can be done with it."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _columns(x: torch.Tensor, wanted: Sequence[range]) -> torch.Tensor:
    return torch.cat([x[..., each.start : each.stop] for each in wanted], dim=-1)
