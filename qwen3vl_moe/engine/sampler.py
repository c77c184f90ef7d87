"""Logits to tokens: constraints, penalties, temperature, truncation, one draw per sequence; and log-probabilities.

A greedy row depends on its logits alone, and one with a seed also on its own generator, so neither depends on the rest
of the batch. Rows without a seed share the engine's generator.

Tokens are drawn by an exponential race: each token's arrival time is exponential with its probability as rate, and the
first one wins. So a rounding difference in the logits changes the draw only where two tokens arrive at about the same
time, and without truncation nothing has to be sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.ops.transfer import to_device

TokenLogprob = tuple[int, float, int]  # token id, natural log-probability, rank


def sample(logits_RV: Tensor, sequences: list[Sequence], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The next token of each sequence, int64 [R], and its highest logit, fp32 [R], on the device of the logits.

    The highest logit is finite unless the row holds a NaN or an infinity, or the constraints leave no token: the token
    then means nothing. It is for the host to look at, once it reads the tokens anyway.

    Args:
        logits_RV: of each sequence's last token, any floating dtype.
        sequences: R of them, in row order.
        generator: random numbers, on the same device, for sequences without a generator of their own.
    """
    logits_RV = logits_RV.float()
    edited = [row for row, s in enumerate(sequences) if s.constraints is not None or s.params.penalised]
    if edited:
        logits_RV = logits_RV.clone()  # the caller's logits stay raw: log-probabilities are taken from them
        for row in edited:
            sequence = sequences[row]
            if sequence.constraints is not None:
                sequence.constraints.apply(logits_RV[row], sequence.output_ids)
            if sequence.params.penalised:
                _penalise(logits_RV[row], sequence)
    tokens_R = logits_RV.argmax(-1)  # of a row with a NaN, the NaN's place
    highest_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
    drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
    if drawn:
        rows = to_device(torch.tensor(drawn), logits_RV.device)
        tokens_R[rows] = _draw(logits_RV[rows], [sequences[row] for row in drawn], generator)
    return tokens_R, highest_R


def _penalise(logits_V: Tensor, sequence: Sequence) -> None:
    """Apply one request's penalties in place: repetition over prompt and answer, the others over the answer."""
    params, device = sequence.params, logits_V.device
    penalty = params.repetition_penalty
    if penalty is not None and penalty != 1.0:
        seen = torch.tensor(sequence.token_ids, device=device).unique()
        logits = logits_V[seen]
        logits_V[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    if sequence.output_ids:
        used, counts = torch.tensor(sequence.output_ids, device=device).unique(return_counts=True)
        logits_V[used] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(logits_RV: Tensor, sequences: list[Sequence], generator: torch.Generator) -> Tensor:
    """One random token per row, int64 [R]."""
    columns = [(s.params.temperature, s.params.top_p, s.params.min_p) for s in sequences]
    temperature_R, top_p_R, min_p_R = to_device(torch.tensor(columns), logits_RV.device).unbind(1)
    logits_RV = logits_RV / temperature_R[:, None]
    truncated = [row for row, sequence in enumerate(sequences) if sequence.params.truncated]
    if truncated:
        rows = to_device(torch.tensor(truncated), logits_RV.device)
        top_k = [sequences[row].params.top_k or 0 for row in truncated]
        lowest_R1 = _truncation(logits_RV[rows], top_k, top_p_R[rows], min_p_R[rows])
        logits_RV[rows] = logits_RV[rows].where(logits_RV[rows] >= lowest_R1, -torch.inf)
    times_RV = torch.empty_like(logits_RV).exponential_(generator=generator)
    for row, sequence in enumerate(sequences):
        if sequence.generator is not None:
            times_RV[row].exponential_(generator=sequence.generator)
    return (logits_RV.softmax(-1) / times_RV).argmax(-1)


def _truncation(logits_RV: Tensor, top_k: list[int], top_p_R: Tensor, min_p_R: Tensor) -> Tensor:
    """The lowest logit that each row may draw, [R, 1]: min_p, then top_k, then top_p over what is left.

    The limit is a value, so tokens that tie with the last one kept are kept too.
    """
    vocabulary = logits_RV.shape[1]
    top_k = [k if 0 < k < vocabulary else vocabulary for k in top_k]
    # Sorting a whole vocabulary is slow; where every row has a top_k, its best few suffice.
    sorted_RK = logits_RV.topk(max(top_k), dim=-1).values
    k_R1 = to_device(torch.tensor(top_k), logits_RV.device)[:, None]
    out_of_k = torch.arange(max(top_k), device=logits_RV.device) >= k_R1
    too_rare = sorted_RK < sorted_RK[:, :1] + min_p_R[:, None].log()
    probabilities_RK = sorted_RK.masked_fill(out_of_k | too_rare, -torch.inf).softmax(-1)
    before_RK = probabilities_RK.cumsum(-1) - probabilities_RK
    kept_RK = (probabilities_RK > 0) & (before_RK < top_p_R[:, None])
    kept_RK[:, 0] = True
    return sorted_RK.gather(1, kept_RK.sum(-1, keepdim=True) - 1)


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, num_top: int) -> list[list[TokenLogprob]]:
    """Raw log-probabilities of each row: of its own token first, then of the ``num_top`` most likely ones."""
    logprobs_RV = logits_RV.float().log_softmax(-1)
    own_R1 = logprobs_RV.gather(1, tokens_R[:, None])
    rank_R = (logprobs_RV > own_R1).sum(-1) + 1
    top = logprobs_RV.topk(min(num_top, logits_RV.shape[1]), dim=-1)
    ids = torch.cat([tokens_R[:, None], top.indices], dim=1).tolist()
    values = torch.cat([own_R1, top.values], dim=1).tolist()
    ranks = ([own, *range(1, len(ids[0]))] for own in rank_R.tolist())
    return [list(zip(*row, strict=True)) for row in zip(ids, values, ranks, strict=True)]
