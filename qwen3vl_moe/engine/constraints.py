"""What a request asks of single tokens: some are ruled out, others are made likelier or less likely."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qwen3vl_moe.engine.grammar import Grammar
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.ops.transfer import to_device


class Constraints:
    """Of one request; its n answers share them, but for a grammar. Nothing here is read back from the device.

    Args:
        params: complete.
        ending: tokens that would end the answer, ruled out before ``min_tokens``.
        suppressed: tokens that the checkpoint rules out.
        bad_words: token sequences that the answer must not hold.
        grammar: of the form that the answer has.

    Attributes:
        phrases: those of the bad words that have several tokens.
    """

    def __init__(
        self,
        params: SamplingParams,
        ending: Iterable[int] = (),
        suppressed: Iterable[int] = (),
        bad_words: Iterable[tuple[int, ...]] = (),
        grammar: Grammar | None = None,
    ):
        bad_words = list(bad_words)
        self.phrases = [words for words in bad_words if len(words) > 1]
        self._min_tokens, self._ending = params.min_tokens or 0, sorted(ending)
        self._allowed, self._bias = params.allowed_token_ids, params.logit_bias or {}
        self._ruled_out = sorted({*suppressed, *(words[0] for words in bad_words if len(words) == 1)})
        self._grammar = grammar
        self._on_device: tuple[Tensor, Tensor] | None = None

    def of_next_answer(self) -> Constraints:
        """The same for another answer of the request."""
        if self._grammar is None:
            return self
        other = copy.copy(self)
        other._grammar = self._grammar.anew()
        return other

    def __bool__(self) -> bool:
        """Whether there are any."""
        of_tokens = self._min_tokens or self._allowed or self._bias or self._ruled_out or self.phrases
        return bool(of_tokens) or self._grammar is not None

    def needs_history(self, num_output: int) -> bool:
        """Whether the next tokens depend on an answer of ``num_output`` tokens, beside the logits."""
        return bool(self.phrases) or num_output < self._min_tokens or self._grammar is not None

    def apply(self, logits_V: Tensor, output_ids: list[int]) -> None:
        """Change the logits of the answer's next token in place, fp32 [V]."""
        if self._on_device is None:
            self._on_device = self._bias_V(len(logits_V), logits_V.device), _ids(self._ending, logits_V.device)
        bias_V, ending = self._on_device
        if self._grammar is not None:
            self._grammar.apply(logits_V, output_ids)
        logits_V += bias_V
        if len(output_ids) < self._min_tokens:
            logits_V[ending] = -torch.inf
        forbidden = [
            words[-1]
            for words in self.phrases
            if len(words) <= len(output_ids) + 1 and tuple(output_ids[1 - len(words) :]) == words[:-1]
        ]
        if forbidden:
            logits_V[_ids(forbidden, logits_V.device)] = -torch.inf

    def _bias_V(self, vocabulary: int, device: torch.device) -> Tensor:
        """What never changes while the answer grows: fp32, -inf for what is ruled out."""
        bias_V = torch.zeros(vocabulary)
        if self._allowed is not None:
            bias_V.fill_(-torch.inf)[list(self._allowed)] = 0.0
        for token, bias in self._bias.items():
            bias_V[token] += bias
        bias_V[self._ruled_out] = -torch.inf
        return to_device(bias_V, device)


def _ids(tokens: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(tokens, dtype=torch.int64), device)


def tokens_of_bad_words(tokenizer: Any, words: Iterable[str]) -> list[tuple[int, ...]]:
    """Each text as the tokens that it becomes at a beginning, and after a space where these are as many (vLLM's rule).

    A space that became a token of its own would rule out whatever begins with one.
    """
    found = []
    for word in words:
        alone, after_space = (
            tuple(tokenizer.backend_tokenizer.encode(space + word.lstrip(), add_special_tokens=False).ids)
            for space in ("", " ")
        )
        found.append(alone)
        if after_space[:1] != alone[:1] and len(after_space) == len(alone):
            found.append(after_space)
    return [tokens for tokens in found if tokens]
