"""tma_moe as an experts implementation of transformers: equal to transformers' own, shared memory, clear refusals."""

import copy
import functools
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import tma_moe
import tma_moe.hf
from tests.interpreted import INTERPRETED, run_in_interpreter

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
HOPPER = pytest.mark.skipif(
    tma_moe.unavailable(torch.device("cuda"), torch.bfloat16) is not None, reason="needs a Hopper GPU"
)


def qwen3_moe() -> nn.Module:
    config = Qwen3MoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=3
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral() -> nn.Module:
    config = MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3_vl_moe() -> nn.Module:
    text = {**COMMON, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def build(make, device="cpu", dtype=torch.float32) -> nn.Module:
    """A random model whose routers are not zero: transformers leaves some at their initial value."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(device, dtype)


def experts_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "gate_up_proj")]


@torch.no_grad()
def logits(model: nn.Module, implementation: str) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    device = next(model.parameters()).device
    input_ids = torch.arange(1, 27, device=device).view(2, 13)
    return model(input_ids=input_ids).logits


@pytest.mark.parametrize("make", [qwen3_vl_moe, qwen3_moe, mixtral])
def test_logits_equal_eager(make):
    model = build(make)
    expected = logits(model, "eager")
    # Both are float32; only the order of the sums differs. A wrong expert or weight moves logits by their own size.
    torch.testing.assert_close(
        logits(model, "tma_moe_reference"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max()
    )
    assert len(experts_modules(model)) == 2
    assert all(module in tma_moe.hf._weights_of for module in experts_modules(model)), "the op was not called"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_working_precision_is_as_exact_as_eager(dtype):
    model = build(qwen3_moe)
    module = experts_modules(model)[0]
    x_TH = torch.randn(9, 32)
    topk_ids_TK = torch.stack([torch.randperm(6)[:3] for _ in range(9)])
    topk_weights_TK = torch.rand(9, 3).to(dtype)
    with torch.no_grad():
        module.to(dtype)
        args = (x_TH.to(dtype), topk_ids_TK, topk_weights_TK)
        model.set_experts_implementation("eager")
        eager = module(*args)
        model.set_experts_implementation("tma_moe_reference")
        ours = module(*args)
        exact = module.float()(args[0].float(), topk_ids_TK, topk_weights_TK.float())
    assert ours.dtype == dtype
    assert (ours.float() - exact).norm() <= 2 * (eager.float() - exact).norm()


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tma_is_as_exact_as_eager(dtype):
    module = wide_experts(dtype)
    x_TH = torch.randn(77, 256, device="cuda", dtype=dtype)
    topk_ids_TK = torch.rand(77, 8, device="cuda").topk(4).indices
    topk_weights_TK = torch.rand(77, 4, device="cuda").to(dtype)
    with torch.inference_mode():
        out = {}
        for name in ("eager", "tma_moe"):
            module.config._experts_implementation = name
            out[name] = module(x_TH, topk_ids_TK, topk_weights_TK).float()
        module.config._experts_implementation = "eager"
        exact = module.float()(x_TH.float(), topk_ids_TK, topk_weights_TK.float())
    assert (out["tma_moe"] - exact).norm() <= 2 * (out["eager"] - exact).norm()


def wide_experts(dtype: torch.dtype) -> nn.Module:
    """One experts module on the GPU, wide enough for the kernels' tiles."""
    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=4)
    config._experts_implementation = "eager"
    module = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module.to("cuda", dtype)


