"""The two operations in plain torch: the definition of correct, on any device and in any floating dtype.

In float32 both agree with transformers 5.17 (`Qwen3VLMoeTextTopKRouter` before its cast of the weights back to the
logits' dtype, and `Qwen3VLMoeTextExperts`); in bf16 and fp16 every matrix product and activation rounds to the working
dtype, as an unfused implementation does.

With FP8 experts, activations are quantised before each product (block_fp8.py), the hidden values of an expert as they
are in float32; only an expert's output rounds to the working dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tma_moe.block_fp8 import quantize_rows, scaled_linear


def route_reference(logits_TE: Tensor, k: int, skip_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax in float32, the k largest, renormalised. Returns ids [T, K] int32 and weights [T, K] float32."""
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = torch.topk(probs_TE, k, dim=-1)
    ids_TK = ids_TK.to(torch.int32)
    if skip_T is not None:
        ids_TK.masked_fill_(skip_T[:, None], -1)
    return ids_TK, weights_TK / weights_TK.sum(dim=-1, keepdim=True)


def fused_moe_reference(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """y[t] = sum over k of weight[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])), with e = ids[t, k].

    Shapes: x [T, H], ids and weights [T, K], gate_up [E, 2I, H] (gate rows first), down [E, H, I], and of FP8 weights
    their scales as in `ExpertWeights`; returns [T, H]. The weighted sum is taken in float32. Ids outside [0, E)
    contribute nothing.
    """
    weights_TK = topk_weights_TK.float()
    y_TH = torch.zeros(x_TH.shape, dtype=torch.promote_types(x_TH.dtype, torch.float32), device=x_TH.device)
    for expert in range(gate_up.shape[0]):
        token, choice = torch.where(topk_ids_TK == expert)
        if token.numel() == 0:
            continue
        if gate_up_scale is None or down_scale is None:
            gate, up = F.linear(x_TH[token], gate_up[expert]).chunk(2, dim=-1)
            rows = F.linear(F.silu(gate) * up, down[expert])
        else:
            x8, x_scale = quantize_rows(x_TH[token])
            gate, up = scaled_linear(x8, x_scale, gate_up[expert], gate_up_scale[expert]).chunk(2, dim=-1)
            h8, h_scale = quantize_rows(F.silu(gate) * up)
            rows = scaled_linear(h8, h_scale, down[expert], down_scale[expert]).to(x_TH.dtype)
        y_TH.index_add_(0, token, rows.to(y_TH.dtype) * weights_TK[token, choice, None])
    return y_TH.to(x_TH.dtype)
