"""Logits to tokens: constraints, penalties, temperature, truncation, one draw per sequence; and log-probabilities.

A greedy row depends on its logits alone, and one with a seed also on its own generator, so neither depends on the rest
of the batch. Rows without a seed share the engine's generator.

Tokens are drawn by an exponential race: each token's arrival time is exponential with its probability as rate, and the
first one wins. So a rounding difference in the logits changes the draw only where two tokens arrive at about the same
time, and without truncation nothing has to be sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3vl_moe.engine.penalties import Penalties
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.ops.transfer import to_device

TokenLogprob = tuple[int, float, int]  # token id, natural log-probability, rank


@dataclass(frozen=True)
class SamplingPlan:
    """What a step's sampling needs to know of its sequences; the same from step to step as long as they are.

    Attributes:
        sequences: R of them, in row order.
        constrained: rows whose logits are changed by constraints.
        penalties: of the rows that have any; None: none has.
        drawn_D: int64 rows whose tokens are drawn, on the device; the others are greedy.
        temperature_D1: of these, fp32.
        seeded: which of these have generators of their own.
        truncated: int64 [C], which of these have a top_k, top_p or min_p; None: none.
        top_k, top_p_C1, min_p_C1: of those.
        asked: rows whose log-probabilities are asked for, and of how many tokens beside their own (-1: of all).
    """

    sequences: list[Sequence]
    constrained: list[int]
    penalties: Penalties | None
    drawn_D: Tensor
    temperature_D1: Tensor
    seeded: list[tuple[int, torch.Generator]]
    truncated: Tensor | None
    top_k: list[int]
    top_p_C1: Tensor
    min_p_C1: Tensor
    asked: list[tuple[int, int]]

    @classmethod
    def of(cls, sequences: list[Sequence], device: torch.device | str, pending_R: Tensor | None = None) -> SamplingPlan:
        """The plan of sequences in row order.

        Args:
            device: of the logits.
            pending_R: int64 on the device, each sequence's last token, where the host does not know it yet.
        """
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
        params = [sequences[row].params for row in drawn]
        truncated = [number for number, of_row in enumerate(params) if of_row.truncated]
        columns = torch.tensor([(params[n].top_p, params[n].min_p) for n in truncated]).reshape(-1, 2)
        return cls(
            sequences=sequences,
            constrained=[row for row, sequence in enumerate(sequences) if sequence.constraints is not None],
            penalties=Penalties.of(sequences, device, pending_R),
            drawn_D=to_device(torch.tensor(drawn, dtype=torch.int64), device),
            temperature_D1=to_device(torch.tensor([of_row.temperature for of_row in params]), device)[:, None],
            seeded=[(n, own) for n, row in enumerate(drawn) if (own := sequences[row].generator) is not None],
            truncated=to_device(torch.tensor(truncated), device) if truncated else None,
            top_k=[params[number].top_k or 0 for number in truncated],
            top_p_C1=to_device(columns[:, :1], device),
            min_p_C1=to_device(columns[:, 1:], device),
            asked=[(row, n) for row, sequence in enumerate(sequences) if (n := sequence.params.logprobs) is not None],
        )

    def serves(self, sequences: list[Sequence], pending: bool) -> bool:
        """Whether it is the plan of these sequences, after what has been sampled so far.

        Args:
            pending: whether each has a token that the host does not know yet.
        """
        return self.sequences == sequences and (self.penalties is None or self.penalties.are_of(sequences, pending))


def sample(logits_RV: Tensor, plan: SamplingPlan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The next token of each sequence, int64 [R], and its highest logit, fp32 [R], on the device of the logits.

    The highest logit is finite unless the row holds a NaN or an infinity, or the constraints leave no token: the token
    then means nothing. It is for the host to look at, once it reads the tokens anyway.

    Args:
        logits_RV: of each sequence's last token, any floating dtype.
        plan: of these sequences; it knows the tokens afterwards.
        generator: random numbers, on the same device, for sequences without a generator of their own.
    """
    logits_RV = logits_RV.float()
    if plan.constrained or plan.penalties is not None:
        logits_RV = logits_RV.clone()  # the caller's logits stay raw: log-probabilities are taken from them
    for row in plan.constrained:
        sequence = plan.sequences[row]
        assert sequence.constraints is not None
        sequence.constraints.apply(logits_RV[row], sequence.output_ids)
    if plan.penalties is not None:
        plan.penalties.apply(logits_RV)
    tokens_R = logits_RV.argmax(-1)  # of a row with a NaN, the NaN's place
    highest_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
    if len(plan.drawn_D) == len(tokens_R):
        tokens_R = _draw(logits_RV, plan, generator)
    elif len(plan.drawn_D):
        tokens_R[plan.drawn_D] = _draw(logits_RV[plan.drawn_D], plan, generator)
    if plan.penalties is not None:
        plan.penalties.append(tokens_R)
    return tokens_R, highest_R


