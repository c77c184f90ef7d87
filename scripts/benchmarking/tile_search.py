"""Which tiles the tuner tries, and what the compiler makes of each, found without a GPU.

A candidate is dropped before it is ever launched if its buffers cannot fit in shared memory, if its accumulators cannot
fit in registers, or if the compiled kernel spills or needs more shared memory than the card gives a program.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarking.moe import MoeShape
from tma_moe import support
from tma_moe.block_fp8 import FP8
from tma_moe.expert_weights import ExpertWeights
from tma_moe.launcher import Launch
from tma_moe.portable.targets import shared_memory
from tma_moe.recipe import make_recipe
from tma_moe.support import FP8_PRODUCTS, gluon_problem
from tma_moe.tiles import Choice, Tiles

HOPPER = support.CAPABILITY
SHARED_MEMORY = shared_memory(HOPPER)
ACCUMULATORS = 128  # float32 values of accumulator a thread may hold; the other registers hold addresses and fragments
GEMV_PAIRS = 128  # beyond this many (token, choice) pairs experts are shared too often for matrix times vector
ROLES = ("up", "down")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: bytes of shared memory, registers per thread, bytes of stack (spills)."""

    shared: int
    registers: int
    spilled: int
    allowed: int = SHARED_MEMORY  # bytes of shared memory

    def problem(self) -> str | None:
        """Why such a kernel is not worth launching, or None."""
        if self.shared > self.allowed:
            return f"{self.shared} bytes of shared memory"
        return f"{self.spilled} bytes spilled" if self.spilled else None


def families(
    shape: MoeShape, num_tokens: int, backend: str = "tma", card: tuple[int, int] = HOPPER
) -> list[dict[str, list[Tiles]]]:
    """Candidates by role, in groups whose members combine freely: gemv alone; all others with each other.

    Args:
        backend: "tma" or "triton".
        card: its compute capability.
    """
    if backend == "triton":
        few = num_tokens * shape.experts_per_token <= GEMV_PAIRS
        gemv = {role: _fp8_gemv(role, shape, num_tokens) if shape.fp8 else _gemv(role, shape) for role in ROLES}
        return [gemv] * few + [{role: _portable(role, shape, num_tokens, card) for role in ROLES}]
    if shape.fp8:  # h passes between the products in another form for each way
        ways = (_fp8_gemv, _fp8_weights_m, _fp8_tokens_m_ws)
        found = [{role: way(role, shape, num_tokens) for role in ROLES} for way in ways]
        return [family for family in found if family["up"] and family["down"]]
    large = (_weights_m, _tokens_m_ws, _weights_m_ws)
    found = [{role: [tiles for family in large for tiles in family(role, shape, num_tokens)] for role in ROLES}]
    if num_tokens * shape.experts_per_token <= GEMV_PAIRS:
        found.insert(0, {role: _gemv(role, shape) for role in ROLES})
    return found


def _fp8_gemv(role: str, shape: MoeShape, num_tokens: int) -> list[Tiles]:
    if num_tokens * shape.experts_per_token > GEMV_PAIRS:
        return []
    contraction = shape.hidden_size if role == "up" else shape.expert_width
    values = 2 if role == "up" else triton.next_power_of_2(shape.experts_per_token)  # for each weight column, at once
    return [
        Tiles("fp8_gemv", 1, cols, block_k, warps, 1)
        for warps in (4, 8)
        for cols in (2, 4, 8, 16)
        for block_k in (128, 256, 512, 1024, 2048)
        if block_k <= triton.next_power_of_2(contraction) and 16 <= values * cols * block_k // (32 * warps) <= 256
    ]


def _fp8_weights_m(role: str, shape: MoeShape, num_tokens: int) -> list[Tiles]:
    mean = triton.next_power_of_2(max(1, round(_rows_per_expert(shape, num_tokens))))
    return [
        Tiles("fp8_weights_m", rows, cols, 128, warps, stages)
        for rows in (16, 32, 64)
        if min(mean, 64) <= rows <= max(16, 4 * mean)
        for cols, warps in ((32, 4), (64, 4), (128, 8), (128, 4))
        for stages in (2, 3, 4)
    ]


