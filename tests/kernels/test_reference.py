"""The plain-torch reference against transformers, and `ExpertWeights`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tma_moe
from tma_moe.reference import fused_moe_reference


def random_experts(E: int, H: int, I: int, dtype: torch.dtype = torch.float32) -> tma_moe.ExpertWeights:  # noqa: E741
    experts = tma_moe.ExpertWeights(E, H, I, dtype=dtype)
    experts.gate_up.data.normal_(std=H**-0.5)
    experts.down.data.normal_(std=I**-0.5)
    return experts


def transformers_experts(experts: tma_moe.ExpertWeights, k: int) -> nn.Module:
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    config = Qwen3VLMoeTextConfig(
        num_experts=experts.num_experts,
        hidden_size=experts.hidden_size,
        moe_intermediate_size=experts.intermediate_size,
        num_experts_per_tok=k,
    )
    config._experts_implementation = "eager"
    module = Qwen3VLMoeTextExperts(config)
    module.gate_up_proj = experts.gate_up
    module.down_proj = experts.down
    return module


@pytest.mark.parametrize(("E", "k", "H", "I"), [(8, 2, 32, 24), (5, 5, 16, 40), (7, 1, 24, 8)])
def test_experts_equal_transformers(E, k, H, I):  # noqa: E741
    torch.manual_seed(0)
    experts = random_experts(E, H, I)
    x_TH, logits_TE = torch.randn(11, H), torch.randn(11, E)
    ids_TK, weights_TK = tma_moe.route(logits_TE, k, backend="reference")
    expected = transformers_experts(experts, k)(x_TH, ids_TK.long(), weights_TK)
    y_TH = tma_moe.fused_moe(x_TH, ids_TK, weights_TK, experts, backend="reference")
    torch.testing.assert_close(y_TH, expected, rtol=0, atol=0)


def test_route_equals_transformers():
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextTopKRouter

    torch.manual_seed(0)
    router = Qwen3VLMoeTextTopKRouter(Qwen3VLMoeTextConfig(num_experts=12, hidden_size=16, num_experts_per_tok=3))
    nn.init.normal_(router.weight)
    logits_TE, expected_weights, expected_ids = router(torch.randn(9, 16))
    ids_TK, weights_TK = tma_moe.route(logits_TE, 3, backend="reference")
    assert ids_TK.dtype == torch.int32
    assert weights_TK.dtype == torch.float32
    assert torch.equal(ids_TK.long(), expected_ids)
    torch.testing.assert_close(weights_TK, expected_weights, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_is_in_float32_whatever_the_logits_are(dtype):
    """A softmax in the working dtype would round the weights, and let experts tie that differ."""
    logits_TE = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids_TK, weights_TK = tma_moe.route(logits_TE, 8, backend="reference")
    exact_TE = logits_TE.double().softmax(-1)
    torch.testing.assert_close(exact_TE.gather(1, ids_TK.long()), exact_TE.topk(8).values, rtol=0, atol=0)
    exact_TK = exact_TE.gather(1, ids_TK.long())
    exact_TK /= exact_TK.sum(-1, keepdim=True)
    assert (weights_TK - exact_TK).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_ids_outside_the_experts_contribute_nothing():
    torch.manual_seed(0)
    experts = random_experts(4, 16, 8)
    x_TH, weights = torch.randn(3, 16), torch.rand(3, 2)
    some = tma_moe.fused_moe(x_TH, torch.tensor([[0, 4], [-1, 2], [9, 4]]), weights, experts, backend="reference")
    weights = weights * torch.tensor([[1, 0], [0, 1], [0, 0]])
    torch.testing.assert_close(
        some, tma_moe.fused_moe(x_TH, torch.tensor([[0, 1], [1, 2], [0, 1]]), weights, experts, backend="reference")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skipped_tokens_go_to_no_expert(dtype):
    """Their ids are -1; the others' ids and all weights are as without, and fused_moe leaves them at zero."""
    experts = random_experts(6, 16, 8, dtype)
    logits_TE, x_TH = torch.randn(7, 6).to(dtype), torch.randn(7, 16).to(dtype)
    skip_T = torch.tensor([False, True, False, False, True, True, False])
    all_ids, all_weights = tma_moe.route(logits_TE, 2, backend="reference")
    ids_TK, weights_TK = tma_moe.route(logits_TE, 2, skip_T=skip_T, backend="reference")
    assert ids_TK.dtype == torch.int32
    assert (ids_TK[skip_T] == -1).all()
    assert torch.equal(ids_TK[~skip_T], all_ids[~skip_T])
    assert torch.equal(weights_TK, all_weights)
    whole = tma_moe.fused_moe(x_TH, all_ids, all_weights, experts, backend="reference")
    assert (whole != 0).any(dim=1).all()
    x_TH[skip_T] = float("nan")  # what pads a batch may hold anything
    y_TH = tma_moe.fused_moe(x_TH, ids_TK, weights_TK, experts, backend="reference")
    assert (y_TH[skip_T] == 0).all()
    # Fewer rows an expert: a product may round them in another order.
    torch.testing.assert_close(y_TH[~skip_T], whole[~skip_T])
    assert torch.equal(tma_moe.route(logits_TE, 2, skip_T=torch.zeros(7).bool(), backend="reference")[0], all_ids)


