"""The fused MoE as an experts implementation of transformers.

    import tma_moe.hf                                   # registers the three names below
    model.set_experts_implementation("tma_moe")         # the Hopper kernels
    model.set_experts_implementation("tma_moe_triton")  # those for every CUDA GPU from compute capability 8.0 on
    model.set_experts_implementation("tma_moe_reference")  # the same op in plain torch, on any device

Works with every transformers 5 model whose experts are the standard fused module (Qwen3-VL-MoE, Qwen3-MoE,
Mixtral, ...): `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`, SiLU, gate rows before up rows, and nothing else: no
biases, norms, limits. A module with anything that is not known here is refused by that thing's name, never computed
wrongly; the test tries every experts class of the installed transformers. Experts in block-scaled FP8
(`FineGrainedFP8Config`) are served, too (hf_fp8.py). Inference only.

The parameters are shared with the model, not copied. The module contract and the registry are those of
`transformers.integrations.moe` (`use_experts_implementation`, `ALL_EXPERTS_FUNCTIONS`), read in transformers 5.17.
"""

import functools
import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import tma_moe
from tma_moe.hf_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, fp8_unsupported, is_fp8

try:
    from transformers.activations import ACT2FN
    from transformers.integrations import moe as hf_moe
except ImportError as error:
    raise ImportError(
        "tma_moe.hf needs transformers >= 5.17, whose experts registry it extends: pip install 'transformers>=5.17'"
    ) from error

BACKENDS = {"tma_moe": "tma", "tma_moe_triton": "triton", "tma_moe_reference": "reference"}
_SILU_TYPES = (nn.SiLU, type(ACT2FN["silu"]))
# What the decorator of transformers says of a class: the value that the kernel computes, and why no other will do.
_FLAGS = {
    "is_transposed": (
        False,
        "its weights are transposed (is_transposed=True, [E, H, 2I]); the kernel reads [E, 2I, H]",
    ),
    "is_concatenated": (
        True,
        "gate and up rows are interleaved (is_concatenated=False); the kernel reads all gate rows, then all up rows",
    ),
    "has_bias": (False, "it has biases (has_bias=True)"),
    "has_gate": (True, "it has no gate (has_gate=False); the kernel computes silu(gate) * up"),
    "has_post_expert_norm": (False, "it norms each expert's output (has_post_expert_norm=True), which no kernel does"),
    "_is_expert_parallel": (False, "expert parallelism (_is_expert_parallel=True) is not supported"),
}
# Names of sizes and settings that say nothing beyond the parameters' shapes. Others, such as a limit to clamp at, may.
# accelerate wraps `forward` where it spreads a model over devices.
_ATTRIBUTES = {
    *_FLAGS, "act_fn", "config", "forward", "training", "num_experts", "hidden_dim", "hidden_size", "intermediate_dim",
    "intermediate_size",
}  # fmt: skip
_EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# One ExpertWeights per experts module, gone with the module: neither its keys nor its values keep a model alive. The
# values hold the module's own Parameter objects, so `module.to()` and in-place loading need no bookkeeping here.
_weights_of: weakref.WeakKeyDictionary[nn.Module, tma_moe.ExpertWeights] = weakref.WeakKeyDictionary()


