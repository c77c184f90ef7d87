"""The decoder: 48 layers of grouped-query attention and mixture of experts.

Checked against transformers 5.17 (``Qwen3VLMoeTextModel``).
"""

from __future__ import annotations

import tma_moe
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_moe.config import TextConfig
from qwen3vl_moe.model.attention import attention, cached
from qwen3vl_moe.model.batch import Batch
from qwen3vl_moe.model.rope import inverse_frequencies, mrope_angles, rotate


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention. Queries and keys are RMS-normed per head, then rotated by M-RoPE."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer_cache: Tensor | None) -> Tensor:
        heads_TND = self.qkv(x_TH).view(len(x_TH), -1, self.head_dim)
        q_TND, k_TGD, v_TGD = heads_TND.split(self.heads, dim=1)
        q_TND = rotate(self.q_norm(q_TND).float(), cos, sin).to(x_TH.dtype)
        k_TGD = rotate(self.k_norm(k_TGD).float(), cos, sin).to(x_TH.dtype)
        k_UGD, v_UGD = cached(k_TGD, v_TGD, batch, layer_cache)
        return self.out(attention(q_TND, k_UGD, v_UGD, batch.segments, causal=True).flatten(1))


class MoE(nn.Module):
    """Router and experts: each token is the weighted sum of its top-k experts' SwiGLU networks."""

    def __init__(self, config: TextConfig, backend: str):
        super().__init__()
        self.experts_per_token, self.backend = config.experts_per_token, backend
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = tma_moe.ExpertWeights(config.num_experts, config.hidden_size, config.expert_width)

    def forward(self, x_TH: Tensor) -> Tensor:
        topk_ids_TK, topk_weights_TK = tma_moe.route(self.router(x_TH), self.experts_per_token, backend=self.backend)
        return tma_moe.fused_moe(x_TH, topk_ids_TK, topk_weights_TK, self.experts, backend=self.backend)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, moe_backend: str):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.moe_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config, moe_backend)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer_cache: Tensor | None) -> Tensor:
        x_TH = x_TH + self.attn(self.attn_norm(x_TH), cos, sin, batch, layer_cache)
        return x_TH + self.moe(self.moe_norm(x_TH))


class Decoder(nn.Module):
    def __init__(self, config: TextConfig, moe_backend: str):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, moe_backend) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: Batch, kv_cache: Tensor | None) -> Tensor:
        """Normed hidden states of the rows whose logits are wanted, [R, H]. For kv_cache see ``Qwen3VLMoe.forward``."""
        config, visual = self.config, batch.visual
        x_TH = self.embed(batch.input_ids_T)
        if visual is not None:
            x_TH.index_copy_(0, batch.visual_rows, visual.embeds_MH)
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, device=x_TH.device)
        cos, sin = mrope_angles(batch.positions_3T, frequencies, config.mrope_section)
        for number, layer in enumerate(self.layers):
            x_TH = layer(x_TH, cos, sin, batch, None if kv_cache is None else kv_cache[number])
            if visual is not None and number < len(visual.deepstack_LMH):
                x_TH.index_add_(0, batch.visual_rows, visual.deepstack_LMH[number])
        return self.norm(x_TH if batch.logit_rows is None else x_TH[batch.logit_rows])
