"""Answers of a given form (JSON, a regular expression, a choice): which tokens may come next.

Grammars are compiled and followed by llguidance, which is imported when the first request asks for one.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qwen3vl_moe.errors import OptionError, one_line
from qwen3vl_moe.json_files import parse_json
from qwen3vl_moe.ops.transfer import to_device

_MOST_KEPT, _MOST_CHARACTERS = 64, 1 << 18  # compiled grammars; of the text of one
# One way to write JSON: where any number of spaces may stand, a model in doubt writes nothing else.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
BEGINS = "start: answer\n"  # how a grammar begins that reasoning can be put before
THINK, END_THINK = "<think>", "</think>"


class Grammar:
    """Of one answer. It knows how much of the answer it has seen, and sees the rest when it is asked."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher, self._seen = matcher, 0
        self._words = torch.zeros((1, -(-vocabulary // 32)), dtype=torch.int32)  # a bit for each token

    def anew(self) -> Grammar:
        """The same for another answer."""
        matcher = self._matcher.deep_copy()
        matcher.reset()
        return Grammar(matcher, 32 * self._words.shape[1])

    def apply(self, logits_V: Tensor, output_ids: list[int]) -> None:
        """Rule out, in place, what cannot follow an answer; of one that cannot be followed, all. fp32 [V]"""
        if len(output_ids) < self._seen:  # an interrupt has taken tokens back
            self._matcher.reset()
            self._seen = 0
        self._matcher.consume_tokens(output_ids[self._seen :])
        self._seen = len(output_ids)
        self._matcher.unsafe_compute_mask_ptr(self._words.data_ptr(), 4 * self._words.numel())
        if self._matcher.is_error():
            self._words.zero_()
        words_W = to_device(self._words[0].clone(), logits_V.device)
        bits_V = (words_W[:, None] >> torch.arange(32, dtype=torch.int32, device=logits_V.device)) & 1
        logits_V.masked_fill_(bits_V.flatten()[: len(logits_V)] == 0, -torch.inf)


class Grammars:
    """Of one tokenizer. Any thread may ask for one; what was compiled lately is kept.

    Args:
        tokenizer: of the model.
        vocabulary: how many logits a token has.
        eos_token_ids: tokens that may end an answer once its form is complete.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos_token_ids: Iterable[int]):
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, sorted(eos_token_ids)
        self._lock = threading.Lock()  # never held while anything is compiled
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:  # for another process, which compiles its own
        return Grammars, (self._tokenizer, self._vocabulary, self._eos)

    def of(self, form: Mapping[str, Any]) -> Grammar:
        """The grammar of ``SamplingParams.structured_outputs``, for one answer.

        Raises:
            OptionError: it has no such grammar, or llguidance is not installed.
        """
        key = json.dumps(form)
        if len(key) > _MOST_CHARACTERS:
            raise OptionError(f"structured_outputs has {len(key)} characters; at most {_MOST_CHARACTERS} are compiled")
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
        if known is None:
            known = self._compiled(form)
            with self._lock:
                self._kept[key] = known
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
        return known.anew()

    def _compiled(self, form: Mapping[str, Any]) -> Grammar:
        if not self._eos:
            raise OptionError("structured_outputs needs an end-of-text token, and the checkpoint names none")
        ((kind, asked),) = form.items()
        matcher_of, tokenizer = self._library
        try:
            matcher = matcher_of(tokenizer, _text_of(matcher_of, kind, asked), log_level=0)
        except ValueError as error:
            raise OptionError(f"structured_outputs: {kind}: {one_line(str(error))}") from None
        if matcher.is_error():
            said = matcher.get_error().partition("<state>")[0].strip()
            raise OptionError(f"structured_outputs: {kind} cannot be used: {one_line(' '.join(said.split()))}")
        return Grammar(matcher, self._vocabulary)

    @cached_property
    def _library(self) -> tuple[Any, Any]:
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise OptionError("structured_outputs needs llguidance: pip install llguidance") from None
        return LLMatcher, from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._eos)


def after_thinking(form: Mapping[str, Any]) -> dict[str, Any]:
    """``structured_outputs`` of an answer that thinks first, as its prompt makes it, and then has a form.

    Raises:
        OptionError: of this form it cannot be said.
    """
    ((kind, asked),) = form.items()
    thinking = f'start: thinking "\\n\\n" answer\nthinking[suffix={json.dumps(END_THINK)}]: /(?s:.*)/\n'
    if kind == "grammar" and asked.startswith(BEGINS):
        return {"grammar": thinking + asked.removeprefix(BEGINS)}
    if kind == "choice":
        return {"grammar": f"{thinking}answer: {_choice(asked)}"}
    if kind in ("regex", "grammar"):
        raise OptionError(
            f"structured_outputs: {kind} does not go with a checkpoint that thinks first; give json or choice"
        )
    schema = {"type": "object"} if kind == "json_object" else asked
    try:
        schema = parse_json(schema) if isinstance(schema, str) else schema
    except ValueError as error:
        raise OptionError(f"structured_outputs: json: {one_line(str(error))}") from None
    if not isinstance(schema, dict):
        raise OptionError("structured_outputs: json: a schema that follows reasoning has to be a JSON object")
    return {"grammar": f"{thinking}answer: %json {json.dumps({'x-guidance': _COMPACT, **schema})}"}


def _choice(texts: Iterable[str]) -> str:
    return " | ".join(json.dumps(text) for text in texts)


def _text_of(library: Any, kind: str, asked: Any) -> str:
    """A form in llguidance's own language."""
    if kind == "json":
        return library.grammar_from_json_schema(asked, overrides=_COMPACT)
    if kind == "json_object":
        return library.grammar_from_json_schema({"type": "object"}, overrides=_COMPACT)
    if kind == "regex":
        return library.grammar_from_regex(asked)
    if kind == "choice":
        return library.grammar_from_lark(f"start: {_choice(asked)}")
    return library.grammar_from_lark(asked)
