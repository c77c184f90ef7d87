"""How far is one evaluation of a model from another, token by token?

The yardstick is an fp32 evaluation of the same weights, and the measure of what is allowed is a peer: transformers'
model, an independent implementation, in the working dtype. What the working dtype costs is the peer's distance from the
yardstick; an implementation is right if its own distance is at most twice that. Three figures are judged:

- the mean of |delta log p| of the tokens that stand there: a small error everywhere;
- its root mean square: a large error at a few tokens;
- the mean KL divergence, from everything that the model says: it grows with the square of an error, so that twice the
  error is four times the divergence.

The largest |delta log p| is shown but not judged. Rounding now and then sends a token to another expert, so the errors
have a long tail, and the maxima of two equally good evaluations differ by more than a factor of two by chance; a token
that is really wrong shows in the root mean square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256  # rows compared at once, in fp64: at the published vocabulary a third of a GB for each tensor


@dataclass
class Distance:
    """Distances of log-probabilities, summed over tokens.

    Attributes:
        count: tokens.
        absolute, squared: sums of |delta log p| and of its square.
        largest: largest |delta log p|.
        divergence: sum of KL(exact || other), nats; None where only the tokens' own probabilities are known.
        agreeing: tokens at which both find the same token most likely; None likewise.
    """

    count: int = 0
    absolute: float = 0.0
    squared: float = 0.0
    largest: float = 0.0
    divergence: float | None = None
    agreeing: int | None = None

    def add_logits(self, exact_TV: Tensor, other_TV: Tensor, targets_T: Tensor) -> None:
        """Compare two evaluations, logits [T, V], at the tokens ``targets_T`` that followed."""
        for start in range(0, len(targets_T), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p, log_q = exact_TV[rows].double().log_softmax(-1), other_TV[rows].double().log_softmax(-1)
            columns = targets_T[rows, None]
            self.add((log_q.gather(1, columns) - log_p.gather(1, columns)).flatten().tolist())
            self.divergence = (self.divergence or 0.0) + float((log_p.exp() * (log_p - log_q)).sum())
            self.agreeing = (self.agreeing or 0) + int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def add(self, deltas: Sequence[float]) -> None:
        """Compare log-probabilities of the tokens alone."""
        self.count += len(deltas)
        self.absolute += sum(map(abs, deltas))
        self.squared += sum(delta * delta for delta in deltas)
        # max() would pass over a NaN.
        self.largest = max([self.largest, *map(abs, deltas)]) if all(map(math.isfinite, deltas)) else math.nan

    @property
    def mean(self) -> float:
        return self.absolute / self.count

    @property
    def rms(self) -> float:
        return math.sqrt(self.squared / self.count)

    @property
    def kl(self) -> float | None:
        return None if self.divergence is None else self.divergence / self.count

    @property
    def top1(self) -> float | None:
        return None if self.agreeing is None else self.agreeing / self.count

    def within(self, peer: Distance) -> bool:
        """Whether this error is at most twice the peer's (a NaN is not)."""
        bounds = [(self.mean, 2 * peer.mean), (self.rms, 2 * peer.rms)]
        if self.kl is not None and peer.kl is not None:
            bounds.append((self.kl, 4 * peer.kl))
        return all(value <= bound for value, bound in bounds)

    def figures(self) -> dict[str, float | int | None]:
        return {
            "tokens": self.count,
            "mean": self.mean,
            "rms": self.rms,
            "largest": self.largest,
            "kl": self.kl,
            "top1": self.top1,
        }


def of_tokens(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Log-probability [T] (fp64) of each target."""
    parts = zip(logits_TV.split(_ROWS), targets_T.split(_ROWS), strict=True)
    found = [logits.double().log_softmax(-1).gather(1, targets[:, None]).flatten() for logits, targets in parts]
    return torch.cat(found)
