"""Repetition, frequency and presence penalties, on the device: a step needs no token that the host has not read yet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.ops.transfer import to_device

_ROWS = 32  # whose tokens are counted at a time: a count for each of 152 thousand tokens is 0.6 MB
_ROOM = 256  # tokens for which the table of tokens grows


@dataclass
class Penalties:
    """Of the P rows of a step that have any.

    Attributes:
        rows: their numbers in the step.
        lens: how many tokens of each the table holds.
        rows_P: the same as ``rows``, int64 on the device.
        tokens_PL: int64, prompt and answer of each; what follows them is -1.
        first_P1: where the answer begins.
        repetition_P1, frequency_P1, presence_P1: fp32.
    """

    rows: list[int]
    lens: list[int]
    rows_P: Tensor
    tokens_PL: Tensor
    first_P1: Tensor
    repetition_P1: Tensor
    frequency_P1: Tensor
    presence_P1: Tensor

    @classmethod
    def of(cls, sequences: list[Sequence], device: torch.device | str, pending_R: Tensor | None) -> Penalties | None:
        """See :meth:`.sampler.SamplingPlan.of`; None if no sequence has a penalty."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.params.penalised]
        if not rows:
            return None
        known = [sequences[row] for row in rows]
        lens = [len(sequence.token_ids) for sequence in known]
        table = np.full((len(rows), max(lens) + _ROOM), -1)
        for number, sequence in enumerate(known):
            table[number, : lens[number]] = sequence.token_ids
        columns = torch.tensor(
            [(s.params.repetition_penalty or 1.0, s.params.frequency_penalty, s.params.presence_penalty) for s in known]
        )
        repetition_P1, frequency_P1, presence_P1 = to_device(columns, device).split(1, dim=1)
        made = cls(
            rows,
            lens,
            to_device(torch.tensor(rows), device),
            to_device(torch.from_numpy(table), device),
            to_device(torch.tensor([[sequence.num_prompt_tokens] for sequence in known]), device),
            repetition_P1,
            frequency_P1,
            presence_P1,
        )
        if pending_R is not None:
            made.append(pending_R)
        return made

    def are_of(self, sequences: list[Sequence], pending: bool) -> bool:
        """Whether the table holds just the tokens of these sequences, ``pending`` ones included."""
        return self.lens == [len(sequences[row].token_ids) + pending for row in self.rows]

    def append(self, tokens_R: Tensor) -> None:
        """Each row's next token."""
        places = to_device(torch.tensor(self.lens)[:, None], tokens_R.device)
        if max(self.lens) == self.tokens_PL.shape[1]:
            self.tokens_PL = torch.nn.functional.pad(self.tokens_PL, (0, _ROOM), value=-1)
        self.tokens_PL.scatter_(1, places, tokens_R[self.rows_P][:, None])
        self.lens = [length + 1 for length in self.lens]

    def apply(self, logits_RV: Tensor) -> None:
        """Change logits of the rows in place, fp32: repetition over prompt and answer, the others over the answer."""
        for at in range(0, len(self.rows), _ROWS):
            part = slice(at, at + _ROWS)
            tokens_PL, rows_P = self.tokens_PL[part], self.rows_P[part]
            logits_PV = logits_RV[rows_P]
            is_token_PL = (tokens_PL >= 0).float()
            places = torch.arange(tokens_PL.shape[1], device=logits_RV.device)
            in_answer_PL = is_token_PL * (places >= self.first_P1[part])
            tokens_PL = tokens_PL.clamp(min=0)
            seen_PV = torch.zeros_like(logits_PV).scatter_add_(1, tokens_PL, is_token_PL) > 0
            counts_PV = torch.zeros_like(logits_PV).scatter_add_(1, tokens_PL, in_answer_PL)
            repetition_P1 = self.repetition_P1[part]
            weaker_PV = torch.where(logits_PV > 0, logits_PV / repetition_P1, logits_PV * repetition_P1)
            logits_PV = torch.where(seen_PV, weaker_PV, logits_PV)
            logits_PV -= self.frequency_P1[part] * counts_PV + self.presence_P1[part] * (counts_PV > 0)
            logits_RV[rows_P] = logits_PV
