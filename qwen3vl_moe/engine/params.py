"""How to choose tokens: what a caller may set, and what a checkpoint sets where the caller does not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen3vl_moe.errors import CheckpointError, OptionError

_GREEDY_BELOW = 1e-5  # dividing logits by less than this would overflow to no purpose


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; the names and meanings are vLLM's.

    What is left None comes from the checkpoint's generation_config.json (a file that does not say ``do_sample: true``
    means greedy, as in transformers), else from the neutral value.

    Attributes:
        max_tokens: most tokens to generate; None and no ``max_new_tokens`` in the checkpoint: until ``max_model_len``.
        temperature: 0 is greedy. Logits are divided by it.
        top_p: keep the most likely tokens until their probabilities add up to this, in (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: of tokens in prompt or answer, positive logits are divided by it, negative ones multiplied.
        presence_penalty: subtracted from the logit of every token that is in the answer.
        frequency_penalty: subtracted once for every time that the token is in the answer.
        stop: texts that end the answer; they are left out of it.
        stop_token_ids: tokens that end the answer; their text is left out of it.
        ignore_eos: go on after the checkpoint's end-of-text tokens.
        seed: the same seed gives the same tokens, whatever else is in the batch.
        logprobs: for each generated token, its log-probability and those of this many most likely tokens. They are of
            the model's own distribution: before penalties, temperature and truncation.
        prompt_logprobs: the same for each prompt token but the first.

    Raises:
        OptionError: a value is outside of what is possible; the message names it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise OptionError(f"stop={self.stop!r}: a non-empty string or a list of them is needed")
        ids = self.stop_token_ids or ()
        if not isinstance(ids, list | tuple) or not all(_is_integer(i) and i >= 0 for i in ids):
            raise OptionError(f"stop_token_ids={self.stop_token_ids!r}: a list of token ids is needed")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

        self._check_integer("max_tokens", "an integer of at least 1", lambda n: n >= 1)
        self._check_integer("top_k", "0 or -1 (keep all) or an integer of at least 1", lambda n: n >= -1)
        self._check_integer("seed", "an integer", lambda n: True)
        self._check_integer("logprobs", "an integer of at least 0", lambda n: n >= 0)
        self._check_integer("prompt_logprobs", "an integer of at least 0", lambda n: n >= 0)
        self._check_number("temperature", "0 (greedy) or a positive number", lambda x: x >= 0)
        self._check_number("top_p", "a number above 0 and at most 1", lambda x: 0 < x <= 1)
        self._check_number("min_p", "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check_number("repetition_penalty", "a positive number (1 is off)", lambda x: x > 0)
        self._check_number("presence_penalty", "a number from -2 to 2 (0 is off)", lambda x: -2 <= x <= 2)
        self._check_number("frequency_penalty", "a number from -2 to 2 (0 is off)", lambda x: -2 <= x <= 2)

    def _check_integer(self, name: str, needed: str, possible) -> None:
        value = getattr(self, name)
        if value is not None and not (_is_integer(value) and possible(value)):
            raise OptionError(f"{name}={value!r}: {needed} is needed")

    def _check_number(self, name: str, needed: str, possible) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (is_number and possible(value)):
            raise OptionError(f"{name}={value!r}: {needed} is needed")

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def truncated(self) -> bool:
        """Whether some tokens are ruled out before one is drawn."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says about generation: end-of-text tokens and values for unset sampling parameters."""

    eos_token_ids: frozenset[int] = frozenset()
    params: SamplingParams = SamplingParams()

    @classmethod
    def from_pretrained(cls, directory: str | Path, tokenizer_eos: int | None = None) -> GenerationDefaults:
        """Read ``directory/generation_config.json``; a checkpoint without one decodes greedily.

        Args:
            directory: the checkpoint.
            tokenizer_eos: the end-of-text token where the file names none.

        Raises:
            CheckpointError: the file is no JSON object or holds an impossible value.
        """
        path = Path(directory) / "generation_config.json"
        raw = _read_object(path) if path.exists() else {}
        eos = raw.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(_is_integer(token) for token in eos):
            raise CheckpointError(f"{path}: eos_token_id is {raw['eos_token_id']!r}; token ids are needed")
        if not eos and tokenizer_eos is not None:
            eos = [tokenizer_eos]
        try:
            params = SamplingParams(
                max_tokens=raw.get("max_new_tokens"),
                temperature=raw.get("temperature", 1.0) if raw.get("do_sample") else 0.0,
                top_p=raw.get("top_p"),
                top_k=raw.get("top_k"),
                min_p=raw.get("min_p"),
                repetition_penalty=raw.get("repetition_penalty"),
            )
        except OptionError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(frozenset(eos), params)

    def complete(self, params: SamplingParams) -> SamplingParams:
        """``params`` with every unset value filled in; only max_tokens may stay None."""
        neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        filled: dict[str, Any] = {}
        for field in fields(params):
            if getattr(params, field.name) is None:
                default = getattr(self.params, field.name)
                filled[field.name] = neutral.get(field.name) if default is None else default
        return replace(params, **filled)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, got {type(raw).__name__}")
    return raw
