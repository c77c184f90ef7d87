"""Pictures to another size: Pillow's bicubic resize, bit for bit.

Pillow resizes rows and columns one after the other, with 8 bits in between. A pixel of either pass is a sum of a few
source pixels by integer weights, which are made in double precision and rounded to 22 bits. So equal weights give equal
pictures, in whatever order and on whatever device the sums are taken.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from qwen3vl_moe.ops import reference
from qwen3vl_moe.ops.reference import RESIZE_BITS
from qwen3vl_moe.ops.transfer import to_device

_KEPT_TABLES = 128  # of some ten KB each


def resize_picture(pixels_HW3: Tensor, height: int, width: int) -> Tensor:
    """What the installed Pillow makes of an RGB picture with ``resize((width, height), BICUBIC)``, as planes.

    Args:
        pixels_HW3: uint8, contiguous: the channels of a pixel side by side, as decoders leave them.

    Returns:
        uint8 [3, height, width], contiguous.
    """
    passes: Any = reference
    if pixels_HW3.is_cuda:
        from qwen3vl_moe.ops.kernels import resize as passes
    return resize_by(passes, pixels_HW3, height, width, columns_first(pixels_HW3.shape, (height, width)))


def resize_by(passes: Any, pixels_HW3: Tensor, height: int, width: int, columns_first: bool) -> Tensor:
    """The same, by the ``resize_rows`` and ``resize_columns`` of a module."""
    old_height, old_width, _ = pixels_HW3.shape
    # Pillow skips a pass that changes nothing. Its weights would be one and zeros, which change nothing either.
    rows_table = _table_on(pixels_HW3.device, old_width, width)
    columns_table = _table_on(pixels_HW3.device, old_height, height)
    if not columns_first:
        return passes.resize_columns(passes.resize_rows(pixels_HW3, rows_table), columns_table)
    # For a pass along the columns, interleaved channels are one plane of three times the width.
    short_1HW = passes.resize_columns(pixels_HW3.view(1, old_height, 3 * old_width), columns_table)
    return passes.resize_rows(short_1HW.view(height, old_width, 3), rows_table)


def columns_first(old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether the installed Pillow resizes the columns before the rows; heights and widths of two sizes.

    It decides the rounding, and differs from version to version (``_ORDERS``).
    """
    return (_order() or _rows_first)(old, new)


def resizes_like_pillow() -> bool:
    """Whether the installed Pillow's order of rows and columns is known here; if not, a warning says so."""
    if _order() is None:
        warnings.warn(
            f"images are resized on the host, slower: Pillow {PIL.__version__} takes rows and columns in an order "
            "that is not known here",
            stacklevel=2,
        )
    return _order() is not None


def _rows_first(old: Sequence[int], new: Sequence[int]) -> bool:
    return False


def _columns_first_if_tall(old: Sequence[int], new: Sequence[int]) -> bool:
    return old[0] > 100 * old[1] and new[0] < old[0]


def _columns_first_if_they_lose_more(old: Sequence[int], new: Sequence[int]) -> bool:
    shorter, narrower = old[0] - new[0], old[1] - new[1]
    return shorter > 0 and shorter > 2 * narrower


# Of Pillow up to 12.1, of 12.2 and 12.3, and of 13.0.
_ORDERS = _rows_first, _columns_first_if_tall, _columns_first_if_they_lose_more
_PROBES = ((9, 4), (4, 6)), ((303, 3), (7, 4)), ((40, 3), (50, 2))


@functools.cache
def _order() -> Callable[[Sequence[int], Sequence[int]], bool] | None:
    """Asked of the installed Pillow itself, as no number of a version tells how one was built."""

    def agrees(order: Callable[[Sequence[int], Sequence[int]], bool], old: tuple, new: tuple) -> bool:
        values = (np.arange(old[0] * old[1] * 3) ** 3 % 251 > 125).astype(np.uint8) * 255
        pixels_HW3 = torch.from_numpy(values.reshape(*old, 3))
        theirs_HW3 = np.asarray(Image.fromarray(pixels_HW3.numpy()).resize(new[::-1], Image.Resampling.BICUBIC))
        ours_3HW = resize_by(reference, pixels_HW3, *new, columns_first=order(old, new))
        return np.array_equal(ours_3HW.permute(1, 2, 0).numpy(), theirs_HW3)

    return next((order for order in _ORDERS if all(agrees(order, *probe) for probe in _PROBES)), None)


def weight_table(old: int, new: int) -> np.ndarray:
    """What each of ``new`` pixels is made of, along a side of ``old`` pixels.

    Returns:
        int32 [1 + taps, new]: the first source pixel, then the weights of this and of those after it, in units of
        2^-22. Weights of pixels beyond the side are 0.
    """
    # Rounding must be as in Pillow's C: every operation here stands in the order in which it stands there.
    scale = old / new
    stretch = max(scale, 1.0)  # a smaller picture takes the mean of more pixels
    support = 2.0 * stretch
    centers = (np.arange(new) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + support + 0.5).astype(np.int64), old)
    taps = np.arange(2 * int(np.ceil(support)) + 1)[:, None]
    weights = _bicubic((taps + first - centers + 0.5) * (1.0 / stretch))
    weights[taps >= end - first] = 0.0
    weights /= np.add.accumulate(weights)[-1]  # which adds one by one; np.sum may add in another order
    whole = weights * (1 << RESIZE_BITS)
    return np.concatenate([first[None], whole + np.where(whole < 0, -0.5, 0.5)]).astype(np.int32)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@functools.lru_cache(_KEPT_TABLES)
def _table_on(device: torch.device, old: int, new: int) -> Tensor:
    return to_device(torch.from_numpy(weight_table(old, new)), device)
