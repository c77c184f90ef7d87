"""What the first of several ranks tells the others: calls of the executor, as one array of integers each.

Nothing is pickled, and a call is one broadcast on the host. What is on the device already (tokens that the step before
has sampled, pixels, features of images) goes from device to device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from qwen3vl_moe.model import Batch
from qwen3vl_moe.model.batch import VisualTokens
from qwen3vl_moe.model.rope import Grid
from qwen3vl_moe.ops import Ranks, Segments

END, COMPUTE, ENCODE, LOGITS = range(4)  # kinds of calls
_WORDS = 2048  # int64 of a call that needs only one broadcast


def tell(kind: int, *arrays: np.ndarray | Sequence[int]) -> None:
    """Announce a call, of integer arrays, from the first rank."""
    parts = [np.asarray(array, np.int64).ravel() for array in arrays]
    words = np.concatenate([np.array([kind, len(parts), *map(len, parts)], np.int64), *parts])
    message = np.zeros(_WORDS, np.int64)
    message[0] = len(words)
    message[1 : 1 + len(words)] = words[: _WORDS - 1]
    dist.broadcast(torch.from_numpy(message), src=0)
    if len(words) >= _WORDS:
        dist.broadcast(torch.from_numpy(words[_WORDS - 1 :].copy()), src=0)


def hear() -> tuple[int, list[np.ndarray]]:
    """Wait for the next call; its kind and arrays."""
    message = torch.zeros(_WORDS, dtype=torch.int64)
    dist.broadcast(message, src=0)
    count = int(message[0])
    words = message.numpy()[1 : 1 + count]
    if count >= _WORDS:
        rest = torch.zeros(count - (_WORDS - 1), dtype=torch.int64)
        dist.broadcast(rest, src=0)
        words = np.concatenate([words, rest.numpy()])
    kind, number = words[:2].tolist()
    ends = np.cumsum(words[2 : 2 + number])
    return kind, np.split(words[2 + number :], ends[:-1])


def arrays_of(batch: Batch) -> list[np.ndarray | Sequence[int]]:
    """The host's part of a step."""
    segments, visual = batch.segments, batch.visual
    assert segments.block_tables is not None
    assert batch.slots_T is not None
    on_device = batch.input_ids_T.is_cuda
    images = (0, 0) if visual is None else (len(visual.rows_M), len(visual.deepstack_LMH))
    return [
        [len(batch.input_ids_T), on_device, batch.logit_rows is not None, segments.block_size, *images],
        [] if on_device else batch.input_ids_T.numpy(),
        batch.positions_3T.numpy(),
        batch.slots_T.numpy(),
        segments.q_lens,
        segments.kv_lens,
        segments.block_tables.numpy(),
        [] if batch.logit_rows is None else batch.logit_rows.numpy(),
        [] if visual is None else visual.rows_M.numpy(),
    ]


def batch_of(arrays: list[np.ndarray], device: torch.device, hidden_size: int, dtype: torch.dtype) -> Batch:
    """A step as the first rank has it, with room on the device for what comes from there (:func:`complete`)."""
    (T, on_device, has_rows, block_size, M, L), *rest = arrays[0].tolist(), *map(torch.from_numpy, arrays[1:])
    ids_T, positions, slots_T, q_lens, kv_lens, tables, logit_rows, rows_M = rest
    q_lens, kv_lens = tuple(q_lens.tolist()), tuple(kv_lens.tolist())
    visual = None
    if M:
        features = torch.empty(1 + L, M, hidden_size, dtype=dtype, device=device)
        visual = VisualTokens(rows_M, features[0], features[1:])
    return Batch(
        input_ids_T=torch.empty(T, dtype=torch.int64, device=device) if on_device else ids_T,
        positions_3T=positions.view(3, T),
        segments=Segments.build(
            q_lens, kv_lens, block_tables=tables.view(len(q_lens), -1).int(), block_size=block_size
        ),
        slots_T=slots_T,
        visual=visual,
        logit_rows=logit_rows if has_rows else None,
    )


def complete(batch: Batch, ranks: Ranks) -> Batch:
    """The step with what goes from device to device, on all ranks."""
    if batch.input_ids_T.is_cuda:
        batch = replace(batch, input_ids_T=ranks.from_first(batch.input_ids_T.contiguous()))
    if batch.visual is not None:
        visual = batch.visual
        features = ranks.from_first(torch.cat([visual.embeds_MH[None], visual.deepstack_LMH]))
        batch = replace(batch, visual=VisualTokens(visual.rows_M, features[0], features[1:]))
    return batch


def shares_of(grids: Sequence[Grid], size: int) -> list[range]:
    """Which pictures each of ``size`` ranks encodes: following ones, with about as many patches each."""
    ends = np.cumsum([t * rows * columns for t, rows, columns in grids])
    # A picture belongs to the rank in whose share of all patches its middle lies.
    middles = ends - np.diff(ends, prepend=0) / 2
    owner = np.minimum((middles * size / ends[-1]).astype(np.int64), size - 1)
    begins = np.searchsorted(owner, np.arange(size + 1))
    return [range(int(begins[rank]), int(begins[rank + 1])) for rank in range(size)]
