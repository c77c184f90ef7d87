"""What a caller may set, for a request and for the engine, and what a checkpoint sets where the caller does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from qwen3vl_moe.errors import CheckpointError, OptionError
from qwen3vl_moe.json_files import read_json_object

_GREEDY_BELOW = 1e-5  # below this, treat as greedy: the division could overflow
_POSSIBLE = {
    "max_tokens": (int, "an integer of at least 1", lambda n: n >= 1),
    "top_k": (int, "0 or -1 (keep all) or an integer of at least 1", lambda n: n >= -1),
    "seed": (int, "an integer from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63),
    "logprobs": (int, "an integer of at least 0", lambda n: n >= 0),
    "prompt_logprobs": (int, "an integer of at least 0", lambda n: n >= 0),
    "temperature": (int | float, "0 (greedy) or a positive number", lambda x: x >= 0),
    "top_p": (int | float, "a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": (int | float, "a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": (int | float, "a positive number (1 is off)", lambda x: x > 0),
    "presence_penalty": (int | float, "a number from -2 to 2 (0 is off)", lambda x: -2 <= x <= 2),
    "frequency_penalty": (int | float, "a number from -2 to 2 (0 is off)", lambda x: -2 <= x <= 2),
}
_DEFAULT_MODEL_LEN = 32768  # the published model could do 262144, which is 24 GiB of cache for a single sequence
_NEUTRAL = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


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
    stop: str | Sequence[str] | None = None  # a tuple once it is made, as are the ids
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
        if not isinstance(ids, list | tuple) or not all(type(i) is int and i >= 0 for i in ids):
            raise OptionError(f"stop_token_ids={self.stop_token_ids!r}: a list of token ids is needed")
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos={self.ignore_eos!r}: True or False is needed")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

        for name, (kind, needed, possible) in _POSSIBLE.items():
            value = getattr(self, name)
            known = isinstance(value, kind) and not isinstance(value, bool) and abs(value) != math.inf
            if value is not None and not (known and possible(value)):
                raise OptionError(f"{name}={value!r}: {needed} is needed")

    # What follows may be asked only of complete parameters: GenerationDefaults.complete.

    @property
    def greedy(self) -> bool:
        assert self.temperature is not None
        return self.temperature < _GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_history(self) -> bool:
        """Whether a step has to know the answer so far: penalties count it, log-probabilities are read with it."""
        return self.penalised or self.logprobs is not None

    @property
    def truncated(self) -> bool:
        """Whether some tokens are ruled out before one is drawn."""
        assert self.top_k is not None
        assert self.top_p is not None
        assert self.min_p is not None
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
        raw = read_json_object(path, CheckpointError) if path.exists() else {}
        eos = tokenizer_eos if raw.get("eos_token_id") is None else raw["eos_token_id"]
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(token) is int for token in eos):
            raise CheckpointError(f"{path}: eos_token_id is {raw['eos_token_id']!r}; token ids are needed")
        sampled_at = 1.0 if raw.get("temperature") is None else raw["temperature"]
        try:
            params = SamplingParams(
                max_tokens=raw.get("max_new_tokens"),
                temperature=sampled_at if raw.get("do_sample") else 0.0,
                top_p=raw.get("top_p"),
                top_k=raw.get("top_k"),
                min_p=raw.get("min_p"),
                repetition_penalty=raw.get("repetition_penalty"),
            )
        except OptionError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return cls(frozenset(eos), params)

    def complete(self, params: SamplingParams) -> SamplingParams:
        """``params`` with every unset value filled in; only max_tokens and what has no default may stay None."""
        unset = [field.name for field in fields(params) if getattr(params, field.name) is None]
        values = {name: getattr(self.params, name) for name in unset}
        return replace(params, **{name: _NEUTRAL.get(name) if v is None else v for name, v in values.items()})


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine.

    Attributes:
        max_model_len: most tokens of prompt and answer; None: 32768, or fewer where the model or the cache hold fewer.
        max_num_seqs: most sequences in a step.
        max_prefill_tokens: most prompt tokens in a step.
        max_encoder_tokens: most tokens of images that are encoded in a step, which bounds the tower's memory and time
            in it. A larger image is encoded in a step of its own.
        block_size: tokens in a cache block.
        num_blocks: cache blocks; None sizes the cache from the memory of the device.
        gpu_memory_utilization: part of the device's memory that weights, steps and cache may take together.
        seed: of the tokens of requests that bring none: the same calls in the same order give the same tokens.
        enforce_eager: launch every kernel of every step, instead of replaying small steps from CUDA graphs.
        async_scheduling: launch a step of decoding before the tokens of the last one are read, so that the device does
            not wait for the host. A sequence that turns out to have ended is computed once more for nothing. None: on
            a GPU; on a CPU it gains nothing.
        enable_prefix_caching: let a prompt that begins like an earlier one, images included, reuse its cache blocks.

    Raises:
        OptionError: a value is outside of what is possible; the message names it.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_prefill_tokens: int = 8192
    max_encoder_tokens: int = 8192
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        sizes = "max_model_len", "max_num_seqs", "max_prefill_tokens", "max_encoder_tokens", "block_size", "num_blocks"
        for name in sizes:
            value = getattr(self, name)
            is_left_open = value is None and name in ("max_model_len", "num_blocks")
            if not is_left_open and (type(value) is not int or value < 1):
                raise OptionError(f"{name}={value!r}: an integer of at least 1 is needed")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise OptionError(f"seed={self.seed!r}: an integer from 0 to 2**63 - 1 is needed")
        for name in ("enforce_eager", "enable_prefix_caching"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name}={getattr(self, name)!r}: True or False is needed")
        if self.async_scheduling is not None and type(self.async_scheduling) is not bool:
            raise OptionError(f"async_scheduling={self.async_scheduling!r}: True, False or None is needed")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise OptionError(f"gpu_memory_utilization={self.gpu_memory_utilization!r}: a number in (0, 1] is needed")

    def model_len(self, max_positions: int) -> int:
        """The length limit before the cache has its say.

        Raises:
            OptionError: longer than the model's positions.
        """
        if self.max_model_len is not None and self.max_model_len > max_positions:
            raise OptionError(
                f"max_model_len={self.max_model_len} is longer than the model's {max_positions} positions "
                "(max_position_embeddings); lower it"
            )
        return self.max_model_len or min(max_positions, _DEFAULT_MODEL_LEN)
