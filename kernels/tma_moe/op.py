"""The public operations: argument checks, and the choice of backend."""

import torch
from torch import Tensor

from tma_moe.block_fp8 import FP8, scale_shape
from tma_moe.expert_weights import ExpertWeights
from tma_moe.reference import fused_moe_reference, route_reference
from tma_moe.support import WAY_OUT, unavailable
from tma_moe.uncombined import Uncombined

BACKENDS = ("tma", "triton", "reference")
_ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SIZES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2, torch.float64: 8, FP8: 1}  # bytes of each dtype


def _check_backend(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{op}: unknown backend {backend!r}; use one of {', '.join(map(repr, BACKENDS))}")
    if backend != "reference" and (problem := unavailable(device, dtype, backend=backend)):
        raise RuntimeError(f'{op}: backend "{backend}" cannot run here: {problem}; {WAY_OUT}')


def route(
    logits_TE: Tensor, k: int, *, skip_T: Tensor | None = None, first: int = 0, backend: str = "tma"
) -> tuple[Tensor, Tensor]:
    """Chooses k experts for each token: softmax in float32, the k largest, renormalised to sum to one.

    | operand | shape  | dtype                    | layout          |
    | logits  | [T, E] | float32, bf16 or float16 | rows contiguous |
    | skip    | [T]    | bool                     | contiguous      |

    Returns ids [T, K] int32, by falling probability, and weights [T, K] float32. A token that is skipped goes to no
    expert: its ids are -1, which `fused_moe` leaves out. Ids are counted from the expert `first` on, for experts that
    are spread over several devices: an id that is none here is left out as well. Of equal probabilities
    backends "tma" and "triton" (one kernel) take the lowest id, as torch.topk does on CUDA; backend "reference" does
    what torch.topk does on its device.
    Raises TypeError, ValueError (shape, dtype, k) or RuntimeError (this backend cannot run on this device).
    """
    if logits_TE.dim() != 2:
        raise ValueError(f"route: logits must be [T, E], got shape {tuple(logits_TE.shape)}")
    if logits_TE.dtype not in _ACTIVATIONS:
        raise TypeError(f"route: logits must be floating point, got {logits_TE.dtype}")
    if not 1 <= k <= logits_TE.shape[1]:
        raise ValueError(f"route: k must be between 1 and the {logits_TE.shape[1]} experts, got {k}")
    if backend != "reference" and logits_TE.dtype == torch.float64:
        raise TypeError(f"route: backend {backend!r} takes float32, bfloat16 or float16 logits, not float64; {WAY_OUT}")
    T, device = len(logits_TE), logits_TE.device
    if skip_T is not None and (skip_T.dtype != torch.bool or skip_T.shape != (T,) or skip_T.device != device):
        raise ValueError(
            f"route: skip must be bool [T] on {device} with T = {T}, "
            f"got {skip_T.dtype} of shape {tuple(skip_T.shape)} on {skip_T.device}"
        )
    # Logits may be float32 beside bf16 activations, so the device is asked about a dtype that every backend knows.
    _check_backend("route", backend, device, torch.float16)
    if backend == "reference":
        ids_TK, weights_TK = route_reference(logits_TE, k, skip_T)
    else:
        from tma_moe.routing import route_kernel

        ids_TK, weights_TK = route_kernel(logits_TE, k, skip_T)
    return (ids_TK.sub_(first) if first else ids_TK), weights_TK


def fused_moe(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    experts: ExpertWeights,
    *,
    backend: str = "tma",
    combine: bool = True,
) -> Tensor | Uncombined:
    """y[t] = sum over k of weight[t, k] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])), with e = ids[t, k].

    | operand         | shape      | dtype                          | the kernels also need            |
    | x               | [T, H]     | bf16, float16, float32, ...    | bf16 or float16; "tma": H % 8 = 0 |
    | topk_ids        | [T, K]     | int32 or int64                 | contiguous                       |
    | topk_weights    | [T, K]     | float32 (or the dtype of x)    | contiguous                       |
    | experts.gate_up | [E, 2I, H] | that of x, or float8_e4m3fn    | contiguous, 16-byte aligned      |
    | experts.down    | [E, H, I]  | that of gate_up                | I multiple of 8 (FP8: both 16)   |

    Returns y [T, H] in the dtype of x. Products accumulate in float32, the weighted sum over k is taken in float32 in
    a fixed order, and no atomics touch an output: the result is bitwise the same from run to run. Ids outside [0, E)
    contribute nothing. Experts in FP8 have block scales, and their products are those of block_fp8.py: x and the
    hidden values are quantised on the way. With `combine=False` the sum may be left to the caller, as `Uncombined`,
    where it is a launch of its own (not for a few tokens, nor by the reference).

    Backend "tma" is for Hopper GPUs, "triton" for all from compute capability 8.0 on: there it takes any H and I, and
    FP8 weights meet x and hidden values as they are where the tensor cores do not multiply FP8 (below 8.9). Neither
    makes a host synchronisation, and both can be captured in a CUDA graph (run once before capture, so that kernels are
    compiled). Raises TypeError, ValueError (operands) or RuntimeError (the backend cannot run there, or is asked for
    gradients), each with one clear line.
    """
    operands = (x_TH, topk_ids_TK, topk_weights_TK, experts)
    sound = _sound(*operands)
    if not sound:
        _check_operands(*operands)
    _check_backend("fused_moe", backend, x_TH.device, x_TH.dtype)
    if backend == "reference":
        weights = experts.gate_up, experts.down, experts.gate_up_scale, experts.down_scale
        return fused_moe_reference(x_TH, topk_ids_TK, topk_weights_TK, *weights)
    if not sound:
        _check_layout(*operands, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_TH, topk_weights_TK, *experts.parameters())):
        raise RuntimeError(
            f'fused_moe: backend "{backend}" computes no gradients, and an operand asks for one; '
            f"call it under torch.inference_mode() or torch.no_grad(), or {WAY_OUT}"
        )
    if x_TH.shape[0] == 0:
        return torch.empty_like(x_TH)
    from tma_moe.recipe import fused_moe_kernels

    return fused_moe_kernels(*operands, combine, backend)


