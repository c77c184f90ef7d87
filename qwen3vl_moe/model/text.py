"""The decoder: 48 layers of grouped-query attention and mixture of experts.

Checked against transformers 5.17 (``Qwen3VLMoeTextModel``).
"""

from __future__ import annotations

import tma_moe
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_moe.config import TextConfig
from qwen3vl_moe.model.attention import cached_attention, runs_kernels, store
from qwen3vl_moe.model.batch import Batch
from qwen3vl_moe.model.rope import inverse_frequencies, mrope_angles, rotate


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def add_norm(x_TH: Tensor, y_TH: Tensor | tma_moe.Uncombined | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream (None: nothing left to add), and norm the sum for the next layer."""
    if runs_kernels(x_TH):
        from qwen3vl_moe.model import fused_ops  # needs triton, which a CPU may lack

        if isinstance(y_TH, tma_moe.Uncombined):
            return fused_ops.combine_add_norm(x_TH, y_TH, norm.weight, norm.eps)
        return fused_ops.add_norm(x_TH, y_TH, norm.weight, norm.eps)
    x_TH = x_TH if y_TH is None else x_TH + y_TH
    return x_TH, norm(x_TH)


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

    def forward(
        self, residual_TH: Tensor, x_TH: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer_cache: Tensor | None
    ) -> Tensor:
        """The residual stream, updated in place, with what the normed rows x attend to."""
        rotated = self._fused if runs_kernels(x_TH) else self._plain
        q_TND, k_TGD, v_TGD = rotated(self.qkv(x_TH), cos, sin, batch, layer_cache)
        out_TA = cached_attention(q_TND, k_TGD, v_TGD, batch, layer_cache).flatten(1)
        return residual_TH.addmm_(out_TA, self.out.weight.T)  # the product adds: nothing but it reads its result

    def _plain(self, qkv_TA: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer_cache: Tensor | None):
        q_TND, k_TGD, v_TGD = qkv_TA.view(len(qkv_TA), -1, self.head_dim).split(self.heads, dim=1)
        # The rotation is done in fp32: large positions times small frequencies do not fit into bf16.
        q_TND = rotate(self.q_norm(q_TND).float(), cos, sin).to(qkv_TA.dtype)
        k_TGD = rotate(self.k_norm(k_TGD).float(), cos, sin).to(qkv_TA.dtype)
        store(k_TGD, v_TGD, batch, layer_cache)
        return q_TND, k_TGD, v_TGD

    def _fused(self, qkv_TA: Tensor, cos: Tensor, sin: Tensor, batch: Batch, layer_cache: Tensor | None):
        """The same in one launch."""
        from qwen3vl_moe.model.fused_ops import norm_rotate_store

        norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        return norm_rotate_store(qkv_TA, self.heads[:2], cos, sin, norms, batch.slots_T, layer_cache)


class MoE(nn.Module):
    """Router and experts: each token is the weighted sum of its top-k experts' SwiGLU networks."""

    def __init__(self, config: TextConfig, backend: str):
        super().__init__()
        self.experts_per_token, self.backend = config.experts_per_token, backend
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = tma_moe.ExpertWeights(config.num_experts, config.hidden_size, config.expert_width)

    def forward(self, x_TH: Tensor, padding_T1: Tensor | None = None) -> Tensor | tma_moe.Uncombined:
        topk_ids_TK, topk_weights_TK = tma_moe.route(self.router(x_TH), self.experts_per_token, backend=self.backend)
        if padding_T1 is not None:
            topk_ids_TK.masked_fill_(padding_T1, -1)  # no expert: padding must not make the layer read more weights
        operands = x_TH, topk_ids_TK, topk_weights_TK, self.experts
        return tma_moe.fused_moe(*operands, backend=self.backend, combine=False)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, moe_backend: str):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config)
        self.moe_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = MoE(config, moe_backend)

    def forward(
        self,
        x_TH: Tensor,
        y_TH: Tensor | tma_moe.Uncombined | None,
        cos: Tensor,
        sin: Tensor,
        batch: Batch,
        layer_cache: Tensor | None,
    ) -> tuple[Tensor, Tensor | tma_moe.Uncombined]:
        """The residual stream, and what the layer before left to add to it; returns the same of this layer."""
        x_TH, normed_TH = add_norm(x_TH, y_TH, self.attn_norm)
        x_TH = self.attn(x_TH, normed_TH, cos, sin, batch, layer_cache)
        x_TH, normed_TH = add_norm(x_TH, None, self.moe_norm)
        return x_TH, self.moe(normed_TH, batch.padding_T1)


class Decoder(nn.Module):
    def __init__(self, config: TextConfig, moe_backend: str):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, moe_backend) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: Batch, kv_cache: Tensor | None) -> Tensor:
        """Normed hidden states of the rows whose logits are wanted, [R, H]. For kv_cache see ``Qwen3VLMoe.forward``."""
        return self.run_layers(self.embed_tokens(batch), batch, kv_cache)

    def embed_tokens(self, batch: Batch) -> Tensor:
        """What the first layer reads, [T, H]: token embeddings, and visual tokens in their places."""
        x_TH = self.embed(batch.input_ids_T)
        if batch.visual is not None:
            x_TH.index_copy_(0, batch.visual_rows, batch.visual.embeds_MH)
        return x_TH

    def run_layers(self, x_TH: Tensor, batch: Batch, kv_cache: Tensor | None) -> Tensor:
        """All layers and the last norm. ``x_TH`` may be overwritten."""
        config, y_TH = self.config, None
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, device=x_TH.device)
        cos, sin = mrope_angles(batch.positions_3T, frequencies, config.mrope_section)
        deepstack_LMH = () if batch.visual is None else batch.visual.deepstack_LMH
        for number, layer in enumerate(self.layers):
            x_TH, y_TH = layer(x_TH, y_TH, cos, sin, batch, None if kv_cache is None else kv_cache[number])
            if number < len(deepstack_LMH):
                x_TH.index_add_(0, batch.visual_rows, deepstack_LMH[number])
        if batch.logit_rows is not None:
            x_TH, y_TH = x_TH[batch.logit_rows], y_TH[batch.logit_rows]
        return add_norm(x_TH, y_TH, self.norm)[1]
