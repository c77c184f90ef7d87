"""transformers' FP8 experts, run by this package: its module, its registry, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig

import tma_moe
import tma_moe.hf
from tma_moe.block_fp8 import dequantize_blocks, quantize_blocks
from tma_moe.hf_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
pytestmark = pytest.mark.skipif(ALL_FP8_EXPERTS_FUNCTIONS is None, reason="this transformers has no such registry")
E, H, I = 5, 144, 80  # noqa: E741


def made(**changes) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=2, hidden_act="silu"
    )
    for name in [name for name in changes if name.startswith("swiglu")]:
        setattr(config, name, changes.pop(name))
    options = {"block_size": (128, 128), "activation_scheme": "dynamic"} | changes
    module = finegrained_fp8.FP8Experts(config, **options)
    for name, shape in (("gate_up_proj", (E, 2 * I, H)), ("down_proj", (E, H, I))):
        w8, scale = quantize_blocks(torch.randn(shape) * 0.1)
        for own, value in ((name, w8), (f"{name}_scale_inv", scale)):
            if getattr(getattr(module, own, None), "shape", None) == value.shape:
                getattr(module, own).data.copy_(value)
    return module


def call(module: nn.Module, implementation: str = "tma_moe_reference", dtype: torch.dtype = torch.float32):
    x_TH, ids_TK = torch.randn(7, H, dtype=dtype), torch.randint(0, E, (7, 2))
    weights_TK = torch.rand(7, 2)
    with torch.no_grad():
        return tma_moe.hf.experts_forward(module, x_TH, ids_TK, weights_TK, implementation), x_TH, ids_TK, weights_TK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_what_the_weights_stand_for(dtype):
    module = made()
    y_TH, x_TH, ids_TK, weights_TK = call(module, dtype=dtype)
    assert y_TH.dtype == dtype
    plain = tma_moe.ExpertWeights.from_checkpoint(
        dequantize_blocks(module.gate_up_proj.data, module.gate_up_proj_scale_inv.data),
        dequantize_blocks(module.down_proj.data, module.down_proj_scale_inv.data),
        "transformers5",
    )
    exact = tma_moe.fused_moe(x_TH.float(), ids_TK, weights_TK, plain, backend="reference")
    # Both products round their activations by at most a part in 16 of the largest of a group.
    assert (y_TH.float() - exact).norm() <= exact.norm() / 8


def test_parameters_are_shared():
    module = made()
    before = call(module)[0]
    held = tma_moe.hf._weights_of[module]
    assert held.down is module.down_proj
    assert held.gate_up_scale is module.gate_up_proj_scale_inv
    module.down_proj_scale_inv.data.mul_(2)
    torch.manual_seed(0)
    first = call(module)[0]
    module.down_proj_scale_inv.data.mul_(2)
    torch.manual_seed(0)
    assert torch.allclose(call(module)[0], 2 * first)
    assert before.isfinite().all()


def test_it_is_in_the_registry_of_fp8_experts():
    for name, function in (
        ("tma_moe", tma_moe.hf.tma_experts_forward),
        ("tma_moe_reference", tma_moe.hf.reference_experts_forward),
    ):
        assert ALL_FP8_EXPERTS_FUNCTIONS[name] is function


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"block_size": None}, "block_size=None"),
        ({"block_size": (64, 64)}, r"block_size=\(64, 64\); the kernel computes block_size=\(128, 128\)"),
        ({"activation_scheme": "static"}, "activation_scheme='static'"),
        ({"has_gate": False}, "has_gate=False"),
        ({"expert_dtype": "fp4"}, "gate_up_proj is torch.int8"),
        ({"swiglu_limit": 7.0}, "swiglu_limit=7.0"),
        ({"swiglu_alpha": 1.7}, "swiglu_alpha=1.7"),
    ],
)
def test_what_is_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        call(made(**changes))


def test_the_kernels_need_a_gpu():
    with pytest.raises(RuntimeError, match="a Hopper GPU is needed"):
        call(made(), "tma_moe", torch.bfloat16)