def _sound(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights) -> bool:
    """Whether all checks below pass, in one cheap pass (host time counts). If not, they raise the error."""
    gate_up, down = experts.parameter("gate_up"), experts.parameter("down")
    if down.dim() != 3 or ids_TK.dim() != 2:
        return False
    (E, H, I), (T, K), dtype, device = down.shape, ids_TK.shape, x_TH.dtype, x_TH.device  # noqa: E741
    address = x_TH.data_ptr() | ids_TK.data_ptr() | weights_TK.data_ptr() | gate_up.data_ptr() | down.data_ptr()
    return (
        x_TH.shape == (T, H)
        and weights_TK.shape == (T, K)
        and gate_up.shape == (E, 2 * I, H)
        and dtype in _ACTIVATIONS
        and (gate_up.dtype is dtype or _sound_scales(x_TH, experts))
        and down.dtype is gate_up.dtype
        and ids_TK.dtype in (torch.int32, torch.int64)
        and weights_TK.dtype in (torch.float32, dtype)
        and device == ids_TK.device == weights_TK.device == gate_up.device == down.device
        and x_TH.is_contiguous()
        and ids_TK.is_contiguous()
        and weights_TK.is_contiguous()
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and address % 16 == 0
        and (H | I) * _SIZES[down.dtype] % 16 == 0
        and K > 0
    )


def _sound_scales(x_TH: Tensor, experts: ExpertWeights) -> bool:
    """The same of the scales of FP8 experts."""
    gate_up, down = experts.parameter("gate_up"), experts.parameter("down")
    scales = experts.gate_up_scale, experts.down_scale
    return gate_up.dtype is FP8 and all(
        scale is not None
        and scale.dtype is torch.float32
        and scale.shape == scale_shape(weight.shape)
        and scale.device == x_TH.device
        and scale.is_contiguous()
        and scale.data_ptr() % 16 == 0
        for scale, weight in zip(scales, (gate_up, down), strict=True)
    )