@pytest.mark.skipif(INTERPRETED, reason="this process runs the kernels itself")
def test_kernels_through_transformers_in_the_interpreter():
    run_in_interpreter(f"{__file__}::test_interpreted_kernels_equal_eager", at_least=2)


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
@pytest.mark.parametrize("num_tokens", [3, 9])  # both sides of the decode kernels' limit
def test_interpreted_kernels_equal_eager(num_tokens):
    model = build(qwen3_moe)
    module = experts_modules(model)[0]
    args = torch.randn(num_tokens, 32), torch.rand(num_tokens, 6).topk(3).indices, torch.rand(num_tokens, 3)
    outputs = {}
    for name in ("eager", "tma_moe"):
        model.set_experts_implementation(name)
        with torch.no_grad():
            outputs[name] = module(*args)
    torch.testing.assert_close(
        outputs["tma_moe"], outputs["eager"], rtol=1e-5, atol=1e-5 * outputs["eager"].abs().max()
    )


def test_autocast_like_inputs_are_cast_to_the_weights():
    model = build(qwen3_moe, dtype=torch.bfloat16)
    module = experts_modules(model)[0]
    model.set_experts_implementation("tma_moe_reference")
    x_TH, ids_TK, weights_TK = torch.randn(4, 32), torch.tensor([[0, 1, 2]] * 4), torch.rand(4, 3)
    with torch.no_grad():
        out = module(x_TH, ids_TK, weights_TK)
        expected = module(x_TH.bfloat16(), ids_TK, weights_TK)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())


def test_parameters_are_shared_not_copied():
    model = build(qwen3_moe)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    logits(model, "tma_moe_reference")
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    for module in experts_modules(model):
        experts = tma_moe.hf._weights_of[module]
        assert experts.gate_up is module.gate_up_proj
        assert experts.down is module.down_proj
    assert model.state_dict().keys() == build(qwen3_moe).state_dict().keys()


def test_new_values_and_rebound_parameters_are_seen():
    model = build(qwen3_moe)
    first = logits(model, "tma_moe_reference")
    with torch.no_grad():
        for module in experts_modules(model):
            module.down_proj.mul_(2)  # in place
            module.gate_up_proj.data = module.gate_up_proj.data * 0.5  # other storage, same parameter
    second = logits(model, "tma_moe_reference")
    torch.testing.assert_close(second, logits(model, "eager"), rtol=1e-5, atol=1e-4)
    for module in experts_modules(model):
        module.down_proj = nn.Parameter(torch.randn_like(module.down_proj))  # another parameter
    third = logits(model, "tma_moe_reference")
    torch.testing.assert_close(third, logits(model, "eager"), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)
    model.to(torch.bfloat16)
    assert logits(model, "tma_moe_reference").dtype == torch.bfloat16


def test_a_dropped_model_is_freed():
    model = build(qwen3_moe)
    logits(model, "tma_moe_reference")
    held = len(tma_moe.hf._weights_of)
    alive = weakref.ref(experts_modules(model)[0].down_proj)
    del model
    gc.collect()
    assert alive() is None, "the adapter keeps the weights alive"
    assert len(tma_moe.hf._weights_of) <= held - 2


def test_copies_of_a_model_do_not_share():
    model = build(qwen3_moe)
    expected = logits(model, "tma_moe_reference")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in experts_modules(other):
            module.down_proj.zero_()
    assert not torch.allclose(logits(other, "tma_moe_reference"), expected)
    assert torch.equal(logits(model, "tma_moe_reference"), expected)


