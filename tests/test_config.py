"""config.json: both spellings, the 30B preset, and refusal by name of what is not supported."""

import copy
import json
import math
import time

import pytest
import torch

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import ConfigError
from qwen3vl_moe.weights.table import expand_table


def test_both_spellings_give_the_same_config(tiny):
    ours = {layout: Qwen3VLMoeConfig.from_pretrained(path) for layout, path in tiny.paths.items()}
    assert ours["transformers5"] == ours["published"]


def test_every_field_agrees_with_transformers(tiny):
    ours, theirs = Qwen3VLMoeConfig.from_pretrained(tiny.path), tiny.oracle.config
    text, vision = theirs.text_config, theirs.vision_config
    assert ours.text.head_dim == text.head_dim
    assert ours.text.num_experts == text.num_experts
    assert ours.text.experts_per_token == text.num_experts_per_tok
    assert ours.text.expert_width == text.moe_intermediate_size
    assert (ours.text.num_heads, ours.text.num_kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert ours.text.rope_theta == text.rope_parameters["rope_theta"]
    assert list(ours.text.mrope_section) == text.rope_parameters["mrope_section"]
    assert ours.text.rms_norm_eps == text.rms_norm_eps
    assert list(ours.vision.deepstack_indexes) == vision.deepstack_visual_indexes
    assert ours.vision.merge_size == vision.spatial_merge_size
    assert ours.vision.patch_dim == 3 * vision.temporal_patch_size * vision.patch_size**2
    assert ours.image_token_id == theirs.image_token_id
    assert ours.dtype == torch.float32


def test_the_preset_is_the_published_config(shared_dir):
    assert Qwen3VLMoeConfig.from_pretrained(shared_dir / "checkpoint-30b") == Qwen3VLMoeConfig.qwen3_vl_30b_a3b()


_NO_EPS = (0, -1e-6, 1e-300, 1, 1e300, math.inf, -math.inf, math.nan, True, 10**400)
_NO_THETA = (0, 0.5, 1e-300, -5e6, 1e300, math.inf, -math.inf, math.nan, True, 10**400)


def _set(raw, path, value):
    *parents, last = path.split(".")
    for key in parents:
        raw = raw.setdefault(key, {})
    raw[last] = value


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model_type", "qwen3_vl", "model_type"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config: activation_scheme is None"),
        ("quantization_config", "fp8", "quantization_config: a JSON object is needed"),
        ("text_config.quantization_config", {"quant_method": "awq"}, "quantization_config: quant_method is 'awq'"),
        ("vision_config.quantization_config", {"quant_method": "fp8"}, "a quantised vision tower is not supported"),
        ("compression_config", {"format": "x"}, "compression_config is not supported"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("text_config", None, "text_config is missing"),
        ("text_config.hidden_act", "gelu", "hidden_act"),
        ("text_config.attention_bias", True, "attention_bias"),
        ("text_config.norm_topk_prob", False, "norm_topk_prob"),
        ("text_config.decoder_sparse_step", 2, "decoder_sparse_step"),
        ("text_config.mlp_only_layers", [0], "mlp_only_layers"),
        ("text_config.rope_parameters.rope_type", "yarn", "rope_type"),
        ("text_config.rope_parameters.mrope_interleaved", False, "mrope_interleaved"),
        ("text_config.rope_parameters.mrope_section", [4, 4], "mrope_section"),
        ("text_config.rope_parameters.mrope_section", [4, 4, 4], "half of head_dim"),
        ("text_config.rope_parameters.rope_theta", None, "rope_theta"),
        ("text_config.rope_parameters.rope_theta", "1e6", "rope_theta is '1e6'; a number from 1 to 1e+12"),
        ("text_config.rms_norm_eps", "tiny", "rms_norm_eps is 'tiny'; a number from 1e-20 to 0.1"),
        *[("text_config.rms_norm_eps", eps, f"rms_norm_eps is {eps!r}; a number") for eps in _NO_EPS],
        *[("text_config.rope_parameters.rope_theta", t, f"rope_theta is {t!r}; a number") for t in _NO_THETA],
        *[("vision_config.rope_parameters.rope_theta", t, f"rope_theta is {t!r}; a number") for t in _NO_THETA],
        ("text_config.attention_bias", 0, "attention_bias is 0; only False"),
        ("text_config.norm_topk_prob", 1.0, "norm_topk_prob is 1.0; only True"),
        ("text_config.decoder_sparse_step", True, "decoder_sparse_step is True; only 1"),
        ("text_config.rope_parameters.mrope_section", [True, 4, 3], "three sizes"),
        ("text_config.num_experts_per_tok", 99, "num_experts_per_tok is 99 of only 8 experts"),
        ("text_config.num_key_value_heads", 3, "key/value heads"),
        ("text_config.hidden_size", "32", "hidden_size is '32'"),
        ("text_config.hidden_size", 0, "at least 1"),
        ("text_config.num_local_experts", None, "num_experts or num_local_experts is missing"),
        ("text_config.num_hidden_layers", 1, "deepstack_visual_indexes need as many decoder layers"),
        ("vision_config.model_type", "siglip", "model_type"),
        ("vision_config.hidden_act", "silu", "hidden_act"),
        ("vision_config.num_heads", 3, "head width"),
        ("vision_config.in_channels", 1, "in_channels is 1"),
        ("vision_config.num_position_embeddings", 35, "no square number"),
        ("vision_config.deepstack_visual_indexes", [0, 9], "below depth 4"),
        ("vision_config.deepstack_visual_indexes", [1, 1], "distinct"),
        ("vision_config.deepstack_visual_indexes", 2, "deepstack_visual_indexes is 2; a list"),
        ("vision_config.deepstack_visual_indexes", [[1], [2]], "a list of block numbers is needed"),
        ("vision_config.out_hidden_size", 64, "out_hidden_size is 64"),
        ("vision_config.rope_parameters.rope_type", "default", "rope_type"),
        ("image_token_id", 100_000, "outside vocab_size"),
        ("dtype", "float8_e4m3fn", "float8_e4m3fn"),
        ("dtype", ["bfloat16"], "dtype ['bfloat16'] is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(plain, path, value, named):
    raw = copy.deepcopy(json.loads((plain.path / "config.json").read_text()))
    _set(raw, path, value)
    with pytest.raises(ConfigError) as caught:
        Qwen3VLMoeConfig.from_dict(raw, source="config.json")
    message = str(caught.value)
    assert named in message
    assert message.startswith("config.json")
    assert "\n" not in message


_SIZES = {
    "text_config": (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings",
    ),
    "vision_config": (
        "depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "temporal_patch_size",
        "spatial_merge_size", "out_hidden_size", "num_position_embeddings",
    ),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("value", [10**10, 2**40, 2**64, 10**400, 2.0, True, -1])
@pytest.mark.parametrize(("section", "name"), [(section, name) for section in _SIZES for name in _SIZES[section]])
def test_a_size_that_no_model_has_is_refused_before_anything_is_made_of_it(plain, section, name, value):
    raw = json.loads((plain.path / "config.json").read_text())
    _set(raw, f"{section}.{name}", value)
    with pytest.raises(ConfigError, match=rf"^config: {section}: {name} is {value}"):
        Qwen3VLMoeConfig.from_dict(raw)


@pytest.mark.timeout(60)
def test_the_largest_sizes_that_are_believed_are_still_written_out_in_no_time(plain):
    """The loader writes out names and shapes for all layers, then compares them with the files."""
    raw = json.loads((plain.path / "config.json").read_text())
    _set(raw, "text_config.num_hidden_layers", 1000)
    _set(raw, "vision_config.depth", 1000)
    _set(raw, "vision_config.deepstack_visual_indexes", list(range(1000)))
    started = time.monotonic()
    assert len(expand_table(Qwen3VLMoeConfig.from_dict(raw))) > 20_000
    assert time.monotonic() - started < 10


def test_a_missing_or_damaged_file_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        Qwen3VLMoeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        Qwen3VLMoeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object is needed"):
        Qwen3VLMoeConfig.from_pretrained(tmp_path)
    for number in ("NaN", "-Infinity", "1e999", "9" * 400):
        (tmp_path / "config.json").write_text(f'{{"initializer_range": {number}}}')  # even where it is not looked at
        with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON: "):
            Qwen3VLMoeConfig.from_pretrained(tmp_path)