def _check_operands(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights) -> None:
    gate_up, down = experts.gate_up, experts.down
    if x_TH.dim() != 2 or x_TH.shape[1] != down.shape[1]:
        raise ValueError(f"fused_moe: x must be [T, H] with H = {down.shape[1]}, got shape {tuple(x_TH.shape)}")
    T = x_TH.shape[0]
    if ids_TK.dim() != 2 or ids_TK.shape[0] != T or ids_TK.shape != weights_TK.shape or ids_TK.shape[1] < 1:
        raise ValueError(
            f"fused_moe: topk_ids and topk_weights must both be [T, K] with T = {T}, "
            f"got shapes {tuple(ids_TK.shape)} and {tuple(weights_TK.shape)}"
        )
    if gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        raise ValueError(
            f"fused_moe: experts.gate_up {tuple(gate_up.shape)} and experts.down {tuple(down.shape)} "
            "do not belong together; they must be [E, 2I, H] and [E, H, I]"
        )
    if ids_TK.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"fused_moe: topk_ids must be int32 or int64, got {ids_TK.dtype}")
    if x_TH.dtype not in _ACTIVATIONS or gate_up.dtype not in (x_TH.dtype, FP8) or down.dtype != gate_up.dtype:
        raise TypeError(
            f"fused_moe: x and the expert weights must share one floating dtype, got x {x_TH.dtype}, "
            f"gate_up {gate_up.dtype}, down {down.dtype} (only FP8 weights may differ from x)"
        )
    for name, weight in (("gate_up", gate_up), ("down", down)) if gate_up.dtype == FP8 else ():
        scale = getattr(experts, f"{name}_scale")
        if scale is None or scale.dtype != torch.float32 or scale.shape != scale_shape(weight.shape):
            found = "None" if scale is None else f"{scale.dtype} {list(scale.shape)}"
            raise ValueError(
                f"fused_moe: FP8 experts.{name} {list(weight.shape)} needs experts.{name}_scale, float32 "
                f"{list(scale_shape(weight.shape))}, got {found}"
            )
    if weights_TK.dtype not in (torch.float32, x_TH.dtype):
        raise TypeError(f"fused_moe: topk_weights must be float32 (or {x_TH.dtype}, as x), got {weights_TK.dtype}")
    device = x_TH.device
    scales = [scale for scale in (experts.gate_up_scale, experts.down_scale) if scale is not None]
    if any(each.device != device for each in (ids_TK, weights_TK, gate_up, down, *scales)):
        raise ValueError(
            f"fused_moe: all operands must be on one device, got x on {device}, topk_ids on {ids_TK.device}, "
            f"topk_weights on {weights_TK.device}, gate_up on {gate_up.device}, down on {down.device}"
        )


def _check_layout(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: ExpertWeights, backend: str) -> None:
    """What TMA and 16-byte loads need, beyond what the operation itself does."""
    H, I = experts.down.shape[1:]  # noqa: E741
    size = _SIZES[experts.down.dtype]
    if backend == "tma" and (H * size % 16 or I * size % 16):
        raise ValueError(
            f'fused_moe: backend "tma" needs rows of whole 16 bytes, so H and I must be multiples of {16 // size}; '
            f"got H = {H}, I = {I}; {WAY_OUT}"
        )
    names = ("x", "topk_ids", "topk_weights", "experts.gate_up", "experts.down")
    tensors = (x_TH, ids_TK, weights_TK, experts.gate_up, experts.down)
    if experts.gate_up_scale is not None and experts.down_scale is not None:
        names += ("experts.gate_up_scale", "experts.down_scale")
        tensors += (experts.gate_up_scale, experts.down_scale)
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(
                f'fused_moe: backend "{backend}" needs {name} contiguous, got strides {tensor.stride()}; '
                "call .contiguous()"
            )
        if tensor.data_ptr() % 16:
            raise ValueError(
                f'fused_moe: backend "{backend}" needs {name} at a multiple of 16 bytes; call .clone() on this slice'
            )
