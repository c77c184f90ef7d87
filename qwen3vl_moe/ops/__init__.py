"""What the model calls around its matrix products: one function per operation.

Each function decides by itself whether plain torch or one of our Triton kernels does the work (:mod:`.dispatch` has the
rule), so the model's definition never mentions a device. The plain forms are in :mod:`.reference`, which is also the
definition of correct; the kernels are in :mod:`.kernels`, a file for each operation.
"""

from qwen3vl_moe.ops.attend import attention, cached_attention
from qwen3vl_moe.ops.block_linear import BlockLinear, linear
from qwen3vl_moe.ops.embedding import Embedding
from qwen3vl_moe.ops.mlp import linear_gelu
from qwen3vl_moe.ops.patches import add_positions, cut_patches
from qwen3vl_moe.ops.ranks import ALONE, Ranks
from qwen3vl_moe.ops.residual import Addend, OpenProduct, ResidualStream
from qwen3vl_moe.ops.resize import resize_picture
from qwen3vl_moe.ops.rotation import rotate_and_store
from qwen3vl_moe.ops.segments import Segments

__all__ = [
    "ALONE",
    "Addend",
    "BlockLinear",
    "Embedding",
    "OpenProduct",
    "Ranks",
    "ResidualStream",
    "Segments",
    "add_positions",
    "attention",
    "cached_attention",
    "cut_patches",
    "linear",
    "linear_gelu",
    "resize_picture",
    "rotate_and_store",
]
