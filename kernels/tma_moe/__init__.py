"""Fused mixture-of-experts for Hopper GPUs, in Triton, with a plain-torch reference of the same signature.

    ids_TK, weights_TK = tma_moe.route(logits_TE, k)
    y_TH = tma_moe.fused_moe(x_TH, ids_TK, weights_TK, experts)     # experts: tma_moe.ExpertWeights

Shape letters, here and in every file: T tokens, H hidden, E experts, K chosen experts, I expert width.
Importing this package needs neither a GPU nor triton; `unavailable` says what backend "tma" is missing.
"""

from tma_moe.descriptors import descriptor_policy, descriptor_stats, set_descriptor_policy
from tma_moe.experts import ExpertWeights
from tma_moe.fused_moe import Uncombined, fused_moe, route
from tma_moe.support import unavailable

__all__ = [
    "ExpertWeights",
    "Uncombined",
    "descriptor_policy",
    "descriptor_stats",
    "fused_moe",
    "route",
    "set_descriptor_policy",
    "unavailable",
]
