"""What the tests that need a Hopper GPU share: the shape of the model, operands, and what a result is held to."""

from __future__ import annotations

import pytest
import torch

import tma_moe
from tma_moe import support
from tma_moe.block_fp8 import FP8, dequantize_blocks, quantize_blocks
from tma_moe.reference import fused_moe_reference

MISSING = "triton's interpreter is on" if support.interpreting() else tma_moe.unavailable("cuda", torch.bfloat16)
MARKS = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

E, K, H, I = 128, 8, 2048, 768  # Qwen3-VL-30B-A3B  # noqa: E741


def make_experts(seed: int = 0, dtype: torch.dtype = torch.bfloat16, sizes=(E, H, I)) -> tma_moe.ExpertWeights:
    generator = torch.Generator("cuda").manual_seed(seed)
    experts = tma_moe.ExpertWeights(*sizes, device="cuda", dtype=torch.bfloat16 if dtype == FP8 else dtype)
    experts.gate_up.data.normal_(std=sizes[1] ** -0.5, generator=generator)
    experts.down.data.normal_(std=sizes[2] ** -0.5, generator=generator)
    if dtype != FP8:
        return experts
    (gate_up, of_gate_up), (down, of_down) = quantize_blocks(experts.gate_up), quantize_blocks(experts.down)
    return tma_moe.ExpertWeights.from_checkpoint(gate_up, down, "transformers5", of_gate_up, of_down)


def in_float32(experts: tma_moe.ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in float32; those of FP8 times their scales."""
    if experts.gate_up_scale is None or experts.down_scale is None:
        return experts.gate_up.float(), experts.down.float()
    return dequantize_blocks(experts.gate_up, experts.gate_up_scale), dequantize_blocks(
        experts.down, experts.down_scale
    )


def make_inputs(T: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, sizes=(E, K, H), scale: float = 1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x_TH = scale * torch.randn(T, sizes[2], device="cuda", generator=generator)
    logits_TE = torch.randn(T, sizes[0], device="cuda", generator=generator)
    return x_TH.to(dtype), *tma_moe.route(logits_TE, sizes[1])


def assert_as_good_as_the_dtype(y, x, ids, weights, experts, float32_weights) -> None:
    """At most twice the error that the reference makes in the dtype of x, against the reference in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = fused_moe_reference(x.float(), ids, weights, *float32_weights)
    working = tma_moe.fused_moe(x, ids, weights, experts, backend="reference")
    allowed = (working.float() - exact).abs()
    error = (y.float() - exact).abs()
    assert error.max() <= 2 * allowed.max(), f"max error {error.max():.3g}, of the dtype {allowed.max():.3g}"
    assert error.square().mean() <= 4 * allowed.square().mean(), "larger than of the dtype on the whole"