def _fp8_tokens_m_ws(role: str, shape: MoeShape, num_tokens: int) -> list[Tiles]:
    if shape.expert_width % 128 or gluon_problem() is not None:
        return []
    return [Tiles("fp8_tokens_m_ws", 128, 128 if role == "up" else 256, 128, 4, stages, 1) for stages in (3, 4)]


def _rows_per_expert(shape: MoeShape, num_tokens: int) -> float:
    pairs = num_tokens * shape.experts_per_token
    return pairs / min(pairs, shape.num_experts)


def _gemv(role: str, shape: MoeShape) -> list[Tiles]:
    contraction = shape.hidden_size if role == "up" else shape.expert_width
    # The up kernel accumulates gate and up, the down kernel all experts of a token, block by block.
    accumulators = 2 if role == "up" else triton.next_power_of_2(shape.experts_per_token)
    candidates = []
    for warps in (4, 8):
        for cols in (1, 2, 4, 8, 16):
            for block_k in (128, 256, 512, 1024, 2048):
                per_thread = accumulators * cols * block_k // (32 * warps)
                if block_k <= triton.next_power_of_2(contraction) and 8 <= per_thread <= ACCUMULATORS:
                    candidates.append(Tiles("gemv", 1, cols, block_k, warps, 1))
    return candidates


def _weights_m(role: str, shape: MoeShape, num_tokens: int) -> list[Tiles]:
    mean = triton.next_power_of_2(max(1, round(_rows_per_expert(shape, num_tokens))))
    return [
        Tiles("weights_m", rows, cols, block_k, warps, stages, ctas, flatten)
        for rows in (16, 32, 64, 128)
        if min(mean, 128) <= rows <= max(16, 4 * mean)  # an expert's rows fill one tile or a few
        for cols, warps in ((64, 4), (128, 8)) + (((128, 4),) if role == "down" else ())
        for block_k, stages in ((64, 4), (64, 6), (128, 3), (128, 4))
        for ctas, flatten in ((0, False), (2, True))
        if _fits(role, rows, cols, block_k, warps, stages)
    ]


def _portable(role: str, shape: MoeShape, num_tokens: int, card: tuple[int, int]) -> list[Tiles]:
    mean = triton.next_power_of_2(max(1, round(_rows_per_expert(shape, num_tokens))))
    kernel, itemsize, large = ("fp8_portable", 1, 64) if shape.fp8 else ("portable", 2, 128)
    a8, waits = card >= FP8_PRODUCTS, card[0] in (9, 10)  # whether a step's buffer is kept until its product is done
    found = []
    for rows in (16, 32, 64, 128):
        if not min(mean, large) <= rows <= max(16, 2 * mean):  # an expert's rows fill one tile or a few
            continue
        for cols, warps in ((64, 4), (128, 4), (128, 8)):
            for block_k, stages in ((128, 2), (128, 3)) if shape.fp8 else ((32, 4), (64, 3), (64, 4), (128, 3)):
                weight_rows = 2 * cols if role == "up" else cols
                row_bytes = weight_rows * itemsize + rows * (1 if shape.fp8 and a8 else 2)
                buffers = (stages - (not waits)) * row_bytes * block_k
                # The sums of a step in FP8 are apart from those of all steps.
                sums = weight_rows * rows * (2 if shape.fp8 else 1)
                if buffers > shared_memory(card) or sums > ACCUMULATORS * 32 * warps:
                    continue
                if shape.fp8 and a8 and role == "up" and cols != 128:
                    continue
                found.append(Tiles(kernel, rows, cols, block_k, warps, stages, weights_m=rows < large))
    return found


def _tokens_m_ws(role: str, shape: MoeShape, num_tokens: int) -> list[Tiles]:
    if _rows_per_expert(shape, num_tokens) < 32 or gluon_problem() is not None:
        return []
    # Eight warps multiply, four to each half of the rows; a few KB of shared memory go to their stores and barriers.
    return [
        Tiles("tokens_m_ws", 128, cols, 64, 4, stages, 1)
        for cols in ((64, 128) if role == "up" else (128, 256))
        for stages in (3, 4, 6)
        if _fits(role, 128, cols, 64, 8, stages)
    ]


def _weights_m_ws(role: str, shape: MoeShape, num_tokens: int) -> list[Tiles]:
    mean = _rows_per_expert(shape, num_tokens)
    if mean < 32 or gluon_problem() is not None:
        return []
    # As deep a ring as fits beside some 20 KB for the stores' exchange between threads.
    return [
        Tiles("weights_m_ws", rows, 64 if role == "up" else 128, 64, 4, stages, 1)
        for rows, depths in ((96, (4, 7)), (160, (4, 5)), (288, (3, 4)))
        if rows >= mean or rows == 288
        for stages in depths
    ]


