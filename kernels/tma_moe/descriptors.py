"""TMA descriptors: where a matrix lies in memory, and which block of it one load brings.

`ExpertWeights` owns those of its weights, one for each matrix, view and block shape. A descriptor refers to the live
nn.Parameter, so it follows `.to()` and `param.data = ...`, is dropped when the parameter is bound anew, and keeps no
memory alive by itself. Triton encodes it at every launch, from the small Python object that is kept here; under a CUDA
graph the encoding is part of the graph and costs nothing. Descriptors of activations are made for one call.

Two other ways to come by a weight's descriptor, and what they cost, are in descriptor_policies.py.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tma_moe.expert_weights import ExpertWeights

View = Callable[[Tensor], tuple[list[int], list[int]]]
"""Shape and strides under which the blocks of a weight [E, N, K] are addressed; the gemm files have them."""

built = 0  # descriptors of weights made since `descriptor_stats(reset=True)` was last called

# Set by descriptor_policies.py while a policy other than "owned" is active.
override: Callable[..., Any] | None = None


def weight_descriptor(
    experts: ExpertWeights, name: str, view: View, block: tuple[int, ...], gluon: bool = False
) -> Any:
    """The descriptor of a parameter for one view and block shape.

    Args:
        experts: the weights.
        name: "gate_up" or "down".
        view: how blocks are addressed.
        block: of one load.
        gluon: the kind of descriptor that Gluon kernels take.
    """
    if override is not None:
        return override(experts, name, view, block, gluon)
    weight, key = experts.parameter(name), (name, view, block, gluon)
    descriptor = experts.descriptors.get(key)
    # Identity is the whole check: each launch reads the address from the parameter itself.
    if descriptor is None or descriptor.base is not weight:
        # Two threads may both get here; either object serves.
        descriptor = experts.descriptors[key] = build(weight, view, block, gluon)
    return descriptor


def activation_descriptor(tensor: Tensor, block: tuple[int, int], gluon: bool = False) -> Any:
    """A descriptor of a matrix for this call only."""
    return _descriptor_type(gluon, 8 * tensor.element_size(), 2)(
        tensor, list(tensor.shape), [tensor.shape[1], 1], list(block)
    )


def build(weight: Tensor, view: View, block: tuple[int, ...], gluon: bool) -> Any:
    """A new descriptor of a weight."""
    global built
    built += 1
    return _descriptor_type(gluon, 8 * weight.element_size(), len(block))(weight, *view(weight), list(block))


@functools.cache
def _descriptor_type(gluon: bool, bits: int, rank: int) -> Callable:
    """The class of a descriptor. A Gluon kernel's also states the shared-memory layout: swizzled rows of 128 bytes."""
    if not gluon:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=rank)
    return functools.partial(TensorDescriptor, layout=layout)
