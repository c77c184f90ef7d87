"""Backend "tma": buffers and launches of the fused operation.

A `Recipe` is everything that does not depend on the call: kernels with their constants, block shapes, grids. It is made
once per device, shape, dtype and bucket of token counts. A call then allocates its buffers and launches two kernels
(decode) or four. Buffers come from torch's caching allocator at every call, so streams, threads and CUDA graphs each
have their own, and nothing outlives the call.

All kernels use programmatic dependent launch: each waits for the one before it before its first write, so a chain of
them, and the next call's first, may start early but never run ahead.
"""

import bisect
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from tma_moe import combine, decode_gemv, grouped_gemm, routing, swap_gemm
from tma_moe.descriptors import activation_descriptor, weight_descriptor
from tma_moe.experts import ExpertWeights
from tma_moe.support import interpreting
from tma_moe.tuning import Choice, Tiles, choices_for


class Launch:
    """A kernel with its constants. The first call compiles; later ones skip triton's argument binding.

    That is safe because a recipe fixes every dtype, all pointers are multiples of 16 bytes, and the kernels are
    declared not to specialise on the values of their integers.
    """

    def __init__(self, kernel, constants: tuple, warps: int = 4, stages: int = 1) -> None:
        self.kernel = kernel
        self.constants = constants
        self.options = {"num_warps": warps, "num_stages": stages}
        if not interpreting():
            self.options["launch_pdl"] = True
        self.compiled = None

    def __call__(self, grid: tuple[int, int, int], *args) -> None:
        if self.compiled is None:
            # None again under the interpreter, which always takes this path.
            self.compiled = self.kernel[grid](*args, *self.constants, **self.options)
        else:
            self.compiled[grid](*args, *self.constants)


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
        if choice.up.kernel == "decode":
            self.run = self.run_decode
            up, down = choice.up, choice.down
            self.up = Launch(decode_gemv.decode_up, (E, H, I, K, up.cols, up.block_k, pdl), up.warps)
            constants = (E, H, I, K, block_k, down.cols, down.block_k, pdl)
            self.down = Launch(decode_gemv.decode_down, constants, down.warps)
            return
        self.run = self.run_grouped
        self.bins = triton.next_power_of_2(E)
        rows = (choice.up.rows, choice.down.rows)
        block = routing.BLOCK
        self.group_few = {
            size: Launch(routing.group_few, (E, self.bins, *rows, size, pdl), warps=max(1, size // 256))
            for size in (routing.SMALL_BLOCK, block)
        }
        self.count = Launch(routing.count_pairs, (E, self.bins, block, pdl), warps=8)
        self.place = Launch(routing.place_blocks, (self.bins, *rows, routing.CHUNK, pdl), warps=8)
        self.rank = Launch(routing.rank_pairs, (E, self.bins, block, pdl), warps=8)
        self.up = self._product(choice.up, swap_gemm.swap_up, grouped_gemm.grouped_up, (H, I, K), pdl)
        self.down = self._product(choice.down, swap_gemm.swap_down, grouped_gemm.grouped_down, (H, I), pdl)
        # 256 columns a warp: 16 bytes a thread of each row, and no thread shares a column with another.
        cols = min(triton.next_power_of_2(H), max(256, 8192 // block_k))
        self.combine_grid = triton.cdiv(H, cols)
        self.combine = Launch(combine.combine, (H, E, K, block_k, cols, pdl), warps=max(1, min(8, cols // 256)))
        self.up_block = (choice.up.cols, choice.up.block_k)
        if choice.up.kernel == "grouped":
            self.up_block = (1, 2, *self.up_block)
        self.down_block = (choice.down.cols, choice.down.block_k)

    @staticmethod
    def _product(tiles: Tiles, swap, grouped, sizes: tuple, pdl: bool) -> Launch:
        constants = (*sizes, tiles.rows, tiles.cols, tiles.block_k)
        if tiles.kernel == "specialized":
            from tma_moe import specialized_gemm

            kernel = specialized_gemm.specialized_up if swap is swap_gemm.swap_up else specialized_gemm.specialized_down
            return Launch(kernel, (*constants, tiles.stages), tiles.warps)
        kernel = swap if tiles.kernel == "swap" else grouped
        return Launch(kernel, (*constants, tiles.flatten, pdl), tiles.warps, tiles.stages)

    def _grid(self, tiles: Tiles, row_tiles: int, width: int) -> tuple[int, int, int]:
        count = row_tiles * -(-width // tiles.cols)
        if tiles.ctas_per_sm:
            count = min(count, tiles.ctas_per_sm * self.multiprocessors)
        return count, 1, 1

    def run_decode(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights) -> Tensor:
        T = x_TH.shape[0]
        h = x_TH.new_empty(T * self.K, self.I)
        y_TH = torch.empty_like(x_TH)
        self.up((-(-self.I // self.up_tiles.cols), T * self.K, 1), x_TH, ids_TK, experts.gate_up, h)
        self.down((-(-self.H // self.down_tiles.cols), T, 1), h, ids_TK, weights_TK, experts.down, y_TH)
        return y_TH

    def run_grouped(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights) -> Tensor:
        T = x_TH.shape[0]
        pairs = T * self.K
        up_bound = _tiles_bound(pairs, self.E, self.up_tiles.rows)
        down_bound = _tiles_bound(pairs, self.E, self.down_tiles.rows)
        up_at = routing.HEADER.value + pairs
        down_at = up_at + 4 * up_bound
        plan = torch.empty(down_at + 4 * down_bound, dtype=torch.int32, device=x_TH.device)
        h = x_TH.new_empty(pairs, self.I)
        rows = x_TH.new_empty(pairs, self.H)
        y_TH = torch.empty_like(x_TH)
        self._group_pairs(ids_TK, plan, pairs, up_at, down_at)
        gate_up_desc = weight_descriptor(experts, "gate_up", self.up_block, gluon=self.up_tiles.kernel == "specialized")
        self.up(self._grid(self.up_tiles, up_bound, self.I), x_TH, gate_up_desc, plan, h, up_at)
        gluon = self.down_tiles.kernel == "specialized"
        down_desc = weight_descriptor(experts, "down", self.down_block, gluon=gluon)
        if self.down_tiles.kernel != "swap":
            h = activation_descriptor(h, (self.down_tiles.rows, self.down_tiles.block_k), gluon=gluon)
        self.down(self._grid(self.down_tiles, down_bound, self.H), h, down_desc, plan, rows, down_at)
        self.combine((T, self.combine_grid, 1), rows, ids_TK, weights_TK, y_TH)
        return y_TH

    def _group_pairs(self, ids_TK: Tensor, plan: Tensor, pairs: int, up_at: int, down_at: int) -> None:
        experts = -(-self.E // 4)
        if pairs <= routing.BLOCK:
            block = routing.SMALL_BLOCK if pairs <= routing.SMALL_BLOCK else routing.BLOCK
            self.group_few[block]((experts, 1, 1), ids_TK, plan, pairs, up_at, down_at)
            return
        blocks = -(-pairs // routing.BLOCK)
        counts = torch.empty(blocks * self.bins, dtype=torch.int32, device=plan.device)
        self.count((blocks, 1, 1), ids_TK, counts, pairs)
        self.place((1, 1, 1), counts, plan, blocks, up_at, down_at)
        self.rank((experts, blocks, 1), ids_TK, counts, plan, pairs)


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


def on_device(device: torch.device, run: Callable[[], Tensor]) -> Tensor:
    """Runs launches with `device` current, as triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return run()
    with torch.cuda.device(device):
        return run()


def fused_moe_tma(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights) -> Tensor:
    """`fused_moe` on the GPU; arguments were checked by the caller."""
    E, H, I = experts.down.shape  # noqa: E741
    dtypes = (x_TH.dtype, ids_TK.dtype, weights_TK.dtype)
    recipe = _buckets(x_TH.device, dtypes, E, ids_TK.shape[1], H, I).recipe(x_TH.shape[0])
    return on_device(x_TH.device, lambda: recipe.run(x_TH, ids_TK, weights_TK, experts))
