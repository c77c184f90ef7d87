"""What backends "tma" and "triton" launch for a shape: grouping, two products, and the sum over experts.

A `Recipe` is everything that does not depend on the call: kernels with their constants, block shapes, grids. It is made
once per device, shape, dtype and bucket of token counts. A call then allocates its buffers and launches two kernels
(gemv), or four (five above 4096 pairs, where grouping takes two), one more for FP8 products that want x in FP8, and one
fewer if the caller takes the sum over experts (`combine=False`), as the model does. Buffers come from torch's caching
allocator at every call, so streams, threads and CUDA graphs each have their own, and nothing outlives the call.

All kernels use programmatic dependent launch where the device has it, under the contract of pdl.py: a kernel may start
early, but never reads what the kernels before it have not finished writing.
"""

import bisect
import functools
import itertools

import torch
import triton
from torch import Tensor

from tma_moe import block_fp8, routing
from tma_moe.combine import combine_rows
from tma_moe.expert_weights import ExpertWeights
from tma_moe.gemm import fp8_gemv, gemv
from tma_moe.gemm.product import Product, Sizes, product
from tma_moe.launcher import current_stream, device_guard
from tma_moe.portable.rule import portable_choices_for
from tma_moe.portable.targets import shared_memory
from tma_moe.quantise import quantize_rows
from tma_moe.support import capability, has_fp8_products, has_pdl, interpreting
from tma_moe.tiles import Choice, choices_for
from tma_moe.uncombined import Uncombined


class GemvRecipe:
    """A few tokens: two launches, no grouping."""

    def __init__(self, sizes: Sizes, choice: Choice) -> None:
        self.sizes, self.fp8 = sizes, choice.fp8
        way = fp8_gemv if choice.fp8 else gemv
        self.up, self.down = way.Up(choice.up, sizes), way.Down(choice.down, sizes)

    def run(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, combine: bool = True
    ) -> Tensor:
        """The operation, with the device of x current; the sum over experts is always taken."""
        stream = current_stream(x_TH.device)
        h = x_TH.new_empty(ids_TK.numel(), self.sizes.I, dtype=torch.float32 if self.fp8 else x_TH.dtype)
        y_TH = torch.empty_like(x_TH)
        self.up(stream, x_TH, ids_TK, experts, h)
        self.down(stream, h, ids_TK, weights_TK, experts, y_TH)
        return y_TH


