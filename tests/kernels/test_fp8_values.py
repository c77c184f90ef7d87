"""Values of the kernels for FP8 weights, against a float64 evaluation of the same quantised weights.

As test_values.py: on a GPU, and in triton's interpreter, in a process of its own. A result passes if its error
is at most twice what the reference makes, which rounds activations as the format says.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tma_moe
from tests.interpreted import run_in_interpreter
from tma_moe import support
from tma_moe.block_fp8 import FP8, dequantize_blocks, quantize_blocks, quantize_rows
from tma_moe.reference import fused_moe_reference
from tma_moe.tiles import Choice, Tiles

DEVICE, DTYPE = ("cpu", torch.float32) if support.interpreting() else ("cuda", torch.bfloat16)
TOKENS = 4 if support.interpreting() else 23  # the interpreter is slow
# On a card other than Hopper's the portable kernels alone; they quantise activations where it multiplies FP8.
RUNNING = [name for name in ("tma", "triton") if tma_moe.unavailable(DEVICE, DTYPE, backend=name) is None]
MISSING = None if RUNNING else tma_moe.unavailable(DEVICE, DTYPE, backend="triton")
if MISSING is None and not support.has_fp8_products(torch.device(DEVICE)):
    MISSING = "this card does not multiply FP8"
runs = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}; runs in the interpreter's own process")

GEMV = Choice(None, Tiles("fp8_gemv", 1, 16, 128, 4, 1), Tiles("fp8_gemv", 1, 32, 128, 4, 1))
CHOICES = [
    pytest.param(GEMV, id="gemv"),
    pytest.param(
        Choice(None, Tiles("fp8_weights_m", 16, 32, 128, 4, 3), Tiles("fp8_weights_m", 16, 64, 128, 4, 3)),
        id="weights_m",
    ),
    pytest.param(
        Choice(
            None,
            Tiles("fp8_weights_m", 64, 64, 128, 4, 3, ctas_per_sm=1, keep=True),
            Tiles("fp8_weights_m", 32, 128, 128, 4, 2, ctas_per_sm=1, keep=True),
        ),
        id="weights_m-persistent",
    ),
    pytest.param(
        Choice(
            None,
            Tiles("fp8_portable", 16, 128, 128, 4, 3, weights_m=True),
            Tiles("fp8_portable", 32, 64, 128, 4, 3, weights_m=True, keep=True),
        ),
        id="portable-weights_m",
    ),
    pytest.param(
        Choice(
            None,
            Tiles("fp8_portable", 64, 128, 128, 8, 3, keep=True),
            Tiles("fp8_portable", 32, 128, 128, 4, 2),
        ),
        id="portable-tokens_m",
    ),
]
TOKENS_M = Choice(
    None,
    Tiles("fp8_tokens_m_ws", 128, 128, 128, 4, 3, ctas_per_sm=1),
    Tiles("fp8_tokens_m_ws", 128, 256, 128, 4, 3, ctas_per_sm=1, keep=True),
)
if not support.interpreting() and support.gluon_problem() is None:
    CHOICES.append(pytest.param(TOKENS_M, id="tokens_m_ws"))  # Gluon has no interpreter
if RUNNING == ["triton"]:
    CHOICES = [choice for choice in CHOICES if choice.id.startswith(("gemv", "portable"))]


@pytest.fixture(autouse=True)
def conversions_as_on_a_gpu(monkeypatch):
    """The interpreter's own conversion to FP8 loses a carry into the exponent, and rounds ties up.

    What it converts is bits, here and there.
    """
    if support.interpreting():
        import triton.language as tl
        from triton.runtime import interpreter

        convert = interpreter._convert_float
        wider = {tl.float16: (torch.float16, np.uint16), tl.float32: (torch.float32, np.uint32)}

        def exact(values, source, target, rounding):
            if target == tl.float8e4nv and source == tl.float32:
                return torch.from_numpy(values).to(FP8).view(torch.uint8).numpy()
            if source == tl.float8e4nv and target in wider:  # it reads NaN as 480
                dtype, bits = wider[target]
                return torch.from_numpy(values.view(np.uint8)).view(FP8).to(dtype).numpy().view(bits)
            return convert(values, source, target, rounding)

        monkeypatch.setattr(interpreter, "_convert_float", exact)


class Problem:
    """Random operands on the device under test."""

    def __init__(self, T, E=5, K=2, H=272, I=144, *, ids=None, scale=1.0, seed=0):  # noqa: E741
        generator = torch.Generator().manual_seed(seed)
        gate_up = torch.randn(E, 2 * I, H, generator=generator) * H**-0.5
        down = torch.randn(E, H, I, generator=generator) * I**-0.5
        (gate_up, gate_up_scale), (down, down_scale) = quantize_blocks(gate_up), quantize_blocks(down)
        layout = "transformers5"
        self.experts = tma_moe.ExpertWeights.from_checkpoint(gate_up, down, layout, gate_up_scale, down_scale)
        self.x = (scale * torch.randn(T, H, generator=generator)).to(DTYPE)
        self.weights, chosen = torch.softmax(torch.randn(T, E, generator=generator), -1).topk(K, dim=-1)
        self.ids = (chosen if ids is None else ids).int()
        self.experts.to(DEVICE)
        self.x, self.ids, self.weights = self.x.to(DEVICE), self.ids.to(DEVICE), self.weights.to(DEVICE)

    def run(self, choice: Choice, **options: bool) -> torch.Tensor:
        from tma_moe.recipe import make_recipe

        E, H, I = self.experts.down.shape  # noqa: E741
        recipe = make_recipe(self.x.device, E, self.ids.shape[1], H, I, choice)
        return recipe.run(self.x, self.ids, self.weights, self.experts, **options)

    def exact(self) -> torch.Tensor:
        """Without any rounding of activations."""
        experts = self.experts
        gate_up = dequantize_blocks(experts.gate_up.data, experts.gate_up_scale.data).double()
        down = dequantize_blocks(experts.down.data, experts.down_scale.data).double()
        return fused_moe_reference(self.x.double(), self.ids, self.weights, gate_up, down)

    def reference(self) -> torch.Tensor:
        return tma_moe.fused_moe(self.x, self.ids, self.weights, self.experts, backend="reference").double()

    def check(self, choice: Choice) -> None:
        exact = self.exact()
        allowed, error = (self.reference() - exact).abs(), (self.run(choice).double() - exact).abs()
        assert error.max() <= 2 * allowed.max(), f"max error {error.max():.3g}, of the format {allowed.max():.3g}"
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()
        # Much closer to the reference than to the exact result: the same roundings, but for a few at a tie.
        apart = (self.run(choice).double() - self.reference()).square().mean().sqrt()
        assert apart <= 0.25 * allowed.square().mean().sqrt()


def width_for(choice: Choice, width: int) -> int:
    return -(-width // 128) * 128 if choice is TOKENS_M else width


@pytest.mark.long
def test_in_the_interpreter():
    if support.interpreting() or torch.cuda.is_available():
        pytest.skip("these tests run here already")
    run_in_interpreter(Path(__file__), at_least=24)


@runs
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("H", "I"), [(272, 144), (16, 128)])
def test_values(choice, H, I):  # noqa: E741
    Problem(TOKENS, H=H, I=width_for(choice, I)).check(choice)


@runs
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("T", [1, 16, 17, 65])
def test_token_counts_around_the_tile_edges(choice, T):
    if choice is GEMV and T > 1 and DEVICE == "cpu":
        pytest.skip("the gemv kernels have no row tiles, and many programs are slow in the interpreter")
    # One expert gets every token, so its rows are exactly T.
    ids = torch.stack([torch.full((T,), 3), torch.arange(T) % 3], dim=1)
    Problem(T, H=32, I=width_for(choice, 48), ids=ids).check(choice)


@runs
@pytest.mark.parametrize("choice", CHOICES)
def test_groups_of_zeros_and_of_tiny_and_huge_values(choice):
    problem = Problem(TOKENS, H=144, I=width_for(choice, 80))
    problem.x[3] = 0
    problem.x[0, :128] = 0
    problem.x[1] *= 1e-3
    problem.x[2] *= 300.0
    assert problem.run(choice).isfinite().all()
    problem.check(choice)
    assert (problem.run(choice)[3] == 0).all()


@runs
@pytest.mark.parametrize("choice", CHOICES)
def test_nan_stays_in_its_row(choice):
    problem = Problem(TOKENS, H=144, I=width_for(choice, 80))
    clean = problem.run(choice)
    problem.x[2, 3] = float("nan")
    y = problem.run(choice)
    assert y[2].isnan().all()
    others = torch.arange(TOKENS, device=y.device) != 2
    assert torch.equal(y[others], clean[others])


@runs
@pytest.mark.parametrize("choice", CHOICES)
def test_ids_outside_the_experts_are_skipped(choice):
    problem = Problem(TOKENS, H=64, I=width_for(choice, 80))
    problem.ids[0, 0] = 5
    problem.ids[2, 1] = -1
    problem.ids[3] = 1 << 20
    problem.check(choice)
    problem.ids.fill_(-1)
    problem.x.fill_(float("nan"))
    torch.full((1 << 18,), 1 << 30, dtype=torch.int32, device=problem.x.device)  # memory that the plan may get
    assert (problem.run(choice) == 0).all()


@pytest.fixture
def row_by_row_products(monkeypatch):
    """As in test_values.py: the interpreter's BLAS may round a row differently at another place of its tile."""
    if DEVICE == "cpu":

        def matmul(a, b, dtype):
            a, b = a.astype(dtype), b.astype(dtype)
            return sum((a[:, k, None] * b[k] for k in range(1, len(b))), a[:, :1] * b[:1])

        monkeypatch.setattr(np, "matmul", matmul)


