"""Fused mixture-of-experts for Hopper GPUs, in Triton and Gluon, and in plain Triton for all from 8.0 on.

`backend="triton"` is the second, `backend="reference"` the same in plain torch.

    ids_TK, weights_TK = tma_moe.route(logits_TE, k)
    y_TH = tma_moe.fused_moe(x_TH, ids_TK, weights_TK, experts)     # experts: tma_moe.ExpertWeights

Shape letters, here and in every file: T tokens, H hidden, E experts, K chosen experts, I expert width.
Importing this package needs neither a GPU nor triton; `unavailable` says what a backend is missing.

To read it: op.py (what is asked), reference.py (what is right), recipe.py (what is launched), routing.py (who goes
where), then gemm/ (the products, named by one grammar), combine.py, and pdl.py (how launches overlap). portable/ has
the products of backend "triton".
"""

from tma_moe.block_fp8 import FP8
from tma_moe.descriptor_policies import descriptor_policy, descriptor_stats, set_descriptor_policy
from tma_moe.expert_weights import ExpertWeights
from tma_moe.op import fused_moe, route
from tma_moe.support import gluon_problem, unavailable
from tma_moe.uncombined import Uncombined

__version__ = "0.1.0"

__all__ = [
    "FP8",
    "ExpertWeights",
    "Uncombined",
    "descriptor_policy",
    "descriptor_stats",
    "fused_moe",
    "gluon_problem",
    "route",
    "set_descriptor_policy",
    "unavailable",
]
