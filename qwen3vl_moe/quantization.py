"""Which modules of a checkpoint are quantised: its ``quantization_config``, of which one kind is supported.

That kind is the block-scaled FP8 of the published ``-FP8`` checkpoints (``tma_moe.block_fp8``); transformers writes it
as ``FineGrainedFP8Config``.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from qwen3vl_moe.errors import ConfigError

# Every field that is understood, and what it has to be. Others may change what the numbers mean, and are refused.
_REQUIRED = {
    "quant_method": ("fp8",),
    "activation_scheme": ("dynamic",),
    "weight_block_size": ([128, 128],),
}
_IF_GIVEN = {
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", None),
    "expert_dtype": ("fp8", None),
    "modules_to_convert": (None, []),
    "dequantize": (False, None),
}
_LISTS = ("modules_to_not_convert", "ignored_layers")
# A checkpoint's patterns run as they are: with groups or many repetitions, one of them could search for ever.
_MOST_REPETITIONS = 3  # in a pattern
_MOST_REPEATING = 64  # patterns that have any
_WAY_OUT = "block-scaled FP8 as in Qwen/Qwen3-VL-30B-A3B-Instruct-FP8 is supported, and 16-bit checkpoints are"


@dataclass(frozen=True)
class Fp8Config:
    """Block-scaled FP8 for every linear layer of the decoder and its experts, but for the modules that are left out.

    Attributes:
        left_out: patterns of module names, as the checkpoint lists them.
    """

    left_out: tuple[str, ...] = ()

    def quantises(self, module: str) -> bool:
        """Whether a linear layer or experts of this name are quantised.

        A pattern leaves out what it equals up to a dot, as a name or as a regular expression, and what ends with it
        (``should_convert_module`` of transformers, read in 5.24).
        """
        return not (module.endswith(self.left_out) or any(each.match(module) for each in self._compiled))

    @functools.cached_property
    def _compiled(self) -> list[re.Pattern[str]]:
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return [re.compile(f"(?:{pattern}){boundary}") for pattern in self.left_out]


def parse_fp8(raw: Any, source: str) -> Fp8Config:
    """The meaning of a ``quantization_config``.

    Raises:
        ConfigError: it is malformed, or asks for something else than what is supported.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: a JSON object is needed, got {type(raw).__name__}")
    for key, allowed in (_REQUIRED | _IF_GIVEN).items():
        value = raw.get(key)
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise ConfigError(f"{source}: {key} is {value!r}; only {allowed[0]!r} is supported ({_WAY_OUT})")
    unknown = sorted(set(raw) - {*_REQUIRED, *_IF_GIVEN, *_LISTS})
    if unknown:
        raise ConfigError(f"{source}: {unknown[0]} is {raw[unknown[0]]!r}, which is not known here ({_WAY_OUT})")
    left_out: list[str] = []
    for key in _LISTS:
        names = raw.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"{source}: {key} is {names!r}; a list of module names is needed")
        for name in names:
            if re.search(r"[({]", name) or len(re.findall(r"[*+?]", name)) > _MOST_REPETITIONS:
                raise ConfigError(
                    f"{source}: {key} holds {name!r}; patterns may have no groups and at most {_MOST_REPETITIONS} of "
                    "* + ?: name the modules instead"
                )
            try:
                re.compile(name)
            except re.error as error:
                raise ConfigError(f"{source}: {key} holds {name!r}, which is no pattern ({error})") from None
        left_out += names
    repeating = sum(bool(re.search(r"[*+?]", name)) for name in left_out)
    if repeating > _MOST_REPEATING:
        raise ConfigError(
            f"{source}: {' and '.join(_LISTS)} hold {repeating} patterns with * + or ?, more than {_MOST_REPEATING}: "
            "name the modules instead"
        )
    return Fp8Config(tuple(dict.fromkeys(left_out)))


def layers_in_fp8(fp8: Fp8Config, num_layers: int, source: str) -> tuple[frozenset[int], frozenset[int]]:
    """Numbers of the decoder layers whose attention, and of those whose experts, are quantised.

    Raises:
        ConfigError: a layer's four attention products are not all of one kind.
    """
    attention, experts = set(), set()
    for number in range(num_layers):
        layer = f"model.language_model.layers.{number}"
        products = [f"{layer}.self_attn.{name}_proj" for name in "qkvo"]
        quantised = [name for name in products if fp8.quantises(name)]
        if quantised and quantised != products:
            rest = next(name for name in products if name not in quantised)
            raise ConfigError(
                f"{source}: {rest} is left out and {quantised[0]} is not; q, k, v and o of a layer have to be of one "
                "kind here: leave out all four or none"
            )
        if quantised:
            attention.add(number)
        if fp8.quantises(f"{layer}.mlp.experts"):
            experts.add(number)
    return frozenset(attention), frozenset(experts)
