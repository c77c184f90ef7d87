"""Backend "tma": buffers and launches of the fused operation.

A `Recipe` is everything that does not depend on the call: kernels with their constants, block shapes, grids. It is made
once per device, shape, dtype and bucket of token counts. A call then allocates its buffers and launches two kernels
(decode), four, or five (above 4096 pairs, where grouping takes two). Buffers come from torch's caching
allocator at every call, so streams, threads and CUDA graphs each have their own, and nothing outlives the call.

All kernels use programmatic dependent launch, under the contract of pdl.py: a chain of them, and the next call's first,
may start early but never run ahead.
"""

import bisect
import functools

import torch
import triton
from torch import Tensor

from tma_moe import combine, decode_gemv, grouped_gemm, routing, swap_gemm
from tma_moe.descriptors import activation_descriptor, weight_descriptor
from tma_moe.experts import ExpertWeights
from tma_moe.fused_moe import Uncombined
from tma_moe.kernel import Launch, current_stream, device_guard
from tma_moe.support import interpreting
from tma_moe.tuning import GLUON_KERNELS, Choice, Tiles, choices_for


def _tiles_bound(pairs: int, experts: int, rows: int) -> int:
    """The most row tiles that `pairs` rows over `experts` experts can need, however they are routed."""
    return pairs if pairs <= experts else experts + (pairs - experts) // rows


