"""How far is one evaluation of a model from another, token by token, and is that too far?

The yardstick is an fp32 evaluation of the same weights. What the working dtype costs is the distance of a peer from it,
another implementation in that dtype, and an implementation is right if its own distance is at most twice the peer's.
Two measures are taken of each token: |delta log p| of the token that stands there, and the KL divergence of everything
that the model says, which grows with the square of an error, so that twice the error is four times the divergence.

Rounding now and then sends a token to another expert, and its error is then a hundred times that of its neighbours. So
the errors have a long tail: over a thousand tokens their sum is that of a few, and the maxima of two equally good
evaluations differ by more than a factor of two by chance. Therefore each measure is judged twice, token against token,
and what exceeds has to exceed by three standard errors:

- at more than half of the tokens the error is more than twice the peer's. If both round alike that is so at 30 % of
  them, and at 50 % if one rounds twice as coarsely. It finds rounding everywhere, and faults that touch most tokens;
- the mean error is more than twice the peer's. It finds a fault that touches a few tokens in a hundred.

The largest error is shown, and not judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_ROWS = 256  # rows compared at once, in fp64: at the published vocabulary a third of a GB for each tensor
_BEYOND_CHANCE = 3.0  # standard errors


@dataclass
class Distance:
    """Errors of one evaluation at many tokens, fp64 on the CPU.

    Attributes:
        deltas: |delta log p| of the tokens themselves.
        divergences: KL(exact || other), nats; empty where only the tokens' own probabilities are known.
        agreeing: whether both find the same token most likely, as 0 and 1; empty likewise.
    """

    deltas: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    agreeing: list[Tensor] = field(default_factory=list)

    def add_logits(self, exact_TV: Tensor, other_TV: Tensor, targets_T: Tensor) -> None:
        """Compare two evaluations, logits [T, V], at the tokens ``targets_T`` that followed."""
        for start in range(0, len(targets_T), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p, log_q = exact_TV[rows].double().log_softmax(-1), other_TV[rows].double().log_softmax(-1)
            columns = targets_T[rows, None]
            self.add((log_q - log_p).gather(1, columns).flatten())
            self.divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
            self.agreeing.append((log_p.argmax(-1) == log_q.argmax(-1)).double().cpu())

    def add(self, deltas_T: Tensor) -> None:
        """Compare log-probabilities of the tokens alone, given as differences [T]."""
        self.deltas.append(deltas_T.double().abs().cpu())

    def too_far(self, peer: Distance) -> list[str]:
        """What exceeds twice the peer's error at the same tokens; empty if nothing does. A NaN exceeds."""
        found = []
        for name, factor, own, theirs in (
            ("|Δ log p|", 2, self.deltas, peer.deltas),
            ("KL", 4, self.divergences, peer.divergences),
        ):
            if not own:
                continue
            own_T, bound_T = torch.cat(own), factor * torch.cat(theirs)
            more_T, excess_T = (~(own_T <= bound_T)).double() - 0.5, own_T - bound_T
            found += [f"{name} of most tokens"] * _exceeds(more_T) + [f"mean {name}"] * _exceeds(excess_T)
        return found

    def figures(self) -> dict[str, float | int | None]:
        deltas_T = torch.cat(self.deltas)
        divergences_T = torch.cat(self.divergences) if self.divergences else None
        return {
            "tokens": len(deltas_T),
            "median": float(deltas_T.median()),
            "mean": float(deltas_T.mean()),
            "largest": float(deltas_T.max()),
            "median_kl": None if divergences_T is None else float(divergences_T.median()),
            "kl": None if divergences_T is None else float(divergences_T.mean()),
            "top1": float(torch.cat(self.agreeing).mean()) if self.agreeing else None,
        }


def _exceeds(values_T: Tensor) -> bool:
    """Whether their sum is above 0 by three standard errors, as it cannot be for fewer than 10 values."""
    chance = _BEYOND_CHANCE * values_T.square().sum().sqrt()
    return not values_T.isfinite().all() or bool(values_T.sum() > chance)


def of_tokens(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Log-probability [T] (fp64) of each target."""
    parts = zip(logits_TV.split(_ROWS), targets_T.split(_ROWS), strict=True)
    found = [logits.double().log_softmax(-1).gather(1, targets[:, None]).flatten() for logits, targets in parts]
    return torch.cat(found)
