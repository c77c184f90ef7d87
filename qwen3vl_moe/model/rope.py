"""Where tokens are: positions of a mixed prompt, interleaved M-RoPE, and the vision tower's rotary angles.

M-RoPE (Qwen2-VL, arXiv 2409.12191) gives a token three positions: time, height and width. Text has all three equal.
An image starts where the text before it ended; its tokens share one time and count rows and columns of the merged grid
from there; the text after it goes on at the largest position plus one. A frame of a video is an image of its own: what
time it is stands in the text before it. Qwen3-VL interleaves the three axes over the rotary frequencies (t h w t h w
... t t) instead of giving each a contiguous section, so that every axis sees high and low frequencies. Rules and tests
follow transformers (``Qwen3VLMoeModel.get_rope_index``, ``Qwen3VLMoeTextRotaryEmbedding``).

Positions are made by NumPy, in the thread that calls: of an image with more than 10,000 patches torch would make them
in all its threads, for which a busy host takes many milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Grid = tuple[int, int, int]  # an image in patches: frames, rows, columns


def frames_apart(grids: Sequence[Grid]) -> list[Grid]:
    """A grid for each frame of some videos: a prompt tells the time of every frame in words, and so parts them."""
    return [(1, rows, columns) for frames, rows, columns in grids for _ in range(frames)]


def mrope_positions(
    token_ids: Sequence[int], grids: Mapping[int, Sequence[Grid]], merge_size: int
) -> tuple[Tensor, int]:
    """M-RoPE positions of one prompt whose placeholders are already expanded.

    Args:
        token_ids: T token ids; what has the grid (t, h, w) takes ``t*h*w // merge_size**2`` consecutive placeholders.
        grids: for each kind of placeholder, by its token id, one (frames, rows, columns) in patches per image, or per
            frame of a video, in order of appearance.
        merge_size: patches per visual token along each side.

    Returns:
        positions_3T (int64, CPU; rows are time, height, width) and the position of the token that comes next.

    Raises:
        ValueError: placeholders and grids do not match.
    """
    ids = np.asarray(token_ids, np.int64)
    positions_3T = np.empty((3, len(ids)), np.int64)
    done, position = 0, 0

    def text_until(end: int) -> None:
        nonlocal done, position
        positions_3T[:, done:end] = np.arange(position, position + end - done)
        position += end - done
        done = end

    placeholders = np.flatnonzero(np.isin(ids, list(grids)))
    waiting = {token: iter(enumerate(of_kind)) for token, of_kind in grids.items()}
    used = 0
    while used < len(placeholders):
        start = int(placeholders[used])
        token = int(ids[start])
        number, grid = next(waiting[token], (0, None))
        if grid is None:
            left = np.count_nonzero(ids[start:] == token)
            raise ValueError(f"{left} placeholder tokens (id {token}) belong to no image or frame")
        frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
        count = frames * rows * columns
        span = ids[start : start + count]
        if len(span) < count or np.any(span != token):
            raise ValueError(f"number {number} of token {token} needs {count} consecutive placeholders")
        text_until(start)
        positions_3T[:, done : done + count] = np.indices((frames, rows, columns)).reshape(3, -1) + position
        done, used = done + count, used + count
        position += max(rows, columns)
    for token, of_kind in waiting.items():
        if (more := next(of_kind, None)) is not None:
            raise ValueError(f"number {more[0]} of token {token} has no placeholders in the prompt")
    text_until(len(ids))
    return torch.from_numpy(positions_3T), position


def inverse_frequencies(width: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Rotary frequencies of a ``width``-wide rotation, fp32 [width / 2]: theta^(-2i/width)."""
    return 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def mrope_angles(positions_3T: Tensor, frequencies: Tensor, section: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of interleaved M-RoPE, fp32 [T, head_dim / 2] each.

    Frequency i belongs to height where i = 1 (mod 3) and i < 3*section[1], to width where i = 2 (mod 3) and
    i < 3*section[2], else to time.
    """
    angles_3TF = positions_3T[..., None].float() * frequencies
    angles_TF = angles_3TF[0].clone()
    for axis in (1, 2):
        own = slice(axis, 3 * section[axis], 3)
        angles_TF[:, own] = angles_3TF[axis, :, own]
    return angles_TF.cos(), angles_TF.sin()


def vision_positions(grids: Sequence[Grid], merge_size: int) -> Tensor:
    """Row and column of every patch, int64 [P, 2] on the CPU, in the order in which patches are packed.

    Patches of one merge_size x merge_size square follow each other, so that the merger can view them as one row.
    """
    parts = []
    for frames, rows, columns in grids:
        squares = (rows // merge_size, merge_size, columns // merge_size, merge_size)
        place = np.stack([a.reshape(squares).swapaxes(1, 2).ravel() for a in np.indices((rows, columns))], axis=-1)
        parts.append(np.tile(place, (frames, 1)))
    return torch.from_numpy(np.concatenate(parts))


def vision_angles(positions_P2: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the vision tower's rotation, fp32 [P, head_dim / 2]: row angles, then column angles."""
    angles_PF = (positions_P2[..., None].float() * frequencies).flatten(1)
    return angles_PF.cos(), angles_PF.sin()
