"""The block-scaled FP8 experts of transformers, as an addition to hf.py, which imports this.

transformers keeps a registry of its own for them (`ALL_FP8_EXPERTS_FUNCTIONS` in
`transformers.integrations.finegrained_fp8`, read in 5.24); where there is none, nothing is added.
"""

from typing import Any

from torch import nn

from tma_moe.block_fp8 import BLOCK, FP8, scale_shape

try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
except ImportError:
    ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts = None, None

_NAMES = {"gate_up_proj": "gate_up_proj_scale_inv", "down_proj": "down_proj_scale_inv"}
# What a module may be told, and the value that the kernel computes.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "has_bias": (False,),
    "has_gate": (True,),
    "activation_scheme": ("dynamic",),
    "block_size": ((BLOCK, BLOCK), [BLOCK, BLOCK]),
    "swiglu_alpha": (None,),
    "swiglu_limit": (None,),
    "limit": (None,),
    "gate_softcap": (None,),
    "up_softcap": (None,),
}


def is_fp8(module: nn.Module) -> bool:
    """Whether this is transformers' module for FP8 experts."""
    return FP8Experts is not None and isinstance(module, FP8Experts)


def fp8_unsupported(module: nn.Module, known: set[str]) -> str | None:
    """Why a module for FP8 experts cannot be run, as one clause that names the attribute; None if it can.

    Args:
        known: attributes that say nothing beyond the parameters' shapes.
    """
    for name, standard in _SETTINGS.items():
        if getattr(module, name, standard[0]) not in standard:
            return f"it has {name}={getattr(module, name)!r}; the kernel computes {name}={standard[0]!r}"
    parameters = dict(module.named_parameters(recurse=False))
    needed = {*_NAMES, *_NAMES.values()}
    for name in sorted(needed - parameters.keys()):
        return f"it has no parameter {name}"
    for name in sorted(parameters.keys() - needed):
        return f"it has the parameter {name}, which the kernel does not know"
    for name, scale_name in _NAMES.items():
        weight, scale = parameters[name], parameters[scale_name]
        if type(weight) is not nn.Parameter or type(scale) is not nn.Parameter:
            return f"its {name} is a {type(weight).__name__}, not a plain Parameter: sharded experts are not supported"
        if weight.dtype != FP8 or scale.dtype.itemsize != 4 or not scale.is_floating_point():
            return f"its {name} is {weight.dtype} with scales of {scale.dtype}; {FP8} with torch.float32 is needed"
        if scale.shape != scale_shape(weight.shape):
            return f"its {scale_name} is {list(scale.shape)}; {list(scale_shape(weight.shape))} is needed"
    if FP8Experts is not None and getattr(type(module), "_apply_gate", None) is not FP8Experts._apply_gate:
        return f"{type(module).__name__}._apply_gate is its own gate function; the kernel computes silu(gate) * up"
    more = sorted(name for name in vars(module) if not name.startswith("_") and name not in {*_SETTINGS, *known})
    return f"it has the setting {more[0]}, which the kernel does not know" if more else None
