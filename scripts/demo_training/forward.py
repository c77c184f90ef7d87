"""The training pass over a packed batch, with the modules of transformers' model as the holder of its weights.

transformers' own forward pass reads sizes back from the device many times a step, and works through one batch per
shape. Here every step launches the same kernels whatever is in the batch, so that a CUDA graph can repeat them: on a
model this narrow, launching costs several times what computing does. Same values as transformers' (tests/demo).

Shape letters: N tokens, H hidden, P patches, C channels of the tower, M image tokens, L learned tokens, V vocabulary,
E experts, K chosen experts, A heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from demo_training.batched_experts import experts
from demo_training.batches import LONGEST_ROW, TrainingBatch
from demo_training.pictures import FRAMES, IGNORE, MOST_PATCHES, Pictures
from demo_training.places import AFTER, CELLS_AFTER, NAMED_AFTER, Carried
from qwen3vl_moe.model.rope import inverse_frequencies, mrope_angles, vision_angles
from qwen3vl_moe.ops.reference import rotate


@dataclass
class Losses:
    """Means over the learned tokens of a kind (answers, and share predicted); ``balance``: 1 for even experts, more if
    uneven; ``load_LE``: share of the (token, expert) pairs of each layer that each expert got; ``features``: the image
    tokens at the tower's outputs, each [M, H]; ``carried``: what the decoder's own lesson asks (places.py)."""

    pictures: Tensor
    pictures_right: Tensor
    text: Tensor
    text_right: Tensor
    balance: Tensor
    load_LE: Tensor
    features: list[Tensor]
    carried: Carried


def attend(q_NAD: Tensor, k_NAD: Tensor, v_NAD: Tensor, starts: Tensor, longest: int, causal: bool) -> Tensor:
    """Attention within each packed sequence, [N, A, D]; differentiable. No sequence is longer than ``longest``."""
    if q_NAD.is_cuda:
        flash = torch.ops.aten._flash_attention_forward
        return flash(q_NAD, k_NAD, v_NAD, starts, starts, longest, longest, 0.0, causal, False)[0]
    lengths = starts.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (q_NAD, k_NAD, v_NAD)), strict=True)
    swapped = ([x.transpose(0, 1) for x in part] for part in parts if len(part[0]))
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=causal).transpose(0, 1) for part in swapped])


def image_features(visual: Any, pictures: Pictures) -> list[Tensor]:
    """The merger's output and those of the DeepStack mergers, [M, H] each."""
    config, weight = visual.config, visual.patch_embed.proj.weight
    heads = config.num_heads
    x = (pictures.pixels_P.float() / 127.5 - 1).to(weight.dtype).permute(0, 3, 1, 2)
    x = x[:, :, None].expand(-1, -1, FRAMES, -1, -1).flatten(1)
    # The Conv3d has stride = kernel: a product with flattened patches.
    x_PC = F.linear(x, weight.flatten(1), visual.patch_embed.proj.bias)
    corners = F.embedding(pictures.index_P4, visual.pos_embed.weight) * pictures.weight_P4[:, :, None]
    x_PC = x_PC + corners.sum(1).to(x_PC.dtype)
    frequencies = inverse_frequencies(config.hidden_size // heads // 2, 10000.0, x_PC.device)
    cos, sin = vision_angles(pictures.positions_P2, frequencies)
    deepstack = []
    for number, block in enumerate(visual.blocks):
        q, k, v = block.attn.qkv(block.norm1(x_PC)).unflatten(-1, (3, heads, -1)).unbind(1)
        q, k = (rotate(x.float(), cos, sin).to(x_PC.dtype) for x in (q, k))
        out = attend(q, k, v, pictures.starts, MOST_PATCHES, causal=False)
        x_PC = x_PC + block.attn.proj(out.flatten(1))
        x_PC = x_PC + block.mlp(block.norm2(x_PC))
        if number in config.deepstack_visual_indexes:
            place = config.deepstack_visual_indexes.index(number)
            deepstack.append(visual.deepstack_merger_list[place](x_PC))
    return [visual.merger(x_PC), *deepstack]


def _norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _attention(layer: Any, x_NH: Tensor, cos: Tensor, sin: Tensor, starts: Tensor) -> Tensor:
    module = layer.self_attn
    q, k, v = (
        project(x_NH).unflatten(-1, (-1, module.head_dim)) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = (rotate(_norm(n, x), cos, sin) for n, x in ((module.q_norm, q), (module.k_norm, k)))
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    return module.o_proj(attend(q, k, v, starts, LONGEST_ROW, causal=True).flatten(1))


def blurred(x_MH: Tensor, noise_MH: Tensor) -> Tensor:
    """With noise, which is given in multiples of each token's own size (root mean square)."""
    size_M1 = x_MH.detach().float().square().mean(-1, keepdim=True).sqrt()
    return x_MH + (size_M1 * noise_MH).to(x_MH.dtype)


def losses_of(model: Any, batch: TrainingBatch, noise_MH: Tensor | None = None) -> Losses:
    """Forward pass; only tokens whose successor is learned reach the vocabulary.

    Args:
        noise_MH: blurs what the decoder gets of the merger, so that it learns to look at DeepStack's features.
    """
    config, decoder = model.config.text_config, model.model.language_model
    features = image_features(model.model.visual, batch.pictures)
    x_NH = F.embedding(batch.ids_N, decoder.embed_tokens.weight)
    x_NH = x_NH.masked_fill((batch.ids_N == model.config.image_token_id)[:, None], 0)
    x_NH = x_NH.index_add(0, batch.place_M, features[0] if noise_MH is None else blurred(features[0], noise_MH))
    rope = config.rope_parameters
    frequencies = inverse_frequencies(config.head_dim, rope["rope_theta"], x_NH.device)
    cos, sin = (x.to(x_NH.dtype) for x in mrope_angles(batch.positions_3N, frequencies, rope["mrope_section"]))
    penalties, loads, after = [], [], []
    for number, layer in enumerate(decoder.layers):
        x_NH = x_NH + _attention(layer, _norm(layer.input_layernorm, x_NH), cos, sin, batch.starts)
        normed = _norm(layer.post_attention_layernorm, x_NH)
        gate, of_experts = layer.mlp.gate, layer.mlp.experts
        probabilities_NE = F.linear(normed, gate.weight).softmax(-1, torch.float32)
        weights_NK, ids_NK = probabilities_NE.topk(config.num_experts_per_tok, dim=-1)
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        x_NH = x_NH + experts(normed, ids_NK, weights_NK, of_experts.gate_up_proj, of_experts.down_proj)
        if number < len(features) - 1:
            x_NH = x_NH.index_add(0, batch.place_M, features[number + 1])
        after.append(x_NH)
        penalty, load = balance_of(probabilities_NE, ids_NK, batch.valid_N)
        penalties.append(penalty)
        loads.append(load)
    carried = (
        after[min(layers, len(after)) - 1].index_select(0, tokens)
        for layers, tokens in ((AFTER, batch.place_M), (CELLS_AFTER, batch.place_M), (NAMED_AFTER, batch.naming_Q))
    )
    logits_LV = model.lm_head(_norm(decoder.norm, x_NH.index_select(0, batch.learned_L))).float()
    loss_L = batch.weight_L * F.cross_entropy(logits_LV, batch.targets_L, reduction="none", ignore_index=IGNORE)
    right_L = batch.weight_L * (logits_LV.argmax(-1) == batch.targets_L)
    text = batch.text_L.float()
    return Losses(
        loss_L @ (1 - text),
        right_L @ (1 - text),
        loss_L @ text,
        right_L @ text,
        torch.stack(penalties).mean(),
        torch.stack(loads).detach(),
        features,
        Carried(*carried),
    )


def balance_of(probabilities_NE: Tensor, ids_NK: Tensor, valid_N: Tensor) -> tuple[Tensor, Tensor]:
    """Load balancing of Switch Transformer (arXiv 2101.03961, equation 4) of a layer, without the padding.

    Returns:
        E * sum(share of pairs * mean probability), and the shares [E].
    """
    E, total = probabilities_NE.shape[1], valid_N.sum()
    chosen = torch.zeros_like(probabilities_NE).scatter_(1, ids_NK, 1.0)
    load = (chosen * valid_N[:, None]).sum(0) / (total * ids_NK.shape[1])
    return E * (load * (probabilities_NE * valid_N[:, None]).sum(0) / total).sum(), load
