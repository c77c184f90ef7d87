"""The demo's sizes, and its model: transformers' own class, so that what it makes is no product of our code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarking.tiny import SPECIAL_TOKENS, TokenIds
from benchmarking.transformers_twin import transformers_config
from demo_training.pictures import FRAMES, MERGE, PATCH, POSITIONS
from qwen3vl_moe.config import Qwen3VLMoeConfig


@dataclass(frozen=True)
class Sizes:
    """The default is what ships: 14.7 million parameters, 29.4 MB in bf16, 4.7 million of them used for a token."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    experts: int = 16
    top_k: int = 4
    expert_width: int = 80
    vision_hidden: int = 160
    vision_depth: int = 6
    vision_width: int = 448
    vision_heads: int = 5
    deepstack: tuple[int, ...] = (1, 3)


# 4.6 million parameters, 9.1 MB, 0.7 million used for a token: what two CPU cores can train a recipe with.
MEDIUM = Sizes(
    vocab=3072,
    hidden=128,
    layers=5,
    heads=4,
    kv_heads=2,
    expert_width=48,
    vision_hidden=128,
    vision_depth=5,
    vision_width=384,
    vision_heads=4,
)
SMALL = Sizes(
    vocab=768,
    hidden=96,
    layers=3,
    heads=4,
    kv_heads=2,
    experts=16,
    expert_width=32,
    vision_hidden=64,
    vision_depth=3,
    vision_width=160,
    vision_heads=2,
    deepstack=(0, 1),
)


def token_ids(directory: Path) -> TokenIds:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return TokenIds(*map(tokenizer.token_to_id, SPECIAL_TOKENS), size=tokenizer.get_vocab_size())


def published_config(sizes: Sizes, ids: TokenIds) -> dict[str, Any]:
    """config.json in the published spelling."""
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": ids.image,
        "video_token_id": ids.video,
        "vision_start_token_id": ids.vision_start,
        "vision_end_token_id": ids.vision_end,
        "tie_word_embeddings": False,
        "text_config": {
            "dtype": "bfloat16",
            "model_type": "qwen3_vl_moe_text",
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": 32,
            "num_experts": sizes.experts,
            "num_experts_per_tok": sizes.top_k,
            "moe_intermediate_size": sizes.expert_width,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 5000000,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
            "max_position_embeddings": 8192,
            "eos_token_id": ids.im_end,
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_width,
            "num_heads": sizes.vision_heads,
            "patch_size": PATCH,
            "temporal_patch_size": FRAMES,
            "spatial_merge_size": MERGE,
            "out_hidden_size": sizes.hidden,
            "num_position_embeddings": POSITIONS,
            "deepstack_visual_indexes": list(sizes.deepstack),
        },
    }


def build_model(raw: dict[str, Any], *, seed: int) -> Any:
    """A freshly initialised ``Qwen3VLMoeForConditionalGeneration`` of a config.json, fp32 on the CPU."""
    from transformers import Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(seed)
    config = transformers_config(Qwen3VLMoeConfig.from_dict(raw))
    config.dtype = torch.float32
    model = Qwen3VLMoeForConditionalGeneration._from_config(config)
    _initialise(model)
    return model.train()


@torch.no_grad()
def _initialise(model: Any) -> None:
    """Random weights for narrow layers: variance 1 / inputs.

    transformers' N(0, 0.02) suits layers of thousands of inputs. With 128, every block of both towers would start by
    adding next to nothing, and pictures would take many hundred steps longer to reach the answers.
    """
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "pos_embed" in name:
            parameter.normal_(std=0.2)
        elif parameter.ndim > 1 and name != "lm_head.weight":
            inputs = parameter.shape[2] if ".experts." in name else parameter[0].numel()
            parameter.normal_(std=inputs**-0.5)
