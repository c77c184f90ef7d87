"""transformers' own model over our weights: the peer in comparisons, at no extra memory.

Used by programs that compare or time both in one process; the model itself never needs it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.weights.table import expand_table


def transformers_config(config: Qwen3VLMoeConfig) -> Any:
    """The same sizes as transformers' ``Qwen3VLMoeConfig``."""
    from transformers import Qwen3VLMoeConfig as TransformersConfig

    text, vision = config.text, config.vision
    return TransformersConfig(
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "num_experts": text.num_experts,
            "num_experts_per_tok": text.experts_per_token,
            "moe_intermediate_size": text.expert_width,
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.mrope_section),
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "out_hidden_size": vision.out_hidden_size,
            "num_position_embeddings": vision.num_positions,
            "deepstack_visual_indexes": list(vision.deepstack_indexes),
            "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
        },
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        tie_word_embeddings=False,
        dtype=config.dtype,
    )


def require_16_bits(config: Qwen3VLMoeConfig) -> None:
    """Refuse to compare what the two models could not share.

    Raises:
        OptionError: some of the weights are in FP8.
    """
    if config.text.fp8_attention or config.text.fp8_experts:
        raise OptionError(
            "weights in FP8 cannot be compared with transformers or fp32 here: both are made over our weights, and "
            "transformers' plain layers take none in FP8; give a 16-bit checkpoint, or random weights with "
            "--load-format dummy"
        )


def transformers_twin(model: Qwen3VLMoe, *, experts: str = "grouped_mm", attention: str = "sdpa") -> Any:
    """``Qwen3VLMoeForConditionalGeneration`` whose parameters are views of ``model``'s.

    Args:
        model: ours, on any device and in any dtype. The storage is shared: whichever lives longer keeps it.
        experts: transformers' experts implementation: ``"eager"``, ``"batched_mm"`` or ``"grouped_mm"``.
        attention: transformers' attention implementation.

    Raises:
        OptionError: some of the weights are in FP8.
    """
    require_16_bits(model.config)
    from transformers import Qwen3VLMoeForConditionalGeneration

    config = transformers_config(model.config)
    with torch.device("meta"):
        twin = Qwen3VLMoeForConditionalGeneration._from_config(config, attn_implementation=attention)
    parameters = dict(model.named_parameters())
    for entry in expand_table(model.config):
        owner, _, name = entry.source.rpartition(".")
        view = entry.destination(parameters[entry.target], "transformers5")
        setattr(twin.get_submodule(owner), name, nn.Parameter(view, requires_grad=False))
    # Rotary frequencies are buffers that no checkpoint holds: made anew, off the meta device.
    decoder, tower = twin.model.language_model, twin.model.visual
    decoder.rotary_emb = type(decoder.rotary_emb)(config.text_config).to(model.device)
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(config.vision_config).to(model.device)
    twin.set_experts_implementation(experts)
    return twin.eval()


class _InFloat32(nn.Module):
    """Evaluates a module in fp32: its weights are cast for the call and dropped after it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._hidden = (module,)  # a tuple, so that the bf16 weights are no parameters of this module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(self._hidden[0]).float()(*args, **kwargs)


def in_float32(twin: Any) -> Any:
    """Turn a twin into an fp32 evaluation of the same weights, one layer's copy at a time: the yardstick of both.

    The experts are evaluated one by one (``"eager"``). The twin is changed in place and returned.
    """
    twin.set_experts_implementation("eager")
    decoder, tower = twin.model.language_model, twin.model.visual
    # The small position table stays in fp32: transformers reads the tower's dtype from its parameters.
    tower.pos_embed = copy.deepcopy(tower.pos_embed).float()
    for owner, names in (
        (tower, ("patch_embed", "merger")),
        (decoder, ("embed_tokens", "norm")),
        (twin, ("lm_head",)),
    ):
        for name in names:
            setattr(owner, name, _InFloat32(getattr(owner, name)))
    for modules in (tower.blocks, tower.deepstack_merger_list, decoder.layers):
        for number, module in enumerate(modules):
            modules[number] = _InFloat32(module)
    return twin
