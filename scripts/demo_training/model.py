"""The demo's sizes, and its model: transformers' own class, so that what it makes is no product of our code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from demo_training import padded_experts
from demo_training.batches import FRAMES, IGNORE, MERGE, PATCH, Batch
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.tiny import SPECIAL_TOKENS, TokenIds
from qwen3vl_moe.transformers_twin import transformers_config


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
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": list(sizes.deepstack),
        },
    }


def build_model(raw: dict[str, Any], *, seed: int, experts: str, attention: str = "sdpa") -> Any:
    """A freshly initialised ``Qwen3VLMoeForConditionalGeneration`` of a config.json, fp32 on the CPU.

    ``experts`` and ``attention`` name implementations of transformers, or :mod:`.padded_experts`.
    """
    from transformers import Qwen3VLMoeForConditionalGeneration

    padded_experts.register()
    torch.manual_seed(seed)
    config = transformers_config(Qwen3VLMoeConfig.from_dict(raw))
    config.dtype = torch.float32
    model = Qwen3VLMoeForConditionalGeneration._from_config(config, attn_implementation=attention)
    _initialise(model)
    model.set_experts_implementation(experts)
    for block in model.model.visual.blocks:
        block.attn.forward = _SameGridAttention(block.attn)
    model.model.visual.register_forward_pre_hook(_repeat_positions, with_kwargs=True)
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


def _repeat_positions(_tower: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Positions of the patches, once for all pictures: transformers would make them picture by picture."""
    from transformers.vision_utils import get_vision_position_ids

    grid = kwargs["grid_thw"]
    positions = get_vision_position_ids(grid[:1], MERGE).repeat(len(grid), 1)
    return args, {**kwargs, "position_ids": positions}


class _SameGridAttention:
    """The vision tower's attention where all pictures have one grid: one batched call instead of one a picture."""

    def __init__(self, attention: nn.Module):
        self._attention = attention

    def __call__(self, hidden_states, cu_seqlens, position_embeddings, **_unused):
        from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import apply_rotary_pos_emb_vision

        attention, pictures = self._attention, len(cu_seqlens) - 1
        q, k, v = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.unflatten(0, (pictures, -1)).transpose(1, 2) for x in (q, k, v))
        if q.device.type == "cpu":  # the backward pass of torch's own is twice as slow there
            out = (attention.scaling * q @ k.transpose(2, 3)).softmax(-1, torch.float32).to(q.dtype) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
        return attention.proj(out.transpose(1, 2).reshape(hidden_states.shape))


def patches_of(pixels: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures [n, height, width, 3] -> patches [n * P, patch_dim] as image processors order them, and grids.

    Patches that are merged stand next to each other; in a patch: channel, frame (the picture twice), row, column.
    """
    n, height, width, _ = pixels.shape
    rows, columns = height // PATCH, width // PATCH
    x = (pixels.to(torch.float32) / 127.5 - 1).to(dtype)
    x = x.view(n, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    x = x.reshape(n * rows * columns, 3, 1, PATCH, PATCH).expand(-1, -1, FRAMES, -1, -1)
    grid = torch.tensor([[1, rows, columns]], device=pixels.device).expand(n, 3)
    return x.reshape(n * rows * columns, -1), grid


@dataclass
class Losses:
    """``answers``: mean cross-entropy of the learned tokens; ``balance``: 1 for even experts, more if uneven;
    ``load_LE``: share of the (token, expert) pairs of each layer that each expert got; ``right``: share of learned
    tokens predicted."""

    answers: torch.Tensor
    balance: torch.Tensor
    load_LE: torch.Tensor
    right: torch.Tensor


def losses_of(model: Any, batch: Batch) -> Losses:
    """Forward pass over one batch; only positions with a label reach the vocabulary."""
    pictures = {}
    if batch.pixels is not None:
        values, grid = patches_of(batch.pixels, model.dtype)
        pictures = {"pixel_values": values, "image_grid_thw": grid}
    out = model.model(
        input_ids=batch.ids_BT,
        position_ids=batch.positions_3BT,
        output_router_logits=True,
        use_cache=False,
        **pictures,
    )
    targets = batch.labels_BT[:, 1:]
    learned = targets != IGNORE
    logits = model.lm_head(out.last_hidden_state[:, :-1][learned]).float()
    targets = targets[learned]
    top_k = model.config.text_config.num_experts_per_tok
    balance, load = balance_of(out.router_logits, batch.valid_BT, top_k)
    right = (logits.argmax(-1) == targets).float().mean()
    return Losses(F.cross_entropy(logits, targets), balance, load, right)


def balance_of(router_logits, valid_BT: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Load balancing of Switch Transformer (arXiv 2101.03961, equation 4), layer by layer, without the padding.

    Returns:
        the mean over layers of E * sum(share of pairs * mean probability), and the shares [L, E].
    """
    valid = valid_BT.reshape(-1)
    penalties, loads = [], []
    for logits in router_logits:
        probabilities_TE = logits.reshape(len(valid), -1).float().softmax(-1) * valid[:, None]
        experts = probabilities_TE.shape[-1]
        chosen = torch.zeros_like(probabilities_TE).scatter_(1, probabilities_TE.topk(top_k, -1).indices, 1.0)
        load = (chosen * valid[:, None]).sum(0) / (valid.sum() * top_k)
        penalties.append(experts * (load * probabilities_TE.sum(0) / valid.sum()).sum())
        loads.append(load)
    return torch.stack(penalties).mean(), torch.stack(loads).detach()
