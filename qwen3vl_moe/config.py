"""config.json as frozen dataclasses: the only place that knows how checkpoints spell their sizes.

Two spellings are read: the published checkpoints' (``num_experts``, ``rope_theta`` + ``rope_scaling``, vision
``model_type: qwen3_vl_moe``) and the one that transformers 5 writes (``num_local_experts``, ``rope_parameters``,
``qwen3_vl_moe_vision``). Every value that changes the computation and that the model does not implement is refused by
name, so that a checkpoint either runs exactly or not at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwen3vl_moe.errors import ConfigError
from qwen3vl_moe.json_files import read_json_object
from qwen3vl_moe.quantization import layers_in_fp8, parse_fp8

# The largest sizes that are believed. The loader writes names and shapes out for all layers before it compares them
# with the files, so a size far above every model ever trained is refused here. No product of these exceeds 64 bits.
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "head_dim"), 1 << 12),
    **dict.fromkeys(("hidden_size", "out_hidden_size"), 1 << 18),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "num_position_embeddings"), 1 << 20),
    **dict.fromkeys(("num_experts", "num_local_experts"), 1 << 14),
    "num_experts_per_tok": 1 << 10,
    "vocab_size": 1 << 24,
    "patch_size": 1 << 8,
    "temporal_patch_size": 1 << 5,
    "spatial_merge_size": 1 << 4,
}
_MOST_ELSEWHERE = (1 << 31) - 1  # token ids and positions are 32-bit integers here and there
# Outside of these, float32 loses what the number is for: an eps that rounds to 0, frequencies that are all the same.
_RANGES = {"rope_theta": (1.0, 1e12), "rms_norm_eps": (1e-20, 1e-1)}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower (checkpoint: ``vision_config``).

    ``patch_size`` is in pixels, ``temporal_patch_size`` in frames, ``merge_size`` in patches; widths are in channels.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_hidden_size: int
    num_positions: int
    deepstack_indexes: tuple[int, ...]
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def grid_side(self) -> int:
        """Side of the square grid of learned position embeddings."""
        return math.isqrt(self.num_positions)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merged_width(self) -> int:
        """Width of merge_size x merge_size neighbouring patches side by side."""
        return self.hidden_size * self.merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the decoder (checkpoint: ``text_config``).

    ``fp8_attention`` and ``fp8_experts`` are the numbers of the layers whose attention products, or experts, are in
    block-scaled FP8.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_width: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int
    fp8_attention: frozenset[int] = frozenset()
    fp8_experts: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Qwen3VLMoeConfig:
    """A whole model: both towers and the token ids that tie them together.

    ``dtype`` is the one that the checkpoint declares for its weights.
    """

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Qwen3VLMoeConfig:
        """Read ``directory/config.json``.

        Raises:
            ConfigError: the file is missing, is no JSON object, or names something that is not supported.
        """
        path = Path(directory) / "config.json"
        if not path.exists():
            raise ConfigError(f"{path} is missing: a checkpoint directory needs its config.json")
        raw = read_json_object(path, ConfigError)
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config") -> Qwen3VLMoeConfig:
        """Parse the content of a config.json.

        Args:
            raw: the parsed JSON object, in either spelling.
            source: what error messages call it.

        Raises:
            ConfigError: a field is missing, malformed, or asks for something that is not supported.
        """
        top = _Fields(raw, source)
        top.require("model_type", "qwen3_vl_moe", hint="only Qwen3-VL-MoE checkpoints can be loaded")
        top.require("tie_word_embeddings", False, default=False)
        text_fields, vision_fields = top.section("text_config"), top.section("vision_config")
        text, vision = _parse_text(text_fields), _parse_vision(vision_fields)
        text = _with_fp8(text, top, text_fields, vision_fields)
        config = cls(
            text=text,
            vision=vision,
            image_token_id=top.integer("image_token_id", minimum=0),
            video_token_id=top.integer("video_token_id", minimum=0),
            vision_start_token_id=top.integer("vision_start_token_id", minimum=0),
            vision_end_token_id=top.integer("vision_end_token_id", minimum=0),
            dtype=_parse_dtype(top, text_fields),
        )
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if getattr(config, name) >= text.vocab_size:
                raise ConfigError(f"{source}: {name} is {getattr(config, name)}, outside vocab_size {text.vocab_size}")
        if vision.out_hidden_size != text.hidden_size:
            raise ConfigError(
                f"{source}: vision_config.out_hidden_size is {vision.out_hidden_size}, but text_config.hidden_size is "
                f"{text.hidden_size}: image tokens could not be put among text tokens"
            )
        if len(vision.deepstack_indexes) > text.num_layers:
            raise ConfigError(
                f"{source}: {len(vision.deepstack_indexes)} deepstack_visual_indexes need as many decoder layers, "
                f"but num_hidden_layers is {text.num_layers}"
            )
        return config

    @classmethod
    def qwen3_vl_30b_a3b(cls) -> Qwen3VLMoeConfig:
        """The published Qwen3-VL-30B-A3B (Instruct and Thinking share these sizes)."""
        return cls(
            text=TextConfig(
                vocab_size=151936,
                hidden_size=2048,
                num_layers=48,
                num_heads=32,
                num_kv_heads=4,
                head_dim=128,
                num_experts=128,
                experts_per_token=8,
                expert_width=768,
                rms_norm_eps=1e-6,
                rope_theta=5_000_000.0,
                mrope_section=(24, 20, 20),
                max_positions=262144,
            ),
            vision=VisionConfig(
                depth=27,
                hidden_size=1152,
                intermediate_size=4304,
                num_heads=16,
                in_channels=3,
                patch_size=16,
                temporal_patch_size=2,
                merge_size=2,
                out_hidden_size=2048,
                num_positions=2304,
                deepstack_indexes=(8, 16, 24),
            ),
            image_token_id=151655,
            video_token_id=151656,
            vision_start_token_id=151652,
            vision_end_token_id=151653,
        )

    @classmethod
    def qwen3_vl_235b_a22b(cls) -> Qwen3VLMoeConfig:
        """The published Qwen3-VL-235B-A22B (Instruct and Thinking), whose tower differs in the width of its output."""
        small = cls.qwen3_vl_30b_a3b()
        text = replace(small.text, hidden_size=4096, num_layers=94, num_heads=64, expert_width=1536)
        return replace(small, text=text, vision=replace(small.vision, out_hidden_size=4096))


def _with_fp8(text: TextConfig, top: _Fields, text_fields: _Fields, vision_fields: _Fields) -> TextConfig:
    """The decoder with what a ``quantization_config`` says of it."""
    if vision_fields.get("quantization_config"):
        raise ConfigError(f"{vision_fields.source}: quantization_config: a quantised vision tower is not supported")
    for fields in (top, text_fields, vision_fields):
        if fields.get("compression_config"):
            raise ConfigError(
                f"{fields.source}: compression_config is not supported; use a 16-bit or an FP8 checkpoint"
            )
    for fields in (top, text_fields):
        if fields.get("quantization_config"):
            source = f"{fields.source}: quantization_config"
            fp8 = parse_fp8(fields.get("quantization_config"), source)
            attention, experts = layers_in_fp8(fp8, text.num_layers, source)
            return replace(text, fp8_attention=attention, fp8_experts=experts)
    return text


def _parse_text(fields: _Fields) -> TextConfig:
    fields.require("model_type", "qwen3_vl_moe_text", default="qwen3_vl_moe_text")
    fields.require("hidden_act", "silu", default="silu")
    fields.require("attention_bias", False, default=False)
    fields.require("norm_topk_prob", True, default=True)
    fields.require("decoder_sparse_step", 1, default=1, hint="dense decoder layers are not supported")
    if fields.get("mlp_only_layers"):
        raise ConfigError(
            f"{fields.source}: mlp_only_layers is {fields.get('mlp_only_layers')}: "
            "dense decoder layers are not supported, every layer must be a mixture of experts"
        )
    rope = fields.section("rope_parameters" if fields.get("rope_parameters") else "rope_scaling")
    rope.require("rope_type", "default", default=rope.get("type", "default"))
    rope.require("mrope_interleaved", True, default=True)
    theta = (rope if rope.get("rope_theta") is not None else fields).number("rope_theta")

    heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    hidden_size = fields.integer("hidden_size")
    text = TextConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.integer("head_dim", default=hidden_size // heads),
        num_experts=fields.integer("num_experts", "num_local_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=theta,
        mrope_section=_three_integers(rope, "mrope_section"),
        max_positions=fields.integer("max_position_embeddings"),
    )
    if heads % kv_heads:
        raise ConfigError(f"{fields.source}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if text.head_dim % 2 or sum(text.mrope_section) != text.head_dim // 2:
        raise ConfigError(
            f"{rope.source}: mrope_section {list(text.mrope_section)} must add up to half of head_dim {text.head_dim}"
        )
    if text.experts_per_token > text.num_experts:
        raise ConfigError(
            f"{fields.source}: num_experts_per_tok is {text.experts_per_token} of only {text.num_experts} experts"
        )
    return text


def _parse_vision(fields: _Fields) -> VisionConfig:
    if fields.get("model_type", "qwen3_vl_moe") not in ("qwen3_vl_moe", "qwen3_vl_moe_vision"):
        raise ConfigError(
            f"{fields.source}: model_type is {fields.get('model_type')!r}; "
            "only 'qwen3_vl_moe' and 'qwen3_vl_moe_vision' are supported"
        )
    fields.require("hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    rope = _Fields(fields.get("rope_parameters") or {}, f"{fields.source}.rope_parameters")
    rope.require("rope_type", "axial", default="axial")
    vision = VisionConfig(
        depth=fields.integer("depth"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=fields.integer("num_heads"),
        in_channels=fields.integer("in_channels", default=3),
        patch_size=fields.integer("patch_size"),
        temporal_patch_size=fields.integer("temporal_patch_size"),
        merge_size=fields.integer("spatial_merge_size"),
        out_hidden_size=fields.integer("out_hidden_size"),
        num_positions=fields.integer("num_position_embeddings"),
        deepstack_indexes=_block_numbers(fields, "deepstack_visual_indexes"),
        rope_theta=rope.number("rope_theta", default=10000.0),
    )
    if vision.in_channels != 3:
        raise ConfigError(f"{fields.source}: in_channels is {vision.in_channels}; images have 3 channels")
    if vision.hidden_size % vision.num_heads or vision.head_dim % 4:
        raise ConfigError(
            f"{fields.source}: hidden_size {vision.hidden_size} over {vision.num_heads} heads must give a head width "
            "that is a multiple of 4 (rotary pairs for rows and columns)"
        )
    if vision.grid_side**2 != vision.num_positions:
        raise ConfigError(f"{fields.source}: num_position_embeddings {vision.num_positions} is no square number")
    indexes = vision.deepstack_indexes
    if len(set(indexes)) != len(indexes) or not all(0 <= i < vision.depth for i in indexes):
        raise ConfigError(
            f"{fields.source}: deepstack_visual_indexes {list(indexes)} must be distinct block numbers below "
            f"depth {vision.depth}"
        )
    return vision


def _parse_dtype(top: _Fields, text: _Fields) -> torch.dtype:
    for fields in (top, text):
        for key in ("dtype", "torch_dtype"):
            name = fields.get(key)
            if name is None:
                continue
            if not isinstance(name, str) or name not in _DTYPES:
                raise ConfigError(f"{fields.source}: {key} {name!r} is not supported; choose from {', '.join(_DTYPES)}")
            return _DTYPES[name]
    return torch.bfloat16


def _block_numbers(fields: _Fields, key: str) -> tuple[int, ...]:
    value = fields.get(key, ())
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise ConfigError(f"{fields.source}: {key} is {value!r}; a list of block numbers is needed")
    return tuple(value)


def _three_integers(fields: _Fields, key: str) -> tuple[int, int, int]:
    value = fields.get(key)
    if not (isinstance(value, list | tuple) and len(value) == 3 and all(type(v) is int and v >= 0 for v in value)):
        raise ConfigError(f"{fields.source}: {key} is {value!r}; three sizes (time, height, width) are needed")
    return tuple(value)


class _Fields:
    """One JSON object of the config, with look-ups whose errors name the field."""

    def __init__(self, raw: Any, source: str):
        if not isinstance(raw, dict):
            raise ConfigError(f"{source}: a JSON object is needed, got {type(raw).__name__}")
        self._raw, self.source = raw, source

    def get(self, key: str, default: Any = None) -> Any:
        value = self._raw.get(key)
        return default if value is None else value

    def section(self, key: str) -> _Fields:
        if self.get(key) is None:
            raise ConfigError(f"{self.source}: {key} is missing")
        return _Fields(self._raw[key], f"{self.source}: {key}")

    def require(self, key: str, expected: Any, *, default: Any = None, hint: str = "") -> None:
        value = self.get(key, default)
        if type(value) is not type(expected) or value != expected:  # 1 is not true, though Python finds them equal
            raise ConfigError(
                f"{self.source}: {key} is {value!r}; only {expected!r} is supported" + (f" ({hint})" if hint else "")
            )

    def number(self, key: str, *, default: float | None = None) -> float:
        """A float within the range of ``key``."""
        value = self.get(key, default)
        low, high = _RANGES[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"{self.source}: {key} is {value!r}; a number from {low:g} to {high:g} is needed")
        return float(value)

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """The first of ``keys`` that is present: one value, several spellings."""
        for key in keys:
            value = self.get(key)
            if value is None:
                continue
            if type(value) is not int or value < minimum:
                raise ConfigError(f"{self.source}: {key} is {value!r}; an integer of at least {minimum} is needed")
            most = _MOST.get(key, _MOST_ELSEWHERE)
            if value > most:
                raise ConfigError(f"{self.source}: {key} is {value}; models up to {most} are supported")
            return value
        if default is None:
            raise ConfigError(f"{self.source}: {' or '.join(keys)} is missing")
        return default
