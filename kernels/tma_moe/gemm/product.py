"""What all ways to compute a product share on the host: sizes, the grid, and views of the weights."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor

from tma_moe.expert_weights import ExpertWeights
from tma_moe.launcher import Launch
from tma_moe.tiles import Tiles

PORTABLE = {"portable": "tma_moe.portable.products", "fp8_portable": "tma_moe.portable.fp8_products"}


@dataclass(frozen=True)
class Sizes:
    """One MoE layer, and the device it is computed on.

    Attributes:
        E, K, H, I: experts, chosen experts, hidden size, expert width.
        multiprocessors: of the device.
        pdl: whether kernels are launched with programmatic dependent launch (pdl.py).
        a8: whether FP8 weights meet activations in FP8 (gemm/ always has them so).
    """

    E: int
    K: int
    H: int
    I: int  # noqa: E741
    multiprocessors: int
    pdl: bool = True
    a8: bool = True


class Product:
    """The up or the down product in one way, for rows that are grouped by expert (routing.py).

    Attributes:
        tiles: the tile that was chosen.
        step: row tiles have heights that are multiples of this many rows, but the last of an expert.
        columns: how many column tiles there are.
        quantised: whether x and h are pairs of FP8 values and scales, rather than tensors.
    """

    launch: Launch
    quantised = False

    def __init__(self, tiles: Tiles, sizes: Sizes, columns: int, step: int | None = None):
        self.tiles, self.sizes, self.columns = tiles, sizes, columns
        self.step = step or tiles.rows

    def row_tiles(self, pairs: int) -> int:
        """The most row tiles that this many pairs can need, however they are routed."""
        E = self.sizes.E
        return pairs if pairs <= E else E + (pairs - E) // self.tiles.rows

    def grid(self, pairs: int) -> tuple[int, int, int]:
        """One program per tile, or as many as run at once, which then walk over the tiles."""
        count = self.row_tiles(pairs) * self.columns
        if self.tiles.ctas_per_sm:
            count = min(count, self.tiles.ctas_per_sm * self.sizes.multiprocessors)
        return count, 1, 1

    def __call__(
        self, stream: int, pairs: int, source: Any, experts: ExpertWeights, plan: Tensor, out: Any, tiles_at: int
    ) -> None:
        """Launch it.

        Args:
            stream: handle of the stream.
            pairs: T * K.
            source: x [T, H] for the up product, h [T * K, I] by row of the plan for the down product.
            experts: the weights.
            plan, tiles_at: where rows and tiles are, see routing.py.
            out: h [T * K, I] by row of the plan, or rows [T * K, H] by slot.
        """
        raise NotImplementedError


def product(role: str, tiles: Tiles, sizes: Sizes) -> Product:
    """The product of a role ("up" or "down") in the way that the tiles name.

    Raises:
        ValueError: this way does not take such tiles.
        ImportError: it is written in Gluon, and this triton's Gluon is incompatible.
    """
    way = import_module(PORTABLE.get(tiles.kernel, f"tma_moe.gemm.{tiles.kernel}"))
    return (way.Up if role == "up" else way.Down)(tiles, sizes)


def all_rows(weight: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of a weight [E, N, K] as the rows of all experts: [E * N, K]."""
    E, N, K = weight.shape
    return [E * N, K], [K, 1]


def require(condition: bool, tiles: Tiles, needed: str) -> None:
    """Raises ValueError, saying what a way needs of its tiles, unless the condition holds."""
    if not condition:
        raise ValueError(f"tiles: {tiles.kernel!r} takes {needed}, got {tiles}")