def _draw(logits_DV: Tensor, plan: SamplingPlan, generator: torch.Generator) -> Tensor:
    """One random token per row that is drawn, int64 [D]."""
    logits_DV = logits_DV / plan.temperature_D1
    if plan.truncated is not None:
        logits_CV = logits_DV[plan.truncated]
        lowest_C1 = _truncation(logits_CV, plan.top_k, plan.top_p_C1, plan.min_p_C1)
        logits_DV[plan.truncated] = logits_CV.where(logits_CV >= lowest_C1, -torch.inf)
    times_DV = torch.empty_like(logits_DV).exponential_(generator=generator)
    for row, own in plan.seeded:
        times_DV[row].exponential_(generator=own)
    return logits_DV.softmax(-1).div_(times_DV).argmax(-1)


def _truncation(logits_RV: Tensor, top_k: list[int], top_p_R1: Tensor, min_p_R1: Tensor) -> Tensor:
    """The lowest logit that each row may draw, [R, 1]: min_p, then top_k, then top_p over what is left.

    The limit is a value, so tokens that tie with the last one kept are kept too.
    """
    vocabulary = logits_RV.shape[1]
    top_k = [k if 0 < k < vocabulary else vocabulary for k in top_k]
    # Sorting a whole vocabulary is slow; where every row has a top_k, its best few suffice.
    sorted_RK = logits_RV.topk(max(top_k), dim=-1).values
    k_R1 = to_device(torch.tensor(top_k), logits_RV.device)[:, None]
    out_of_k = torch.arange(max(top_k), device=logits_RV.device) >= k_R1
    too_rare = sorted_RK < sorted_RK[:, :1] + min_p_R1.log()
    probabilities_RK = sorted_RK.masked_fill(out_of_k | too_rare, -torch.inf).softmax(-1)
    before_RK = probabilities_RK.cumsum(-1) - probabilities_RK
    kept_RK = (probabilities_RK > 0) & (before_RK < top_p_R1)
    kept_RK[:, 0] = True
    return sorted_RK.gather(1, kept_RK.sum(-1, keepdim=True) - 1)


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Raw log-probabilities of each row: of its own token first, then of the ``num_top`` most likely ones.

    Returns:
        token ids, log-probabilities and ranks, [R, 1 + num_top] each, on the device; :func:`readable` reads them.
    """
    logprobs_RV = logits_RV.float().log_softmax(-1)
    own_R1 = logprobs_RV.gather(1, tokens_R[:, None])
    rank_R1 = (logprobs_RV > own_R1).sum(-1, keepdim=True) + 1
    top = logprobs_RV.topk(min(num_top, logits_RV.shape[1]), dim=-1)
    ranks = torch.arange(1, top.indices.shape[1] + 1, device=logits_RV.device).expand_as(top.indices)
    return (
        torch.cat([tokens_R[:, None], top.indices], dim=1),
        torch.cat([own_R1, top.values], dim=1),
        torch.cat([rank_R1, ranks], dim=1),
    )


def readable(logprobs: tuple[Tensor, ...]) -> list[list[TokenLogprob]]:
    """What :func:`token_logprobs` gave, row by row."""
    return [list(zip(*row, strict=True)) for row in zip(*(part.tolist() for part in logprobs), strict=True)]