class GroupedRecipe:
    """Rows grouped by expert, two products over row tiles, and the weighted sum over each token's experts."""

    def __init__(self, sizes: Sizes, choice: Choice) -> None:
        self.sizes, self.fp8 = sizes, choice.fp8
        self.up: Product = product("up", choice.up, sizes)
        self.down: Product = product("down", choice.down, sizes)
        tiles = (choice.up.rows, self.up.step, choice.down.rows, self.down.step)
        self.grouping = routing.Grouping(sizes.E, tiles, sizes.pdl)

    def run(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, combine: bool = True
    ) -> Tensor | Uncombined:
        """The operation, with the device of x current."""
        stream, pairs = current_stream(x_TH.device), ids_TK.numel()
        plan, up_at, down_at = self.grouping(stream, ids_TK, self.up.row_tiles(pairs), self.down.row_tiles(pairs))
        h = self._hidden(pairs, x_TH)
        rows = x_TH.new_empty(pairs, self.sizes.H)
        x = quantize_rows(stream, x_TH) if self.up.quantised else x_TH
        self.up(stream, pairs, x, experts, plan, h, up_at)
        self.down(stream, pairs, h, experts, plan, rows, down_at)
        if not combine:
            rows_TKH = rows.view(*ids_TK.shape, self.sizes.H)
            return Uncombined(rows_TKH, ids_TK, weights_TK, self.sizes.E, self.down.tiles.keep)
        y_TH = torch.empty_like(x_TH)
        combine_rows(stream, rows, ids_TK, weights_TK, self.sizes.E, self.down.tiles.keep, y_TH)
        return y_TH

    def _hidden(self, pairs: int, x_TH: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Memory for what the products pass on, as both of them want it."""
        I = self.sizes.I  # noqa: E741
        if not self.fp8 or not self.sizes.a8:
            return x_TH.new_empty(pairs, I)
        if not self.up.quantised:
            return x_TH.new_empty(pairs, I, dtype=torch.float32)
        scales = x_TH.new_empty(pairs, block_fp8.blocks(I), dtype=torch.float32)
        return x_TH.new_empty(pairs, I, dtype=block_fp8.FP8), scales


Recipe = GemvRecipe | GroupedRecipe


def make_recipe(device: torch.device, E: int, K: int, H: int, I: int, choice: Choice) -> Recipe:  # noqa: E741
    """The recipe of one choice of tiles.

    Raises:
        ValueError: the tiles are not what their kernels take.
        ImportError: a kernel is written in Gluon, and this triton's Gluon is incompatible.
    """
    on_gpu = not interpreting()
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 2
    sizes = Sizes(E, K, H, I, processors, has_pdl(device), has_fp8_products(device))
    return (GroupedRecipe if choice.grouped else GemvRecipe)(sizes, choice)


class _Buckets:
    """The recipes of one device, shape and dtype, by number of tokens."""

    def __init__(
        self,
        device: torch.device,
        E: int,
        K: int,
        H: int,
        I: int,  # noqa: E741
        fp8: bool,
        backend: str = "tma",
    ) -> None:
        name = "interpreter" if interpreting() else torch.cuda.get_device_name(device)
        if backend == "tma":
            choices = choices_for(name, triton.__version__, E, K, H, I, fp8)
        else:
            card = has_fp8_products(device), shared_memory(capability(device))
            choices = portable_choices_for(name, triton.__version__, (E, K, H, I), fp8, *card)
        self.limits = [choice.max_tokens or 0 for choice in choices[:-1]]  # only the last one has none
        self.recipes = [make_recipe(device, E, K, H, I, choice) for choice in choices]

    def recipe(self, T: int) -> Recipe:
        return self.recipes[bisect.bisect_left(self.limits, T)]

    def ends(self, K: int, most: int) -> list[int]:
        """The largest call of every kind of calls: those that neither products nor grouping tell apart."""
        pairs = [*routing.FEW_BLOCKS, *itertools.takewhile(lambda n: n < most * K, routing.many_limits())]
        return sorted({min(end, most) for end in (*self.limits, *(n // K for n in pairs), most) if end})


@functools.cache
def _buckets(device: torch.device, dtypes: tuple, E: int, K: int, H: int, I: int, backend: str) -> _Buckets:  # noqa: E741
    # Of activations, weights, ids and routing weights: compiled kernels belong to the dtypes they were compiled for.
    return _Buckets(device, E, K, H, I, dtypes[1] == block_fp8.FP8, backend)


def call_ends(experts: ExpertWeights, K: int, most: int, backend: str) -> list[int]:
    """Numbers of tokens, `most` the last: calls of these launch every kernel that any call of up to `most` would.

    For :func:`tma_moe.launcher.compile_ahead`; `experts` on a GPU, with int32 ids and float32 weights as of `route`.
    """
    E, H, I = experts.parameter("down").shape  # noqa: E741
    weights = experts.down.dtype
    activations = torch.bfloat16 if weights == block_fp8.FP8 else weights  # no end depends on them
    dtypes = (activations, weights, torch.int32, torch.float32)
    return _buckets(experts.down.device, dtypes, E, K, H, I, backend).ends(K, most)


def fused_moe_kernels(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, combine: bool, backend: str
) -> Tensor | Uncombined:
    """`fused_moe` on the GPU by backend "tma" or "triton"; arguments were checked by the caller."""
    E, H, I = experts.parameter("down").shape  # noqa: E741
    T, K = ids_TK.shape
    device = x_TH.device
    dtypes = x_TH.dtype, experts.parameter("down").dtype, ids_TK.dtype, weights_TK.dtype
    recipe = _buckets(device, dtypes, E, K, H, I, backend).recipe(T)
    with device_guard(device):
        return recipe.run(x_TH, ids_TK, weights_TK, experts, combine)
