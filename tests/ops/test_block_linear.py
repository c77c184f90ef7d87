"""Linear layers in block-scaled FP8: kernels against plain torch, in the interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_moe.ops import BlockLinear, linear
from tests.interpreted import DEVICE, DTYPES, ON_GPU, runs_kernels
from tests.kernels.test_fp8_values import conversions_as_on_a_gpu  # noqa: F401
from tma_moe.block_fp8 import dequantize_blocks, quantize_blocks, quantize_rows, scaled_linear


def made(K: int, *parts: int, seed: int = 0) -> BlockLinear:
    """A layer with random weights; each part quantised by itself."""
    layer, generator = BlockLinear(K, *parts), torch.Generator().manual_seed(seed)
    first = 0
    for rows in parts:
        w8, scale = quantize_blocks(torch.randn(rows, K, generator=generator) * K**-0.5)
        layer.weight.data[first : first + rows].copy_(w8)
        shares = 128 // layer.shared
        at = slice(first // layer.shared, -(-(first + rows) // layer.shared))
        layer.scale.data[at].copy_(scale.repeat_interleave(shares, 0)[: at.stop - at.start])
        first += rows
    return layer.to(DEVICE)


def reference(layer: BlockLinear, x_TK: torch.Tensor) -> torch.Tensor:
    return scaled_linear(*quantize_rows(x_TK), layer.weight, layer.scale, layer.shared)


def test_which_rows_share_a_scale():
    assert made(64, 300).shared == 128
    assert made(64, 256, 128, 128).shared == 128
    assert made(64, 256, 64, 64).shared == 64
    assert made(64, 72, 24, 24).shared == 8
    assert made(64, 256, 64, 64).scale.shape == (6, 1)
    assert isinstance(linear(64, 72, 24, 24), torch.nn.Linear)
    assert isinstance(linear(64, 72, 24, 24, fp8=True), BlockLinear)


def test_parts_are_as_if_alone():
    together, x = made(144, 128, 64, 64), torch.randn(3, 144, device=DEVICE)
    for first, rows in ((0, 128), (128, 64), (192, 64)):
        scale = together.scale[first // 64 : (first + rows) // 64].repeat_interleave(64, 0)
        weight = together.weight[first : first + rows].float() * scale.repeat_interleave(128, 1)[:, :144]
        x8, x_scale = quantize_rows(x)
        exact = (x8.float() * x_scale.repeat_interleave(128, 1)[:, :144]) @ weight.T
        assert torch.allclose(reference(together, x)[:, first : first + rows], exact, rtol=1e-5, atol=1e-6)


def test_a_layer_of_one_part_is_the_dequantised_one():
    layer, x = made(272, 200), torch.randn(4, 272, device=DEVICE)
    exact = x @ dequantize_blocks(layer.weight, layer.scale).T
    # Each value of x is rounded by at most a part in 16 of the largest of its group.
    assert (reference(layer, x) - exact).norm() <= exact.norm() / 16


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "parts"), [(272, (200,)), (144, (128, 64, 64)), (128, (48, 24, 24)), (16, (128,))])
def test_kernels(K, parts, dtype):
    """All three, where they take the sizes, and that one row does not depend on the others."""
    from qwen3vl_moe.ops.kernels import block_linear

    layer = made(K, *parts)
    for T in (1, 3, 17, 70):
        x = torch.randn(T, K).to(DEVICE, dtype)
        x[: T // 2] = 0
        operands = x, layer.weight, layer.scale, layer.shared
        kernels = [block_linear.portable_rows]
        kernels += [block_linear.one_row] if layer.shared % 4 == 0 and T < 5 else []
        kernels += [block_linear.some_rows] if layer.shared % 64 == 0 else []
        expected = reference(layer, x)
        for kernel in kernels:
            y = kernel(*operands)
            assert y.shape == expected.shape
            # Beside float32 sums, the output's own rounding, and a few values of x at a tie between two FP8 numbers.
            apart = (y.float() - expected).norm() / expected.norm()
            assert apart <= torch.finfo(dtype).eps + 2e-3, kernel
            assert (y[: T // 2] == 0).all()
            alone = kernel(x[-1:].contiguous(), *operands[1:])
            if ON_GPU:  # the interpreter's BLAS rounds a row differently at another place of its tile
                assert torch.equal(y[-1:], alone)


@runs_kernels
@pytest.mark.parametrize("dtype", [*DTYPES[:1], torch.float16], ids=str)
@pytest.mark.parametrize(("K", "parts"), [(272, (200,)), (144, (128, 64, 64)), (40, (48, 24, 24))])
def test_kernels_for_cards_without_fp8(K, parts, dtype):
    """Activations stay as they are, and the weights are exact."""
    from qwen3vl_moe.ops.kernels import block_linear

    layer = made(K, *parts)
    weight = (
        layer.weight.float()
        * layer.scale.repeat_interleave(layer.shared, 0)[: len(layer.weight)].repeat_interleave(128, 1)[:, :K]
    )
    for T in (1, 3, 70):
        x = torch.randn(T, K).to(DEVICE, dtype)
        expected = x.float() @ weight.T
        for kernel in [block_linear.portable_rows] + [block_linear.one_row] * (T < 5):
            y = kernel(x, layer.weight, layer.scale, layer.shared, a8=False)
            assert (y.float() - expected).norm() <= max(torch.finfo(dtype).eps, 1e-6) * expected.norm(), kernel


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 5, 64, 129, 700, 2000])
@pytest.mark.parametrize(("K", "parts"), [(2048, (4096, 512, 512)), (4096, (2048,))])
def test_the_layers_of_the_model(T, K, parts):
    layer, x = made(K, *parts), torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    y, expected = layer(x), reference(layer, x)
    assert (y.float() - expected).norm() <= (torch.finfo(torch.bfloat16).eps + 2e-3) * expected.norm()
    assert torch.equal(layer(x), y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = layer(x)
    z.fill_(float("nan"))
    graph.replay()
    assert torch.equal(z, y)