def _fits(role: str, rows: int, cols: int, block_k: int, warps: int, stages: int) -> bool:
    weight_rows = 2 * cols if role == "up" else cols
    buffers = stages * (weight_rows + rows) * block_k * 2
    return buffers <= SHARED_MEMORY and weight_rows * rows <= ACCUMULATORS * 32 * warps


class _Driver:
    """Stands in for triton's driver, so that a process compiles for a card whatever GPU it has, or none."""

    def __init__(self, card: tuple[int, int]) -> None:
        self.card = card

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.card[0] + self.card[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_tiles(
    role: str,
    tiles: Tiles,
    shape: MoeShape,
    dtype: torch.dtype = torch.bfloat16,
    card: tuple[int, int] = HOPPER,
) -> Resources:
    """Compiles the kernel of one candidate for a card, exactly as its launch would: triton's disk cache then has it.

    Needs no GPU. It replaces triton's driver for the time of the call: run it in a process of its own.
    """
    other_columns = 256 if role == "up" else 128
    partner = {
        "gemv": Tiles("gemv", 1, 4, 128, 4, 1),
        "fp8_gemv": Tiles("fp8_gemv", 1, 4, 128, 4, 1),
        "fp8_weights_m": Tiles("fp8_weights_m", 16, 64, 128, 4, 3),
        "fp8_tokens_m_ws": Tiles("fp8_tokens_m_ws", 128, other_columns, 128, 4, 3, 1),
        "portable": Tiles("portable", 16, 64, 64, 4, 3),
        "fp8_portable": Tiles("fp8_portable", 16, 128, 128, 4, 3),
    }.get(tiles.kernel, Tiles("weights_m", 16, 64, 64, 4, 3))
    choice = Choice(None, tiles, partner) if role == "up" else Choice(None, partner, tiles)
    launches: dict[str, tuple] = {}

    def record(self: Launch, stream: int, grid: tuple, *args: object) -> None:
        launches[self.kernel.__name__] = (self, args)

    machine = SimpleNamespace(multi_processor_count=132)
    for cached in (support.has_pdl, support.has_fp8_products):
        cached.cache_clear()
    with (
        mock.patch.object(support, "capability", return_value=card),
        mock.patch.object(Launch, "__call__", record),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=machine),
    ):
        num_tokens, meta = 64, torch.device("meta")
        sizes = (shape.num_experts, shape.experts_per_token, shape.hidden_size, shape.expert_width)
        topk_ids_TK = torch.empty(num_tokens, shape.experts_per_token, dtype=torch.int32, device=meta)
        experts = ExpertWeights(shape.num_experts, *sizes[2:], device=meta, dtype=FP8 if shape.fp8 else dtype)
        x_TH = torch.empty(num_tokens, shape.hidden_size, dtype=dtype, device=meta)
        make_recipe(meta, *sizes, choice).run(x_TH, topk_ids_TK, topk_ids_TK.float(), experts)
    recorded, args = launches[f"{tiles.kernel}_{role}"]
    with mock.patch.object(triton.runtime.driver, "_active", _Driver(card)):
        compiled = recorded.kernel.warmup(*args, *recorded.constants, grid=(1,), **recorded.options)
    registers, spilled = _registers_and_stack(compiled.asm["cubin"])
    for cached in (support.has_pdl, support.has_fp8_products):
        cached.cache_clear()
    return Resources(compiled.metadata.shared, registers, spilled, shared_memory(card))


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def compile_or_reason(role: str, tiles: Tiles, shape: MoeShape, card: tuple[int, int] = HOPPER) -> str | None:
    """Compiles one candidate; None if it is worth launching, else why not. For worker processes: it never raises."""
    try:
        return compile_tiles(role, tiles, shape, card=card).problem()
    except Exception as error:  # the compiler gives up in many ways; each means that this candidate is out
        return f"does not compile ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def same_kernel(tiles: Tiles) -> Tiles:
    """The candidate without what only the launch grid depends on: equal values share one compiled kernel."""
    return replace(tiles, ctas_per_sm=0)