@runs
@pytest.mark.usefixtures("row_by_row_products")
@pytest.mark.parametrize("choice", CHOICES)
def test_bitwise_equal_from_run_to_run_and_in_any_company(choice):
    problem = Problem(TOKENS, H=144, I=width_for(choice, 80))
    together = problem.run(choice)
    assert torch.equal(problem.run(choice), together)
    x, ids, weights = problem.x, problem.ids, problem.weights
    for rows in (slice(2, 3), slice(1, TOKENS - 1)):
        problem.x, problem.ids, problem.weights = x[rows].clone(), ids[rows].clone(), weights[rows].clone()
        assert torch.equal(problem.run(choice), together[rows])


@runs
@pytest.mark.parametrize(("T", "K"), [(1, 16), (5, 272), (3, 2048)])
def test_rows_are_quantised_as_by_the_reference(T, K):
    from tma_moe import quantise
    from tma_moe.launcher import current_stream

    generator = torch.Generator().manual_seed(T)
    x_TK = (torch.randn(T, K, generator=generator) * torch.logspace(-3, 3, K)).to(DEVICE, DTYPE)
    (x8, scale), (expected8, expected) = quantise.quantize_rows(current_stream(x_TK.device), x_TK), quantize_rows(x_TK)
    # Division is not correctly rounded in either place.
    assert torch.allclose(scale, expected, rtol=3e-7, atol=0)
    differing = x8.float() != expected8.float()
    assert differing.float().mean() <= 1e-3  # those that lie at the middle of two numbers but for rounding
    assert torch.allclose(x8.float(), expected8.float(), rtol=2**-3, atol=2**-9)
