"""The decoder: layers of grouped-query attention and mixture of experts.

Checked against transformers 5.17 (``Qwen3VLMoeTextModel``).
"""

from __future__ import annotations

from torch import Tensor, nn

import tma_moe
from qwen3vl_moe import ops
from qwen3vl_moe.config import TextConfig
from qwen3vl_moe.model.batch import Batch
from qwen3vl_moe.model.part import Part
from qwen3vl_moe.model.rope import inverse_frequencies, mrope_angles
from qwen3vl_moe.ops import Ranks, ResidualStream


class Attention(nn.Module):
    """Grouped-query attention. Queries and keys are RMS-normed per head, then rotated by M-RoPE."""

    def __init__(self, config: TextConfig, part: Part, fp8: bool):
        super().__init__()
        N, G, D = len(part.heads), len(part.kv_heads), config.head_dim
        self.heads = N, G
        self.qkv = ops.linear(config.hidden_size, N * D, G * D, G * D, fp8=fp8)
        self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
        self.out = ops.linear(N * D, config.hidden_size, fp8=fp8)

    def forward(
        self, x_TH: Tensor, cos_TF: Tensor, sin_TF: Tensor, batch: Batch, layer_cache: Tensor | None
    ) -> ops.Addend:
        """The output for x [T, H], to be added to the stream; layer_cache as in ``ops.cached_attention``."""
        q_TND, k_TGD, v_TGD = ops.rotate_and_store(
            self.qkv(x_TH),
            self.heads,
            cos_TF,
            sin_TF,
            norms=(self.q_norm, self.k_norm),
            slots_T=batch.slots_T,
            layer_cache=layer_cache,
        )
        out_TND = ops.cached_attention(q_TND, k_TGD, v_TGD, batch.segments, layer_cache)
        return ops.OpenProduct(out_TND.flatten(1), self.out)


class MoE(nn.Module):
    """Router and experts: each token's output is the weighted sum of its top-k experts' SwiGLU networks."""

    def __init__(self, config: TextConfig, part: Part, backend: str, fp8: bool):
        super().__init__()
        self.experts_per_token, self.backend = config.experts_per_token, backend
        self.first_expert = part.experts.start
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        sizes = len(part.experts), config.hidden_size, len(part.width)
        self.experts = tma_moe.ExpertWeights(*sizes, dtype=tma_moe.FP8 if fp8 else None)

    def forward(self, x_TH: Tensor, padding_T: Tensor | None = None) -> ops.Addend:
        """The output for x [T, H], to be added to the stream; of padding rows it is 0."""
        logits_TE = self.router(x_TH)
        # Padding goes to no expert: it must not make the layer read more weights.
        ids_TK, weights_TK = tma_moe.route(
            logits_TE, self.experts_per_token, skip_T=padding_T, first=self.first_expert, backend=self.backend
        )
        # The sum over experts is not taken here: the residual stream fuses it with the add and the next norm.
        return tma_moe.fused_moe(x_TH, ids_TK, weights_TK, self.experts, backend=self.backend, combine=False)


class DecoderLayer(nn.Module):
    """Attention and experts; each reads a norm of the residual stream and adds its output to it."""

    def __init__(self, config: TextConfig, part: Part, moe_backend: str, number: int):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = Attention(config, part, fp8=number in config.fp8_attention)
        self.moe_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = MoE(config, part, moe_backend, fp8=number in config.fp8_experts)

    def forward(
        self, stream: ResidualStream, cos_TF: Tensor, sin_TF: Tensor, batch: Batch, layer_cache: Tensor | None
    ) -> None:
        stream.add(self.attn(stream.normed(self.attn_norm), cos_TF, sin_TF, batch, layer_cache))
        stream.add(self.moe(stream.normed(self.moe_norm), batch.padding_T))


class Decoder(nn.Module):
    """Token embeddings, the layers, and the last norm.

    Args:
        config: sizes.
        part: what this rank holds of them.
        ranks: who holds the rest.
        moe_backend: see :class:`.Qwen3VLMoe`.
    """

    def __init__(self, config: TextConfig, part: Part, ranks: Ranks, moe_backend: str):
        super().__init__()
        self.config, self.ranks = config, ranks
        self.embed = ops.Embedding(part.vocabulary, config.hidden_size, ranks)
        self.layers = nn.ModuleList(
            DecoderLayer(config, part, moe_backend, number) for number in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def set_moe(self, backend: str) -> None:
        """Have all layers call another implementation of the experts from now on."""
        for moe in self.modules():
            if isinstance(moe, MoE):
                moe.backend = backend

    def forward(self, batch: Batch, kv_cache: Tensor | None) -> Tensor:
        """Normed hidden states of the rows whose logits are wanted, [R, H]. For kv_cache see ``Qwen3VLMoe.forward``."""
        return self.run_layers(self.embed_tokens(batch), batch, kv_cache)

    def embed_tokens(self, batch: Batch) -> Tensor:
        """What the first layer reads, [T, H]: token embeddings, and visual tokens in their places."""
        x_TH = self.embed(batch.input_ids_T)
        if batch.visual is not None:
            x_TH.index_copy_(0, batch.visual.rows_M, batch.visual.embeds_MH)
        return x_TH

    def run_layers(self, x_TH: Tensor, batch: Batch, kv_cache: Tensor | None) -> Tensor:
        """All layers and the last norm. ``x_TH`` may be overwritten."""
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, device=x_TH.device)
        cos_TF, sin_TF = mrope_angles(batch.positions_3T, frequencies, config.mrope_section)

        stream = ResidualStream(x_TH, self.ranks)
        for number, layer in enumerate(self.layers):
            layer(stream, cos_TF, sin_TF, batch, None if kv_cache is None else kv_cache[number])
            if batch.visual is not None and number < len(batch.visual.deepstack_LMH):
                stream.add_rows(batch.visual.rows_M, batch.visual.deepstack_LMH[number])
        return stream.rows(batch.logit_rows).normed(self.norm)
