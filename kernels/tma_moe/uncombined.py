"""Expert outputs not yet summed, for a kernel that fuses the sum with other work."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Uncombined:
    """What `fused_moe(..., combine=False)` may return: y[t] is the sum over k of weights[t, k] * rows[t, k].

    | rows    | [T, K, H] | the dtype of x; undefined where the id is no expert              |
    | ids     | [T, K]    | int32 or int64; outside [0, num_experts) contributes nothing      |
    | weights | [T, K]    | float32 (or the dtype of x)                                       |

    `kept`: the rows were stored with L2's evict_last policy; their last reader should load them with evict_first.
    A kernel takes the sum with `tma_moe.combine.weighted_sum`.
    """

    rows_TKH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    num_experts: int
    kept: bool

    def combined(self, out: Tensor | None = None) -> Tensor:
        """The sums [T, H], in the dtype of the rows: what `combine=True` would have given. `out`: where to."""
        from tma_moe.combine import combine_rows
        from tma_moe.launcher import current_stream, device_guard

        T, _, H = self.rows_TKH.shape
        y_TH = self.rows_TKH.new_empty(T, H) if out is None else out
        with device_guard(y_TH.device):
            stream = current_stream(y_TH.device)
            combine_rows(stream, self.rows_TKH, self.ids_TK, self.weights_TK, self.num_experts, self.kept, y_TH)
        return y_TH

    def __getitem__(self, tokens: Tensor) -> Uncombined:
        """The same of some tokens (an index [R])."""
        return Uncombined(
            self.rows_TKH[tokens], self.ids_TK[tokens], self.weights_TK[tokens], self.num_experts, self.kept
        )