class Recipe:
    """Launches of the fused operation for one device, shape, dtype and choice of tiles."""

    def __init__(self, device: torch.device, E: int, K: int, H: int, I: int, choice: Choice) -> None:  # noqa: E741
        self.E, self.K, self.H, self.I = E, K, H, I
        self.up_tiles, self.down_tiles = choice.up, choice.down
        pdl = not interpreting()
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if pdl else 2
        block_k = triton.next_power_of_2(K)
        up, down = choice.up, choice.down
        self.up_columns, self.down_columns = triton.cdiv(I, up.cols), triton.cdiv(H, down.cols)
        if up.kernel == "decode":
            self.up = Launch(decode_gemv.decode_up, (E, H, I, K, up.cols, up.block_k, pdl), up.warps)
            constants = (E, H, I, K, block_k, down.cols, down.block_k, pdl)
            self.down = Launch(decode_gemv.decode_down, constants, down.warps)
            return
        self.make_grouping(up, down, pdl)
        self.up, self.down = self._product("up", up, pdl), self._product("down", down, pdl)
        # 256 columns a warp: 16 bytes a thread of each row, and no thread shares a column with another.
        cols = min(triton.next_power_of_2(H), max(256, 8192 // block_k))
        self.combine_columns = triton.cdiv(H, cols)
        self.combine = Launch(
            combine.combine,
            (H, E, K, block_k, cols, "evict_first" if down.keep else "", pdl),
            warps=max(1, min(8, cols // 256)),
        )
        self.up_gluon, self.down_gluon = up.kernel in GLUON_KERNELS, down.kernel in GLUON_KERNELS
        self.up_block = (up.cols, up.block_k)
        if up.kernel == "grouped":
            self.up_block = (1, 2, up.cols, up.block_k)
        elif up.kernel == "streamed":
            self.up_block = (1, up.cols // 8, 2, 8, up.block_k)
        self.down_block = (down.cols, down.block_k)
        self.h_block = (down.step if down.kernel == "streamed" else down.rows, down.block_k)

    def make_grouping(self, up: Tiles, down: Tiles, pdl: bool) -> None:
        """The launches that write the plan for these tiles (routing.py)."""
        self.bins = triton.next_power_of_2(self.E)
        sizes = (self.E, self.bins, up.rows, up.step, down.rows, down.step)
        self.group_few = {
            size: Launch(routing.group_few, (*sizes, size, routing.SUB, pdl), warps=max(8, size // 256))
            for size in routing.FEW_BLOCKS
        }

        @functools.cache
        def group_many(block: int) -> tuple[Launch, Launch]:
            count = Launch(routing.count_pairs, (self.E, self.bins, block, pdl), warps=8)
            constants = (*sizes, block, routing.SUB, routing.CHUNK, pdl)
            return count, Launch(routing.group_many, constants, warps=4)

        self.group_many = group_many

    def _product(self, role: str, tiles: Tiles, pdl: bool) -> Launch:
        """The kernel of a product: its sizes, then its tile."""
        sizes = (self.H, self.I, self.K) if role == "up" else (self.H, self.I)
        evict = "evict_last" if tiles.keep else ""
        if tiles.kernel == "streamed":
            from tma_moe import streamed_gemm

            kernel = streamed_gemm.streamed_up if role == "up" else streamed_gemm.streamed_down
            return Launch(kernel, (*sizes, self.E, tiles.rows, tiles.stages, evict), tiles.warps)
        tile = (tiles.rows, tiles.cols, tiles.block_k)
        if tiles.kernel == "specialized":
            from tma_moe import specialized_gemm

            kernel = specialized_gemm.specialized_up if role == "up" else specialized_gemm.specialized_down
            return Launch(kernel, (*sizes, *tile, tiles.stages), tiles.warps)
        if tiles.kernel == "grouped":
            kernel = grouped_gemm.grouped_up if role == "up" else grouped_gemm.grouped_down
            return Launch(kernel, (*sizes, *tile, tiles.flatten, pdl), tiles.warps, tiles.stages)
        kernel = swap_gemm.swap_up if role == "up" else swap_gemm.swap_down
        return Launch(kernel, (*sizes, *tile, tiles.flatten, evict, pdl), tiles.warps, tiles.stages)

    def run(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, combine: bool = True
    ) -> Tensor | Uncombined:
        """The operation, with the device of x current."""
        operands = (current_stream(x_TH.device), x_TH, ids_TK, weights_TK, experts)
        if self.up_tiles.kernel == "decode":
            return self._run_decode(*operands)
        return self._run_grouped(*operands, combine)

    def _run_decode(self, stream: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights):
        T = x_TH.shape[0]
        slots = T * self.K
        weights = experts._parameters  # without nn.Module's attribute search, as everywhere below
        h = x_TH.new_empty(slots, self.I)
        y_TH = torch.empty_like(x_TH)
        self.up(stream, (self.up_columns, slots, 1), x_TH, ids_TK, weights["gate_up"], h)
        self.down(stream, (self.down_columns, T, 1), h, ids_TK, weights_TK, weights["down"], y_TH)
        return y_TH

    def _run_grouped(
        self, stream: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, combine: bool
    ) -> Tensor | Uncombined:
        T = x_TH.shape[0]
        pairs = T * self.K
        up, down = self.up_tiles, self.down_tiles
        up_bound = _tiles_bound(pairs, self.E, up.rows)
        down_bound = _tiles_bound(pairs, self.E, down.rows)
        up_at = routing.HEADER.value + pairs
        down_at = up_at + 4 * up_bound
        plan = ids_TK.new_empty(down_at + 4 * down_bound, dtype=torch.int32)
        h = x_TH.new_empty(pairs, self.I)
        rows = x_TH.new_empty(pairs, self.H)
        self._group_pairs(stream, ids_TK, plan, pairs, up_at, down_at)
        desc = weight_descriptor(experts, "gate_up", self.up_block, self.up_gluon)
        # Streamed kernels prefetch, and take the weights themselves, too.
        weights = (experts._parameters["gate_up"], desc) if up.kernel == "streamed" else (desc,)
        self.up(stream, self._grid(up, up_bound * self.up_columns), x_TH, *weights, plan, h, up_at)
        desc = weight_descriptor(experts, "down", self.down_block, self.down_gluon)
        weights = (experts._parameters["down"], desc) if down.kernel == "streamed" else (desc,)
        if down.kernel != "swap":
            h = activation_descriptor(h, self.h_block, self.down_gluon)
        self.down(stream, self._grid(down, down_bound * self.down_columns), h, *weights, plan, rows, down_at)
        if not combine:
            return Uncombined(rows.view(T, self.K, self.H), ids_TK, weights_TK, self.E, down.keep)
        y_TH = torch.empty_like(x_TH)
        self.combine(stream, (T, self.combine_columns, 1), rows, ids_TK, weights_TK, y_TH)
        return y_TH

    def _grid(self, tiles: Tiles, count: int) -> tuple[int, int, int]:
        if tiles.ctas_per_sm:
            count = min(count, tiles.ctas_per_sm * self.multiprocessors)
        return count, 1, 1

    def _group_pairs(self, stream: int, ids_TK: Tensor, plan: Tensor, pairs: int, up_at: int, down_at: int) -> None:
        for size, group_few in self.group_few.items():
            if pairs <= size:
                blocks = -(-pairs // routing.SUB)
                group_few(stream, (blocks + 2, 1, 1), ids_TK, plan, pairs, up_at, down_at)
                return
        block = max(routing.SUB, triton.next_power_of_2(-(-pairs // routing.MANY_BLOCKS)))
        blocks = -(-pairs // block)
        counts = plan.new_empty(blocks * self.bins)
        count, group_many = self.group_many(block)
        count(stream, (blocks, 1, 1), ids_TK, counts, pairs)
        group_many(stream, (blocks + 2, 1, 1), ids_TK, counts, plan, pairs, up_at, down_at)


class _Buckets:
    """The recipes of one device, shape and dtype, by number of tokens."""

    def __init__(self, device: torch.device, E: int, K: int, H: int, I: int) -> None:  # noqa: E741
        name = "interpreter" if interpreting() else torch.cuda.get_device_name(device)
        choices = choices_for(name, triton.__version__, E, K, H, I)
        self.limits = [choice.max_tokens for choice in choices[:-1]]
        self.recipes = [Recipe(device, E, K, H, I, choice) for choice in choices]

    def recipe(self, T: int) -> Recipe:
        return self.recipes[bisect.bisect_left(self.limits, T)]


@functools.cache
def _buckets(device: torch.device, dtypes: tuple, E: int, K: int, H: int, I: int) -> _Buckets:  # noqa: E741
    # `dtypes` is only part of the key: compiled kernels belong to the dtypes they were compiled for.
    return _Buckets(device, E, K, H, I)


def fused_moe_tma(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, combine: bool
) -> Tensor | Uncombined:
    """`fused_moe` on the GPU; arguments were checked by the caller."""
    E, H, I = experts._parameters["down"].shape  # noqa: E741
    T, K = ids_TK.shape
    device = x_TH.device
    recipe = _buckets(device, (x_TH.dtype, ids_TK.dtype, weights_TK.dtype), E, K, H, I).recipe(T)
    with device_guard(device):
        return recipe.run(x_TH, ids_TK, weights_TK, experts, combine)