def register() -> None:
    """Adds the names to transformers' experts implementations. Done on import; doing it again changes nothing."""
    registry: Any
    for registry in (hf_moe.ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        if registry is not None:
            registry.register("tma_moe", tma_experts_forward)
            registry.register("tma_moe_triton", portable_experts_forward)
            registry.register("tma_moe_reference", reference_experts_forward)


def tma_experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of one experts module by the Hopper kernels; see `experts_forward`."""
    return experts_forward(module, hidden_states, top_k_index, top_k_weights, "tma_moe")  # pyright: ignore


def portable_experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of one experts module by the portable kernels; see `experts_forward`."""
    return experts_forward(module, hidden_states, top_k_index, top_k_weights, "tma_moe_triton")  # pyright: ignore


def reference_experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of one experts module in plain torch, on any device; see `experts_forward`."""
    return experts_forward(module, hidden_states, top_k_index, top_k_weights, "tma_moe_reference")  # pyright: ignore


# The op launches its own kernels and keeps host-side state (descriptors): nothing that dynamo could trace.
@torch.compiler.disable
def experts_forward(
    module: nn.Module, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, implementation: str
) -> Tensor:
    """Computes one transformers experts module with `tma_moe.fused_moe`.

    Args:
        module: a standard experts module (see the module docstring).
        hidden_TH: `[T, H]` activations. Cast to the dtype of the weights (if not FP8) where autocast made them differ.
        topk_ids_TK: `[T, K]` int64 or int32 expert ids from the router.
        topk_weights_TK: `[T, K]` routing weights, any floating dtype (combined in float32).
        implementation: a key of `BACKENDS`.

    Returns:
        `[T, H]` in the dtype of `hidden_TH`.

    Raises:
        RuntimeError: gradients are asked for, or the kernels cannot run on this device.
        ValueError: the module is not a standard experts module.
    """
    experts = _expert_weights(module, implementation, hidden_TH.dtype)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_TH, topk_weights_TK, *experts.parameters())):
        raise RuntimeError(
            f"experts implementation {implementation!r} is for inference and has no backward: call the model under "
            "torch.inference_mode() or torch.no_grad(), or train with model.set_experts_implementation('grouped_mm')"
        )
    dtype = hidden_TH.dtype if experts.gate_up.dtype == tma_moe.FP8 else experts.gate_up.dtype
    x_TH = hidden_TH.to(dtype).contiguous()
    if topk_weights_TK.dtype != x_TH.dtype:  # the op reads both dtypes: no conversion where the router gives either
        topk_weights_TK = topk_weights_TK.to(torch.float32)
    operands = x_TH, topk_ids_TK.contiguous(), topk_weights_TK.contiguous(), experts
    y_TH = tma_moe.fused_moe(*operands, backend=BACKENDS[implementation])
    assert isinstance(y_TH, Tensor)  # the sum over experts was not left open
    return y_TH.to(hidden_TH.dtype)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` is not a standard experts module, as one clause that names the attribute; None if it is one.

    What is not known to leave the result alone is refused: what a later transformers invents must not be skipped.
    """
    for flag, (standard, reason) in _FLAGS.items():
        if getattr(module, flag, standard) is not standard:
            return reason
    for flag, standard in _decorator_defaults().items():
        if flag not in _FLAGS and getattr(module, flag, standard) != standard:
            return f"it has {flag}={getattr(module, flag)!r}, which the kernel does not know"
    parameters, buffers = (dict(named(recurse=False)) for named in (module.named_parameters, module.named_buffers))
    if is_fp8(module):
        problem = fp8_unsupported(module, {*_ATTRIBUTES, *_decorator_defaults()})
        return problem or _unsupported_gate_and_shapes(module, parameters)
    for name in ("gate_up_proj", "down_proj"):
        if name not in parameters:
            return f"it has no parameter {name}"
        # Tensor and expert parallelism hold DTensors, swapped for plain local tensors during the forward.
        if type(parameters[name]) is not nn.Parameter:
            kind = type(parameters[name]).__name__
            return f"its {name} is a {kind}, not a plain Parameter: sharded or quantised experts are not supported"
    more = sorted(parameters.keys() - {"gate_up_proj", "down_proj"})
    if biases := [name for name in more if "bias" in name]:
        return f"it has biases ({', '.join(biases)})"
    gate = getattr(type(module), "_apply_gate", hf_moe._default_apply_gate)
    if gate is not hf_moe._default_apply_gate or "_apply_gate" in vars(module):
        return f"{type(module).__name__}._apply_gate is its own gate function; the kernel computes silu(gate) * up"
    children = sorted(name for name, _ in module.named_children() if name != "act_fn")
    known = _ATTRIBUTES | _decorator_defaults().keys()
    attributes = sorted(name for name in vars(module) if not name.startswith("_") and name not in known)
    for kind, names in (("parameter", more), ("buffer", sorted(buffers)), ("part", children), ("setting", attributes)):
        if names:
            return f"it has the {kind} {names[0]}, which the kernel does not know"
    return _unsupported_gate_and_shapes(module, parameters)


def _unsupported_gate_and_shapes(module: nn.Module, parameters: Mapping[str, Tensor]) -> str | None:
    activation = getattr(module, "act_fn", None)
    if not (type(activation) in _SILU_TYPES or activation is nn.functional.silu):
        name = type(activation).__name__ if isinstance(activation, nn.Module) else getattr(activation, "__name__", None)
        return f"its activation act_fn is {name}, not SiLU"
    return _unsupported_shapes(module, parameters["gate_up_proj"], parameters["down_proj"])


@functools.cache
def _decorator_defaults() -> dict[str, Any]:
    """Every flag that the installed transformers may set on an experts class, and its value where none is named."""
    parameters = inspect.signature(hf_moe.use_experts_implementation).parameters
    return {name: p.default for name, p in parameters.items() if name not in ("experts_class", "experts_interface")}


def _unsupported_shapes(module: nn.Module, gate_up: Tensor, down: Tensor) -> str | None:
    shapes = f"gate_up_proj {tuple(gate_up.shape)}, down_proj {tuple(down.shape)}"
    if gate_up.dim() != 3 or gate_up.shape != (down.shape[0], 2 * down.shape[-1], down.shape[-2]):
        return f"its shapes do not fit [E, 2I, H] and [E, H, I]: {shapes}"
    # An expert-parallel rank holds E / ranks experts, and its router marks the others' slots with the id E / ranks.
    config = getattr(module, "config", None)
    totals = {name: getattr(config, name, None) for name in _EXPERT_COUNT_NAMES}
    held = gate_up.shape[0]
    for name, total in totals.items():
        if isinstance(total, int) and total != held:
            return (
                f"it holds {held} of the model's {total} experts (config.{name}): expert parallelism is not supported"
            )
    return None


def _expert_weights(module: nn.Module, implementation: str, hidden_dtype: torch.dtype) -> tma_moe.ExpertWeights:
    """The `ExpertWeights` that shares the module's parameters, made at the first call and when one was re-bound."""
    experts = _weights_of.get(module)
    bound = module._parameters
    if experts is None or experts.gate_up is not bound["gate_up_proj"] or experts.down is not bound["down_proj"]:
        reason = unsupported(module)
        if reason is not None:
            raise ValueError(
                f"experts implementation {implementation!r} cannot run {type(module).__name__}: {reason}. "
                "Use model.set_experts_implementation('grouped_mm') for this model"
            )
        gate_up, down = bound["gate_up_proj"], bound["down_proj"]
        assert gate_up is not None
        assert down is not None
        num_experts, hidden_size, expert_width = down.shape
        experts = tma_moe.ExpertWeights(num_experts, hidden_size, expert_width, device="meta", dtype=down.dtype)
        experts.gate_up, experts.down = gate_up, down  # the very same Parameter objects: no copy, no second storage
        if is_fp8(module):
            experts.gate_up_scale, experts.down_scale = bound["gate_up_proj_scale_inv"], bound["down_proj_scale_inv"]
        _weights_of[module] = experts
    if BACKENDS[implementation] != "reference":
        weights = experts.down.dtype
        dtype = hidden_dtype if weights == tma_moe.FP8 else weights
        _check_available(implementation, experts.down.device, dtype, weights)
    return experts


@functools.cache  # asked once per layer and step; an exception is not cached
def _check_available(implementation: str, device: torch.device, dtype: torch.dtype, weights: torch.dtype) -> None:
    reason = tma_moe.unavailable(device, dtype, weights=weights, backend=BACKENDS[implementation])
    if reason is not None:
        raise RuntimeError(
            f"experts implementation {implementation!r} cannot run here: {reason}. "
            "model.set_experts_implementation('tma_moe_reference') computes the same in plain torch, slowly"
        )


register()