def test_both_layouts_give_the_same_experts():
    torch.manual_seed(0)
    gate_up, down = torch.randn(3, 20, 8), torch.randn(3, 8, 10)
    taken = tma_moe.ExpertWeights.from_checkpoint(gate_up, down, "transformers5")
    assert taken.gate_up.data_ptr() == gate_up.data_ptr()
    assert taken.down.data_ptr() == down.data_ptr()
    published = tma_moe.ExpertWeights.from_checkpoint(
        gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous(), "published"
    )
    assert torch.equal(published.gate_up, gate_up)
    assert torch.equal(published.down, down)
    assert published.gate_up.is_contiguous()
    assert not published.gate_up.requires_grad


@pytest.mark.parametrize(
    ("gate_up", "down", "layout", "message"),
    [
        ((3, 8, 20), (3, 10, 8), "transformers5", "do not belong together"),
        ((3, 20, 8), (3, 8, 10), "published", "do not belong together"),
        ((3, 20, 8), (3, 8, 10), "guess", "unknown layout 'guess'"),
        ((20, 8), (8, 10), "published", "3 dimensions"),
    ],
)
def test_wrong_checkpoint_tensors(gate_up, down, layout, message):
    with pytest.raises(ValueError, match=message):
        tma_moe.ExpertWeights.from_checkpoint(torch.empty(gate_up), torch.empty(down), layout)


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"float16.*float32.*both must be the same"):
        tma_moe.ExpertWeights.from_checkpoint(torch.empty(1, 4, 8).half(), torch.empty(1, 8, 2), "transformers5")


def test_experts_module_is_an_ordinary_module():
    with torch.device("meta"):
        experts = tma_moe.ExpertWeights(4, 16, 8, dtype=torch.bfloat16)
    assert experts.gate_up.is_meta
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "gate_up": (4, 16, 16),
        "down": (4, 16, 8),
    }
    assert list(experts.state_dict()) == ["gate_up", "down"]
    made = random_experts(2, 8, 8)
    made.descriptors["anything"] = object()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.descriptors == {}
        assert torch.equal(other.down, made.down)
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        tma_moe.ExpertWeights(4, 0, 8)


def test_weighted_sum_is_taken_in_float32():
    # 256 equal contributions of 1/256 of the output: a bf16 running sum stalls long before the last one.
    experts = random_experts(256, 8, 8, torch.bfloat16)
    experts.gate_up.data[:] = experts.gate_up.data[0]
    experts.down.data[:] = experts.down.data[0]
    x_TH = torch.randn(1, 8).bfloat16()
    ids = torch.arange(256)[None]
    one = fused_moe_reference(x_TH, ids[:, :1], torch.ones(1, 1), experts.gate_up, experts.down)
    mean = fused_moe_reference(x_TH, ids, torch.full((1, 256), 1 / 256), experts.gate_up, experts.down)
    torch.testing.assert_close(mean, one, rtol=0, atol=0)