def test_gradients_are_refused():
    model = build(qwen3_moe)
    model.set_experts_implementation("tma_moe_reference")
    with pytest.raises(RuntimeError, match=r"no backward.*torch\.inference_mode\(\)"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    model.requires_grad_(False)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs them")
def test_the_kernels_are_refused_where_they_cannot_run():
    model = build(qwen3_moe)
    with pytest.raises(RuntimeError, match=r"'tma_moe' cannot run here: .*tma_moe_reference") as caught:
        logits(model, "tma_moe")
    assert tma_moe.unavailable(torch.device("cpu"), torch.float32) in str(caught.value)


def test_registering_twice_is_harmless():
    tma_moe.hf.register()
    names = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.valid_keys()
    assert {"tma_moe", "tma_moe_reference"} <= set(names)


def gelu_experts(module):
    module.act_fn = nn.GELU()


def biased_experts(module):
    module.gate_up_proj_bias = nn.Parameter(torch.zeros(6, 32))


def expert_parallel(module):
    module.num_experts = 3
    module.gate_up_proj, module.down_proj = (nn.Parameter(p[:3]) for p in (module.gate_up_proj, module.down_proj))


def sharded(module):
    local = module.gate_up_proj.detach()
    module._parameters["gate_up_proj"] = local  # what transformers does inside a tensor-parallel forward


def odd_shapes(module):
    module.down_proj = nn.Parameter(torch.zeros(6, 32, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gelu_experts, "activation act_fn is GELU, not SiLU"),
        (biased_experts, r"has biases \(gate_up_proj_bias\)"),
        (lambda module: setattr(module, "is_transposed", True), "weights are transposed"),
        (lambda module: setattr(module, "is_concatenated", False), "gate and up rows are interleaved"),
        (lambda module: setattr(module, "has_gate", False), "no gate"),
        (expert_parallel, r"holds 3 of the model's 6 experts \(config.num_experts\)"),
        (sharded, "gate_up_proj is a Tensor, not a plain Parameter"),
        (lambda module: setattr(module, "has_post_expert_norm", True), "norms each expert's output"),
        (lambda module: setattr(module, "_is_expert_parallel", True), "_is_expert_parallel=True"),
        (lambda module: setattr(module, "limit", 7.0), "has the setting limit"),
        (lambda module: setattr(module, "norm", nn.RMSNorm(32)), "has the part norm"),
        (lambda module: module.register_buffer("scale", torch.ones(6)), "has the buffer scale"),
        (lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(6))), "has the parameter scale"),
        (odd_shapes, r"gate_up_proj \(6, 32, 32\), down_proj \(6, 32, 24\)"),
    ],
)
def test_modules_that_are_not_standard_are_refused_by_name(change, message):
    model = build(qwen3_moe)
    change(experts_modules(model)[0])
    with pytest.raises(ValueError, match=f"Qwen3MoeExperts.*{message}.*grouped_mm"):
        logits(model, "tma_moe_reference")


def test_a_wrapped_forward_is_no_setting():
    """As accelerate leaves it where it spreads a model over devices."""
    model = build(qwen3_moe)
    expected = logits(model, "eager")
    for module in experts_modules(model):
        module._hf_hook, module.forward = object(), functools.partial(type(module).forward, module)
    torch.testing.assert_close(logits(model, "tma_moe_reference"), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [False, True])
def test_a_flag_of_a_later_transformers(monkeypatch, value):
    """At its default it changes nothing; at another value it may."""

    def decorator(experts_class=None, *, experts_interface=None, is_transposed=False, has_a_twist=False):
        raise NotImplementedError

    monkeypatch.setattr(tma_moe.hf.hf_moe, "use_experts_implementation", decorator)
    tma_moe.hf._decorator_defaults.cache_clear()
    module = experts_modules(build(qwen3_moe))[0]
    module.has_a_twist = value
    refusal = tma_moe.hf.unsupported(module)
    tma_moe.hf._decorator_defaults.cache_clear()
    assert refusal == ("it has has_a_twist=True, which the kernel does not know" if value else None)


def test_gpt_oss_is_refused():
    config = GptOssConfig(**COMMON, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.GptOssForCausalLM(config).eval()
    with pytest.raises(ValueError, match="GptOssExperts: its weights are transposed"):
        logits(model, "tma_moe_reference")


def test_a_module_with_its_own_gate_is_refused():
    model = build(qwen3_moe)
    module = experts_modules(model)[0]

    class ClampedExperts(type(module)):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, dim=-1)[0].clamp(max=7)

    module.__class__ = ClampedExperts
    with pytest.raises(ValueError, match=r"ClampedExperts\._apply_gate is its own gate function"):
        logits(model, "tma_moe_reference")
