"""What a checkpoint's generation_config.json says, for whatever a request leaves open."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.errors import CheckpointError, OptionError
from qwen3vl_moe.json_files import read_json_object

_NEUTRAL = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0,
}  # fmt: skip
_RENAMED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "stop": "stop_strings"}
_READ = {
    "eos_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens",
    "min_new_tokens", "stop_strings", "suppress_tokens",
}  # fmt: skip
# Changes no answer here: notes of transformers, its own cache and return values, other tokens' ids, speed.
_NOTES = {
    "transformers_version", "trust_remote_code", "bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache",
    "cache_implementation", "cache_config", "return_legacy_cache", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "compile_config", "disable_compile", "low_memory",
    "prefill_chunk_size", "max_matching_ngram_size", "assistant_early_exit", "prompt_lookup_num_tokens", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "target_lookbehind",
    "assistant_lookbehind", "continuous_batching_config", "generation_kwargs", "chat_format",
}  # fmt: skip
# Of fields that would change answers, the value at which they do not; of all others that is None.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "max_length": (20,),  # what transformers writes for "not set"
    "min_length": (0,),
    "early_stopping": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "length_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "exponential_decay_length_penalty": ([],),
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "constraints": ([],),
    "force_words_ids": ([],),
    "forced_decoder_ids": ([],),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "token_healing": (False,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint says about generation.

    Attributes:
        eos_token_ids: end-of-text tokens.
        params: values for unset sampling parameters.
        suppressed: tokens that no answer may hold.
    """

    eos_token_ids: frozenset[int] = frozenset()
    params: SamplingParams = field(default_factory=SamplingParams)
    suppressed: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, tokenizer_eos: int | None = None, vocab_size: int | None = None
    ) -> GenerationDefaults:
        """Read ``directory/generation_config.json``; a checkpoint without one decodes greedily.

        A field that would change answers and is not read is warned of, by name.

        Args:
            directory: the checkpoint.
            tokenizer_eos: the end-of-text token where the file names none.
            vocab_size: of the model; None: token ids are not compared with it.

        Raises:
            CheckpointError: the file is no JSON object or holds an impossible value.
        """
        path = Path(directory) / "generation_config.json"
        raw = read_json_object(path, CheckpointError) if path.exists() else {}
        samples = raw.get("do_sample")
        if samples is not None and not isinstance(samples, bool):
            raise CheckpointError(f"{path}: do_sample is {samples!r}; true or false is needed")
        eos = tokenizer_eos if raw.get("eos_token_id") is None else raw["eos_token_id"]
        eos = _token_ids(path, "eos_token_id", [] if eos is None else eos, vocab_size)
        suppressed = _token_ids(path, "suppress_tokens", raw.get("suppress_tokens") or [], vocab_size)
        sampled_at = 1.0 if raw.get("temperature") is None else raw["temperature"]
        try:
            params = SamplingParams(
                max_tokens=raw.get("max_new_tokens"),
                min_tokens=raw.get("min_new_tokens"),
                temperature=sampled_at if samples else 0.0,
                top_p=raw.get("top_p"),
                top_k=raw.get("top_k"),
                min_p=raw.get("min_p"),
                repetition_penalty=raw.get("repetition_penalty"),
                stop=raw.get("stop_strings"),
            )
        except OptionError as error:
            line = str(error)
            for ours, theirs in _RENAMED.items():
                line = line.replace(f"{ours}=", f"{theirs}=")
            raise CheckpointError(f"{path}: {line}") from None
        ignored = [
            f"{name}={value!r:.60}"
            for name, value in raw.items()
            if name not in _READ | _NOTES and value is not None and value not in _WITHOUT_EFFECT.get(name, ())
            and not name.startswith("_")
        ]  # fmt: skip
        if ignored:
            warnings.warn(f"{path}: not read, answers may differ: {', '.join(ignored)}", stacklevel=2)
        return cls(frozenset(eos), params, suppressed)

    def complete(self, params: SamplingParams) -> SamplingParams:
        """``params`` with every unset value filled in; only max_tokens and what has no default may stay None.

        Raises:
            OptionError: several answers are asked for that would all be the same.
        """
        unset = [each.name for each in fields(params) if getattr(params, each.name) is None]
        values = {name: getattr(self.params, name) for name in unset}
        values = {name: _NEUTRAL.get(name) if v is None else v for name, v in values.items()}
        if not params.stop and params.detokenize:
            values["stop"] = self.params.stop
        complete = replace(params, **values)
        if complete.n > 1 and complete.greedy:
            raise OptionError(f"n={complete.n}: greedy answers are all the same; set a temperature above 0, or n=1")
        return complete


def _token_ids(path: Path, name: str, ids: Any, vocab_size: int | None) -> tuple[int, ...]:
    """One token id, or a list of them, as a tuple of ids that the vocabulary has."""
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{path}: {name} is {ids!r:.60}; token ids are needed")
    outside = [token for token in ids if vocab_size is not None and token >= vocab_size]
    if outside:
        raise CheckpointError(f"{path}: {name} has {outside[0]}, outside of the vocabulary ({vocab_size} tokens)")
    return tuple(ids)
