"""What a caller may set for a request."""

from __future__ import annotations

import functools
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from qwen3vl_moe.errors import OptionError

_GREEDY_BELOW = 1e-5  # below this, treat as greedy: the division could overflow
_LARGEST = 2**63 - 1  # of an integer that may become a tensor's
_MAX_TEXTS = 1000  # stop strings, bad words: each is looked for with every token
_MAX_CHARACTERS = 1 << 16  # of all of them: the engine makes tokens of them while everybody waits
_MAX_IDS = 1 << 20  # token ids in one list; more than any vocabulary has
_COUNT = f"to {_LARGEST}"

# What each number may be: an integer or any number, in words, and its bounds. None is always "not given".
_NUMBERS: dict[str, tuple[type, str, Any]] = {
    "n": (int, "an integer from 1 to 1024", lambda n: 1 <= n <= 1024),
    "max_tokens": (int, f"an integer from 1 {_COUNT}", lambda n: 1 <= n <= _LARGEST),
    "min_tokens": (int, f"an integer from 0 {_COUNT}", lambda n: 0 <= n <= _LARGEST),
    "top_k": (int, f"0 or -1 (keep all) or an integer from 1 {_COUNT}", lambda n: -1 <= n <= _LARGEST),
    "seed": (int, "-1 (none) or an integer from 0 to 2**63 - 1", lambda n: -1 <= n <= _LARGEST),
    "logprobs": (int, f"-1 (all) or an integer from 0 {_COUNT}", lambda n: -1 <= n <= _LARGEST),
    "prompt_logprobs": (int, f"-1 (all) or an integer from 0 {_COUNT}", lambda n: -1 <= n <= _LARGEST),
    "truncate_prompt_tokens": (
        int,
        f"-1 (as many as fit) or an integer from 1 {_COUNT}",
        lambda n: n == -1 or 1 <= n <= _LARGEST,
    ),
    "temperature": (float, "a number from 0 (greedy) to 1000", lambda x: 0 <= x <= 1000),
    "top_p": (float, "a number above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": (float, "a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": (float, "a number from 0.01 to 100 (1 is off)", lambda x: 0.01 <= x <= 100),
    "presence_penalty": (float, "a number from -2 to 2 (0 is off)", lambda x: -2 <= x <= 2),
    "frequency_penalty": (float, "a number from -2 to 2 (0 is off)", lambda x: -2 <= x <= 2),
}
_SWITCHES = (
    "ignore_eos",
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
# What others' engines take and this one does not, with the way out. Given as None, they say nothing and pass.
_NOT_BUILT = {
    "best_of": "draw n answers with logprobs and choose the best yourself",
    "use_beam_search": "set n and a temperature to draw several answers",
    "beam_width": "set n and a temperature to draw several answers",
    "length_penalty": "it belongs to beam search, which is not built",
    "early_stopping": "it belongs to beam search, which is not built",
    "guided_decoding": "it is called structured_outputs here",
    "response_format": "here it is structured_outputs={'json': schema}, or {'json_object': True}",
    "logits_processors": "logit_bias, allowed_token_ids and bad_words are built",
    "output_kind": "LLM.stream gives an answer while it is written, LLM.generate when it is finished",
    "flat_logprobs": "logprobs come as dictionaries",
    "extra_args": "there is nothing that they could go to",
    "thinking_token_budget": "set max_tokens",
    "max_completion_tokens": "it is called max_tokens here",
    "max_new_tokens": "it is called max_tokens here",
    "min_new_tokens": "it is called min_tokens here",
    "do_sample": "temperature=0 is greedy, any other samples",
    "num_beams": "set n and a temperature to draw several answers",
    "no_repeat_ngram_size": "frequency_penalty and repetition_penalty are built",
}

_Class = TypeVar("_Class")


def _names_checked(cls: type[_Class]) -> type[_Class]:
    """Unknown names end in an OptionError rather than a TypeError: they come from request files as well."""
    made: Any = cls.__init__
    known = [each.name for each in fields(cast(Any, cls))]

    @functools.wraps(made)
    def checked(self, **given: Any) -> None:
        for name in [name for name in given if name not in known]:
            if name not in _NOT_BUILT:
                raise OptionError(f"unknown sampling parameter {name!r}; there are {', '.join(known)}")
            if given.pop(name) is not None:
                raise OptionError(f"{name} is not supported: {_NOT_BUILT[name]}")
        made(self, **given)

    cls.__init__ = checked
    return cls


@_names_checked
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling of one request; the names and meanings are vLLM's.

    What is left None comes from the checkpoint's generation_config.json (a file that does not say ``do_sample: true``
    means greedy, as in transformers), else from the neutral value. Numbers may be NumPy's.

    Attributes:
        n: how many answers to draw; answer i of a request with a seed is drawn with ``seed + i``.
        max_tokens: most tokens to generate; None and no ``max_new_tokens`` in the checkpoint: until ``max_model_len``.
        min_tokens: before so many tokens, end-of-text and ``stop_token_ids`` are ruled out, and no stop string ends
            the answer.
        temperature: 0 is greedy. Logits are divided by it.
        top_p: keep the most likely tokens until their probabilities add up to this, in (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: of tokens in prompt or answer, positive logits are divided by it, negative ones multiplied.
        presence_penalty: subtracted from the logit of every token that is in the answer.
        frequency_penalty: subtracted once for every time that the token is in the answer.
        logit_bias: what is added to the logits of these tokens, {token id: a number from -100 to 100}.
        allowed_token_ids: no other token can be drawn. End-of-text has to be among them for an answer to end itself.
        structured_outputs: the form of the answer: {"json": a schema, as a dict or its text}, {"json_object": True},
            {"regex": text}, {"choice": [texts]} or {"grammar": text in llguidance's Lark}. JSON comes on one line.
        bad_words: texts that the answer does not hold, as the tokens that each becomes at a beginning or after a space.
        stop: texts that end the answer; they are left out of it. One that spells a special token stops at that token,
            which is no part of the text otherwise.
        stop_token_ids: tokens that end the answer; their text is left out of it.
        include_stop_str_in_output: leave the stop in.
        ignore_eos: go on after the checkpoint's end-of-text tokens.
        seed: the same seed gives the same tokens, whatever else is in the batch; None or -1: the engine's.
        logprobs: for each generated token, its log-probability and those of this many most likely tokens; -1: of all.
            They are of the model's own distribution: before penalties, biases, temperature and truncation.
        prompt_logprobs: the same for each prompt token but the first.
        truncate_prompt_tokens: keep only so many of the prompt's last tokens; -1: as many as leave room for the
            answer. A prompt with images is refused rather than cut.
        detokenize: whether the answer has a text; without one no ``stop`` can be looked for.
        skip_special_tokens: whether special tokens are left out of the text.
        spaces_between_special_tokens: taken for vLLM's sake. Byte-level tokenizers put no spaces there.

    Raises:
        OptionError: a value is outside of what is possible, or a name is not known; the message names it.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: Mapping[str, Any] | None = None
    bad_words: Sequence[str] | None = None
    stop: str | Sequence[str] | None = None  # a tuple once it is made, as are the others
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, (kind, needed, possible) in _NUMBERS.items():
            keep(name, _number(name, getattr(self, name), kind, needed, possible))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={_shown(getattr(self, name))}: True or False is needed")
        keep("stop", _texts("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        keep("bad_words", _texts("bad_words", self.bad_words))
        keep("stop_token_ids", _token_ids("stop_token_ids", () if self.stop_token_ids is None else self.stop_token_ids))
        if self.allowed_token_ids is not None:
            if not _token_ids("allowed_token_ids", self.allowed_token_ids):
                raise OptionError("allowed_token_ids is empty: at least one token is needed, None allows all")
            keep("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
        keep("logit_bias", _biases(self.logit_bias))
        keep("structured_outputs", _form(self.structured_outputs))
        keep("seed", None if self.seed == -1 else self.seed)
        if self.min_tokens and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise OptionError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it")
        if self.structured_outputs is not None and self.ignore_eos:
            raise OptionError("ignore_eos and structured_outputs: what follows a complete answer has no form; drop one")
        if self.stop and not self.detokenize:
            raise OptionError("stop needs the text of the answer: leave detokenize on, or use stop_token_ids")

    def clone(self) -> SamplingParams:
        """A copy. Parameters cannot be changed: ``dataclasses.replace`` makes others from them."""
        return replace(self)

    # What follows may be asked only of complete parameters: GenerationDefaults.complete.

    @property
    def greedy(self) -> bool:
        assert self.temperature is not None
        return self.temperature < _GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def truncated(self) -> bool:
        """Whether some tokens are ruled out before one is drawn."""
        assert self.top_k is not None
        assert self.top_p is not None
        assert self.min_p is not None
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def _number(name: str, value: Any, kind: type, needed: str, possible: Any) -> Any:
    """The value as Python's own number, if it is one and possible."""
    if name.endswith("logprobs") and isinstance(value, bool):  # OpenAI's and vLLM's: the chosen token and the best one
        value = 1 if value else None
    if value is None and name not in ("n", "presence_penalty", "frequency_penalty"):
        return None
    number: Any = math.nan
    if not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real):
        try:
            number = kind(cast(Any, value))
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
    if not possible(number):  # as nothing is of NaN
        raise OptionError(f"{name}={_shown(value)}: {needed} is needed")
    return number


def _shown(value: Any) -> str:
    """A short spelling of whatever was given: values may be nested deep, or fail to be spelled at all."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"


def _texts(name: str, texts: Any) -> tuple[str, ...]:
    texts = () if texts is None else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        kinds = "a non-empty string or a list of them" if name == "stop" else "a list of non-empty strings"
        raise OptionError(f"{name}={_shown(texts)}: {kinds} is needed")
    if len(texts) > _MAX_TEXTS:
        raise OptionError(f"{name} has {len(texts)} texts; at most {_MAX_TEXTS} are looked for")
    if (count := sum(map(len, texts))) > _MAX_CHARACTERS:
        raise OptionError(f"{name} has {count} characters; at most {_MAX_CHARACTERS} are looked for")
    for text in texts:
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise OptionError(f"{name}={_shown(text)}: it holds half of a surrogate pair, which no answer can hold")
    return tuple(texts)


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    try:
        found: tuple[Any, ...] = (None,) if isinstance(ids, str | bytes | Mapping) else tuple(ids)
    except TypeError:  # nothing that can be gone through
        found = (None,)
    if len(found) > _MAX_IDS:
        raise OptionError(f"{name} has {len(found)} token ids; at most {_MAX_IDS} are taken")
    if not all(map(_is_token_id, found)):
        raise OptionError(f"{name}={_shown(ids)}: a list of token ids is needed")
    return tuple(dict.fromkeys(map(int, found)))  # each once


def _is_token_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) <= _LARGEST


def _biases(biases: Any) -> Mapping[int, float] | None:
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise OptionError(f"logit_bias={_shown(biases)}: a dict of token ids and numbers is needed")
    if len(biases) > _MAX_IDS:
        raise OptionError(f"logit_bias has {len(biases)} token ids; at most {_MAX_IDS} are taken")
    found = {}
    for token, bias in biases.items():
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
            token = int(token)  # keys of JSON are texts
        if not _is_token_id(token):
            raise OptionError(f"logit_bias has the key {_shown(token)}; a token id is needed")
        token = int(token)
        needed = "a number from -100 to 100"
        found[token] = _number(f"logit_bias[{token}]", bias, float, needed, lambda x: -100 <= x <= 100)
        if found[token] is None:
            raise OptionError(f"logit_bias[{token}]=None: {needed} is needed")
    return found


def _form(asked: Any) -> Mapping[str, Any] | None:
    """A copy of ``structured_outputs`` in JSON's own types."""
    if asked is None:
        return None
    known = {
        "json": ("a JSON schema, as a dict or a text,", lambda x: isinstance(x, dict | str)),
        "json_object": ("True", lambda x: x is True),
        "regex": ("a text", lambda x: isinstance(x, str)),
        "choice": ("a list of texts", lambda x: isinstance(x, list | tuple) and {str} == {type(t) for t in x}),
        "grammar": ("a text", lambda x: isinstance(x, str)),
    }
    given = {k: v for k, v in asked.items() if v is not None} if isinstance(asked, Mapping) else {}
    if len(given) != 1 or not given.keys() <= known.keys():
        raise OptionError(f"structured_outputs={_shown(asked)}: a dict with one of {', '.join(known)} is needed")
    ((kind, value),) = given.items()
    needed, fits = known[kind]
    if not fits(value):
        raise OptionError(f"structured_outputs: {kind}={_shown(value)}: {needed} is needed")
    try:
        return json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise OptionError(f"structured_outputs: {kind}={_shown(value)}: it cannot be written as JSON") from None


def check_vocabulary(params: SamplingParams, vocabulary: int) -> None:
    """Raises OptionError for parameters that name a token outside of a vocabulary, or ask for more than it has."""
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > vocabulary:
            raise OptionError(f"{name}={getattr(params, name)}: the vocabulary has only {vocabulary} tokens")
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        outside = [token for token in getattr(params, name) or () if token >= vocabulary]
        if outside:
            raise OptionError(f"{name}: {outside[0]} is outside of the vocabulary ({vocabulary} tokens)")
