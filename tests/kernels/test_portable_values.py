"""FP8 weights on cards whose tensor cores do not multiply FP8: their bytes are widened, activations stay as they are.

As test_values.py: on a GPU (any from 8.0 on, where the kernels are told that it has no FP8), and in triton's
interpreter, in a process of its own. A result passes if its error is at most twice what the reference makes in the
dtype of the activations with the weights multiplied out.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tma_moe
from tests.interpreted import run_in_interpreter
from tma_moe import support
from tma_moe.block_fp8 import FP8, dequantize_blocks, quantize_blocks
from tma_moe.reference import fused_moe_reference
from tma_moe.tiles import Choice, Tiles

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tma_moe.portable.widen import TO_BF16, TO_FP16, widened  # noqa: E402

DEVICE, DTYPES = (
    ("cpu", (torch.float16, torch.float32)) if support.interpreting() else ("cuda", (torch.bfloat16, torch.float16))
)
MISSING = tma_moe.unavailable(DEVICE, DTYPES[0], backend="triton")
runs = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}; runs in the interpreter's own process")

GEMV = Choice(None, Tiles("fp8_gemv", 1, 128, 128, 4, 1), Tiles("fp8_gemv", 1, 128, 128, 4, 1))
CHOICES = [
    pytest.param(GEMV, id="gemv"),
    pytest.param(
        Choice(
            None,
            Tiles("fp8_portable", 16, 64, 128, 4, 3, weights_m=True, keep=True),
            Tiles("fp8_portable", 32, 128, 128, 4, 3, weights_m=True),
        ),
        id="weights_m",
    ),
    pytest.param(
        Choice(None, Tiles("fp8_portable", 64, 32, 128, 4, 3), Tiles("fp8_portable", 32, 64, 128, 4, 2)), id="tokens_m"
    ),
]


@pytest.fixture(autouse=True)
def a_card_without_fp8(monkeypatch):
    from tma_moe import recipe

    monkeypatch.setattr(recipe, "has_fp8_products", lambda device: False)


class Problem:
    """Random operands, their result, and the same exactly."""

    def __init__(self, T, H=272, I=144, *, dtype=DTYPES[0], E=5, K=2, ids=None, scale=1.0):  # noqa: E741
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(E, 2 * I, H, generator=generator) * H**-0.5
        down = torch.randn(E, H, I, generator=generator) * I**-0.5
        (gate_up, of_gate_up), (down, of_down) = quantize_blocks(gate_up), quantize_blocks(down)
        self.experts = tma_moe.ExpertWeights.from_checkpoint(gate_up, down, "transformers5", of_gate_up, of_down)
        self.x = (scale * torch.randn(T, H, generator=generator)).to(dtype)
        self.weights, chosen = torch.softmax(torch.randn(T, E, generator=generator), -1).topk(K, dim=-1)
        self.ids = (chosen if ids is None else ids).int()
        self.experts.to(DEVICE)
        self.x, self.ids, self.weights = self.x.to(DEVICE), self.ids.to(DEVICE), self.weights.to(DEVICE)

    def run(self, choice: Choice, **options: bool) -> torch.Tensor:
        from tma_moe.recipe import make_recipe

        E, H, I = self.experts.down.shape  # noqa: E741
        recipe = make_recipe(self.x.device, E, self.ids.shape[1], H, I, choice)
        return recipe.run(self.x, self.ids, self.weights, self.experts, **options)

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        experts = self.experts
        gate_up = dequantize_blocks(experts.gate_up.data, experts.gate_up_scale.data).to(dtype)
        down = dequantize_blocks(experts.down.data, experts.down_scale.data).to(dtype)
        return fused_moe_reference(self.x.to(dtype), self.ids, self.weights, gate_up, down).double()

    def check(self, choice: Choice) -> None:
        exact = self.reference(torch.float64)
        allowed, error = (self.reference(self.x.dtype) - exact).abs(), (self.run(choice).double() - exact).abs()
        assert error.max() <= 2 * allowed.max(), f"max error {error.max():.3g}, of the dtype {allowed.max():.3g}"
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()


@pytest.mark.long
def test_in_the_interpreter():
    if support.interpreting() or torch.cuda.is_available():
        pytest.skip("these tests run here already")
    run_in_interpreter(Path(__file__), at_least=28)


@runs
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(choice, dtype):
    Problem(9, dtype=dtype).check(choice)


@runs
@pytest.mark.parametrize("choice", CHOICES[1:])
@pytest.mark.parametrize("T", [1, 16, 17, 65])
def test_token_counts_around_the_tile_edges(choice, T):
    ids = torch.stack([torch.full((T,), 3), torch.arange(T) % 3], dim=1)
    Problem(T, H=32, I=48, ids=ids).check(choice)


@runs
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("H", "I"), [(37, 19), (130, 257)])
def test_sizes_that_no_block_divides(choice, H, I):  # noqa: E741
    Problem(4, H, I).check(choice)


@runs
@pytest.mark.parametrize("choice", CHOICES)
def test_large_inputs_nan_and_ids_outside_the_experts(choice):
    problem = Problem(5, H=144, I=80, scale=30.0)
    problem.ids[0, 0] = 5
    problem.ids[2, 1] = -1
    problem.ids[4] = 1 << 20
    problem.check(choice)
    clean = problem.run(choice)
    problem.x[1, 3] = float("nan")
    y = problem.run(choice)
    assert y[1].isnan().all()
    others = torch.arange(5, device=y.device) != 1
    assert torch.equal(y[others], clean[others])
    problem.ids.fill_(-1)
    assert (problem.run(choice) == 0).all()


@runs
@pytest.mark.parametrize("choice", CHOICES)
def test_the_sum_may_be_left_to_the_caller(choice):
    problem = Problem(5, H=144, I=80)
    rows, whole = problem.run(choice, combine=False), problem.run(choice)
    y = rows.combined() if isinstance(rows, tma_moe.Uncombined) else rows
    assert torch.equal(y, whole)
    assert isinstance(rows, tma_moe.Uncombined) == (choice is not GEMV)


@triton.jit
def _widen(bits_ptr, out_ptr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, widened(tl.load(bits_ptr + i), out_ptr.dtype.element_ty))


@runs
def test_every_byte_is_widened_exactly():
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    real = bits & 0x7F != 0x7F  # those two are NaN
    for dtype in (*DTYPES, torch.float32):
        out = torch.empty(256, dtype=dtype, device=DEVICE)
        _widen[(1,)](bits, out)
        assert torch.equal(out[real].float(), bits.view(FP8)[real].float())


@pytest.mark.parametrize("text", [TO_FP16, TO_BF16], ids=["fp16", "bf16"])
def test_what_the_assembler_is_told_widens_every_byte_exactly(text):
    """The instructions are played through here, as no interpreter knows them: four bytes in, two registers out."""
    for first in range(0, 256, 4):
        values = [first, first + 1, first + 2, first + 3]
        if any(value & 0x7F == 0x7F for value in values):
            values[3] = 0
        given = int.from_bytes(bytes(values), "little")
        low, high = run_ptx(text.value, given)
        wide = np.array([low, high], dtype="<u4").view("<u2")
        if text is TO_FP16:
            found = wide.view("<f2").astype(np.float32)
        else:
            found = (wide.astype(np.uint32) << 16).view(np.float32)
        expected = torch.tensor(values, dtype=torch.uint8).view(FP8).float().numpy()
        assert np.array_equal(found, expected)


def run_ptx(text: str, given: int) -> tuple[int, int]:
    """Registers $0 and $1 after a few PTX instructions, with $2 given; halves are exact where the product is."""
    registers = {"$2": given, "0": 0}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 16)

    def halves(name: str, fp16: bool) -> np.ndarray:
        bits = np.array([value(name)], dtype="<u4").view("<u2")
        return bits.view("<f2").astype(np.float64) if fp16 else (bits.astype("<u4") << 16).view("<f4").astype(float)

    for line in re.findall(r"^\s*(\S+) ([^;]*);", text, re.MULTILINE):
        operation, (to, *sources) = line[0], [part.strip() for part in line[1].split(",")]
        if operation == ".reg":
            continue
        a = value(sources[0])
        b = value(sources[1]) if len(sources) > 1 else 0
        if operation == "mov.b32":
            result = a
        elif operation == "and.b32":
            result = a & b
        elif operation == "or.b32":
            result = a | b
        elif operation == "shr.b32":
            result = a >> int(sources[1])
        elif operation == "prmt.b32":
            pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            result = int.from_bytes(bytes(pool[value(sources[2]) >> 4 * i & 7] for i in range(4)), "little")
        else:
            fp16 = operation == "mul.f16x2"
            assert fp16 or operation == "fma.rn.bf16x2"
            product = halves(sources[0], fp16) * halves(sources[1], fp16)
            if fp16:
                result = int(product.astype("<f2").view("<u4")[0])
            else:
                assert (halves(sources[2], fp16) == 0).all()
                bits = product.astype("<f4").view("<u4")
                assert (bits & 0xFFFF == 0).all()
                result = int((bits >> 16).astype("<u2").view("<u4")[0])
        registers[to] = result
    return registers["$0"], registers["$1"]
