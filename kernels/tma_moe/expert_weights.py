"""The weights of one layer's experts, in the one layout the kernels read."""

import torch
from torch import Tensor, nn

from tma_moe.block_fp8 import FP8, scale_shape

LAYOUTS = ("published", "transformers5")


class ExpertWeights(nn.Module):
    """Expert weights of one layer, and the owner of their TMA descriptors.

    Parameters (requires_grad False):
        gate_up [E, 2I, H]: the gate rows of an expert first, then its up rows; H contiguous.
        down    [E, H, I]:  I contiguous.
        gate_up_scale, down_scale: float32, of FP8 weights: one for each block of 128 x 128 (block_fp8.py), so
            [E, ceil(2I / 128), ceil(H / 128)] and [E, ceil(H / 128), ceil(I / 128)]; otherwise None.

    This is the layout of transformers 5 in memory, so nothing is repacked and no second copy exists. The parameters may
    be filled in place, re-bound, moved with `.to()`: a descriptor refers to the live parameter, and is dropped together
    with it.
    """

    gate_up: nn.Parameter
    down: nn.Parameter
    gate_up_scale: nn.Parameter | None
    down_scale: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Uninitialised parameters (`torch.empty`); the meta device works, and float8_e4m3fn brings scales.

        Raises ValueError for a size below one.
        """
        super().__init__()
        for name, size in (
            ("num_experts", num_experts),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ):
            if size < 1:
                raise ValueError(f"ExpertWeights: {name} must be at least 1, got {size}")
        # Descriptors of the two parameters, keyed by parameter, view, block shape and kind; filled by descriptors.py.
        self.descriptors: dict = {}
        gate_up = torch.empty(num_experts, 2 * intermediate_size, hidden_size, device=device, dtype=dtype)
        down = torch.empty(num_experts, hidden_size, intermediate_size, device=device, dtype=dtype)
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)
        for name, weight in (("gate_up_scale", gate_up), ("down_scale", down)):
            scale = torch.empty(scale_shape(weight.shape), device=device) if weight.dtype == FP8 else None
            self.register_parameter(name, None if scale is None else nn.Parameter(scale, requires_grad=False))

    @classmethod
    def from_checkpoint(
        cls,
        gate_up: Tensor,
        down: Tensor,
        layout: str,
        gate_up_scale: Tensor | None = None,
        down_scale: Tensor | None = None,
    ) -> "ExpertWeights":
        """Experts from checkpoint tensors.

        layout "published": gate_up [E, H, 2I] and down [E, I, H] (input-major, as the published files hold them; they
        are transposed into new memory). layout "transformers5": gate_up [E, 2I, H] and down [E, H, I], taken without a
        copy. The layout is declared, never guessed: the sizes of some models fit both. Scales, which FP8 weights need,
        lie as their weights do, in any floating dtype. Raises ValueError for an unknown layout or for shapes, dtypes
        or devices that do not belong together.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"ExpertWeights: unknown layout {layout!r}; use one of {', '.join(map(repr, LAYOUTS))}")
        if gate_up.dim() != 3 or down.dim() != 3:
            raise ValueError(
                "ExpertWeights: gate_up and down must have 3 dimensions, "
                f"got shapes {tuple(gate_up.shape)} and {tuple(down.shape)}"
            )
        given = f"layout {layout!r} with gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)}"
        if (gate_up_scale is None) != (down_scale is None):
            raise ValueError("ExpertWeights: FP8 weights need the scales of both gate_up and down")
        if layout == "published":
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
            if gate_up_scale is not None and down_scale is not None:
                gate_up_scale, down_scale = gate_up_scale.transpose(-1, -2), down_scale.transpose(-1, -2)
        num_experts, hidden, width = down.shape
        if gate_up.shape != (num_experts, 2 * width, hidden):
            raise ValueError(
                f"ExpertWeights: {given} do not belong together; 'published' is [E, H, 2I] and [E, I, H], "
                "'transformers5' is [E, 2I, H] and [E, H, I]"
            )
        if gate_up.dtype != down.dtype or gate_up.device != down.device:
            raise ValueError(
                f"ExpertWeights: gate_up is {gate_up.dtype} on {gate_up.device}, "
                f"down is {down.dtype} on {down.device}; both must be the same"
            )
        experts = cls(num_experts, hidden, width, device="meta", dtype=down.dtype)
        experts.gate_up = nn.Parameter(gate_up.detach().contiguous(), requires_grad=False)
        experts.down = nn.Parameter(down.detach().contiguous(), requires_grad=False)
        for name, scale, weight in (("gate_up_scale", gate_up_scale, gate_up), ("down_scale", down_scale, down)):
            if (scale is None) == (weight.dtype == FP8):
                raise ValueError(
                    f"ExpertWeights: {weight.dtype} weights {'need' if scale is None else 'have no'} scales"
                )
            if scale is None:
                continue
            if scale.shape != scale_shape(weight.shape) or not scale.is_floating_point():
                raise ValueError(
                    f"ExpertWeights: {name} of weights {list(weight.shape)} in our layout must be floating point of "
                    f"shape {list(scale_shape(weight.shape))}, got {scale.dtype} {list(scale.shape)}"
                )
            scale = scale.detach().to(weight.device, torch.float32).contiguous()
            setattr(experts, name, nn.Parameter(scale, requires_grad=False))
        return experts

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down.shape[2]

    def parameter(self, name: str) -> nn.Parameter:
        """gate_up or down, without nn.Module's attribute search: launches ask for them, and host time counts."""
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Re-binding (`experts.down = ...`) ends here: descriptors of the old parameter would keep its memory alive.
        super().register_parameter(name, param)
        self.descriptors.clear()

    def __getstate__(self) -> dict:
        # Descriptors belong to these parameters: a copied or pickled module makes its own.
        return {**self.__dict__, "descriptors": {}}

    def extra_repr(self) -> str:
        E, H, I = self.num_experts, self.hidden_size, self.intermediate_size  # noqa: E741
        return f"experts={E}, hidden={H}, width={I}, dtype={self.down.dtype}"
