"""What can be said of a request, and made for it, without the model: in any thread, and in other processes, too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qwen3vl_moe.engine.arguments import only_given
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.engine.grammar import THINK, Grammars, after_thinking
from qwen3vl_moe.engine.params import SamplingParams, check_vocabulary
from qwen3vl_moe.errors import PromptError, UserError
from qwen3vl_moe.inputs.processor import Prompt

Prepare = Callable[..., Prompt]  # of a request; where they are given, with keep_last and ahead of Processor.chat
Timed = tuple[
    Prompt, float, float
]  # a prompt, when work on it began (since the epoch) and how long it took, in seconds


@dataclass(frozen=True)
class Admission:
    """What a request has to be like. It can be pickled.

    Attributes:
        defaults: the checkpoint's sampling defaults.
        grammars: that were compiled lately.
        vocab_size: of the model.
        max_model_len: most tokens of a prompt and its answer.
    """

    defaults: GenerationDefaults
    grammars: Grammars
    vocab_size: int
    max_model_len: int

    def check(self, params: SamplingParams) -> SamplingParams:
        """Complete parameters. A grammar is compiled here, and known afterwards.

        Raises:
            OptionError: the model cannot serve them.
        """
        check_vocabulary(params, self.vocab_size)
        if params.structured_outputs is not None:
            self.grammars.of(params.structured_outputs)
        return self.defaults.complete(params)

    def formed(self, params: SamplingParams, prompt: Prompt) -> SamplingParams:
        """Parameters for the answer to ``prompt``: if that has it think first, its form begins where this has ended.

        Raises:
            OptionError: this cannot be said of the form.
        """
        form = params.structured_outputs
        if form is None or not (prompt.text or "").rstrip().endswith(THINK):
            return params
        return replace(params, structured_outputs=after_thinking(form))

    def prepared(self, prepare: Prepare, pair: tuple[Any, SamplingParams], ahead: bool = False) -> Timed:
        """Make a prompt.

        Args:
            ahead: of its decoding: see :meth:`.Processor.chat`.

        Raises:
            PromptError: it cannot be made, for whatever reason: one bad request is that request's error alone.
        """
        item, params = pair
        arrival = time.time()
        try:
            options = only_given(keep_last=self._kept(params), ahead=ahead or None)
            return prepare(item, **options), arrival, time.time() - arrival
        except UserError:
            raise
        except Exception as error:  # of a library that met what nobody foresaw; the cause keeps its traceback
            raise PromptError(f"the request cannot be prepared: {type(error).__name__}: {error}") from error

    def _kept(self, params: SamplingParams) -> int | None:
        """How many tokens of a prompt are kept at most."""
        if params.truncate_prompt_tokens != -1:
            return params.truncate_prompt_tokens
        answer = self.defaults.complete(params).max_tokens or 1
        return max(1, self.max_model_len - answer)
