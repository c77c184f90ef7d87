"""lm-eval's ``LM`` over our engine, so that every task of lm-eval runs on it.

lm-eval's own command finds a model class only where somebody has told it of one, and it takes no plug-ins for models.
This file is that command with ours in it; every option of ``lm_eval run`` works, with a GPU and without:

    python eval/lm.py run --model qwen3vl_moe --model_args pretrained=DIR,moe=tma --tasks arc_easy --apply_chat_template
    qwen3vl-moe lm-eval run --model qwen3vl_moe ...                      # the same where the package is installed

Model arguments of lm-eval's ``hf`` and ``vllm`` work here too, or are refused by name (model_args.py).

From Python it takes two lines (with this folder on the path):

    from lm import EngineLM
    lm_eval.simple_evaluate(model=EngineLM("DIR"), tasks=["arc_easy"], apply_chat_template=True)

All requests of a task go to the engine at once: it does the batching. Checked with lm-eval 0.4.13.
"""

from __future__ import annotations

if __name__ == "__main__":  # the command, which imports what follows when it needs the class: not for --help
    import beside_scripts  # noqa: F401
    from command import main
    from program import any_text

    any_text()
    main()
    raise SystemExit

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from model_args import engine_options, template_variables, think_end
from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.chat_template import ChatTemplate
from qwen3vl_moe.inputs.tokenizer import IMAGE_PLACEHOLDER

_TASK_PLACEHOLDER = "<image>"  # how lm-eval's tasks mark the place of an image
# What a task may say about sampling, and what holds where it says nothing: not the checkpoint's own defaults, so that
# the task alone decides, as with lm-eval's other engines.
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# What may have been too long, and what became of it.
_CUT = {
    "prompts_cut": "prompts were too long with their answers and lost their beginning",
    "contexts_cut": "contexts were too long with their continuations and lost their beginning",
    "texts_split": "texts were longer than the model's and were scored in windows, each with the context in it alone",
}
_log = logging.getLogger("lm_eval.qwen3vl_moe")
_PASSED_ON = {*_NEUTRAL, "temperature", "presence_penalty", "frequency_penalty", "seed", "ignore_eos", "stop_token_ids"}


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        prompt_ids: the prompt, image placeholders expanded.
        token_ids: every generated token.
        text: without special tokens and without the stop that ended it.
        truncated: it ended because it was too long.
        cached_tokens: prompt tokens that the engine did not compute again.
        logprobs: of ``token_ids``, natural; None if not asked for.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    truncated: bool
    cached_tokens: int
    logprobs: tuple[float, ...] | None


@register_model("qwen3vl_moe")
class EngineLM(TemplateLM):
    """The engine as lm-eval sees it.

    Args:
        pretrained: a checkpoint directory, a hub id, "demo", or an :class:`LLM`.
        device: as in :class:`LLM`; "cuda:0", which is what lm-eval says where nobody has said anything, is "auto" where
            there is no GPU.
        max_gen_toks: longest answer in tokens where a task sets none.
        prefix_token_id: the context of a text that has none; None: the tokenizer's end-of-text token.
        think_end_token: text or id of the token that ends what the model thinks. Only what follows its last place in
            an answer counts, and a task's stops are looked for only there, as with lm-eval's ``vllm``.
        enable_thinking, chat_template_args: variables of the chat template.
        answer_logprobs: keep the log-probability of each generated token in :attr:`answers`.
        progress: show bars.
        options: of :class:`LLM`: ``dtype``, ``moe``, ``max_model_len``, ``max_num_seqs`` and so on; what else lm-eval's
            models take is accepted or refused as :mod:`model_args` says.

    Attributes:
        answers: of the latest ``generate_until``, in the order of its requests.
        prompts_cut: how many of its prompts lost their beginning, because they were too long with their answers.
        cut: the same of all requests so far, by kind; it is in lm-eval's results too.
        seconds: wall time that it took.

    Raises:
        UserError: the checkpoint or an option cannot be used.
    """

    MULTIMODAL = True

    def __init__(
        self,
        pretrained: str | LLM = "demo",
        *,
        device: str | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        answer_logprobs: bool = False,
        progress: bool = True,
        **options: Any,
    ):
        super().__init__()
        options = engine_options(options)
        self._variables = template_variables(enable_thinking, chat_template_args)
        if type(max_gen_toks) is not int or max_gen_toks < 1:
            raise OptionError(f"max_gen_toks={max_gen_toks!r}: an integer of at least 1 is needed")
        if device == "cuda:0" and not torch.cuda.is_available():
            _log.warning("there is no GPU for --device cuda:0, lm-eval's default: the model runs on the CPU")
            device = "auto"
        if not isinstance(pretrained, LLM):
            self.llm = LLM(pretrained, device=device or "auto", progress=progress, **options)
        elif options:
            raise OptionError(f"{next(iter(options))} is an option of LLM(...), and the LLM is made already")
        else:
            self.llm = pretrained
        self.max_gen_toks, self.answer_logprobs, self.progress = max_gen_toks, answer_logprobs, progress
        self._think_end = think_end(think_end_token, self.tokenizer)
        self._prefix, size = prefix_token_id, self.llm.engine.model.config.text.vocab_size
        if self._prefix is not None and not (type(self._prefix) is int and 0 <= self._prefix < size):
            raise OptionError(f"prefix_token_id={prefix_token_id!r}: a token id below {size} is needed")
        source = self.llm.processor.chat_template
        self._template = None if source is None else ChatTemplate(source, self.tokenizer.special_tokens_map)
        self.answers: list[Answer] = []
        self.seconds, self.prompts_cut = 0.0, 0
        self.cut: Counter[str] = Counter()

    # What lm-eval asks of a tokenizer.

    @property
    def tokenizer(self) -> Any:
        return self.llm.processor.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._prefix is None else self._prefix

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to its results: how the answers were computed, and what was too long."""
        return {"qwen3vl_moe": self.llm.settings, **{kind: self.cut[kind] for kind in _CUT}}

    @property
    def max_length(self) -> int:
        """Longest prompt and answer, in tokens."""
        return self.llm.engine.max_model_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids [T]. Nothing is added: the chat template has put every special token into the text."""
        return self.tokenizer.backend_tokenizer.encode(string, add_special_tokens=False).ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.llm.processor.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text. ``<image>`` stays as it is until the images come with the request."""
        if self._template is None:
            raise PromptError(f"{self.llm.name} has no chat template; run the task without one")
        return self._template.render(
            chat_history,
            (),  # a document may spell whatever it likes: its tokens are text
            tools=None,
            variables=self._variables,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # The three kinds of request.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One answer per request ``(context, gen_kwargs)`` or ``(context, gen_kwargs, {"visual": images})``."""
        prompts, params, self.prompts_cut = [], [], 0
        for request in requests:
            context, kwargs, *rest = request.args
            each = self._sampling(kwargs)
            prompts.append(self._prompt(context, _images(rest), room=each.max_tokens))
            params.append(each)
        answers: dict[int, Answer] = {}

        def keep(number: int, answer: Answer) -> None:
            # As soon as it is there, so that an interrupted run finds it in lm-eval's cache.
            if self._think_end:
                until = normalize_gen_kwargs(requests[number].args[1])["until"]
                answer = replace(answer, text=postprocess_generated_text(answer.text, until, self._think_end))
            answers[number] = answer
            self.cache_hook.add_partial("generate_until", requests[number].args, answer.text)

        started = time.perf_counter()
        with self._bar("answers", len(requests), disable_tqdm) as bar:
            self._answer(prompts, params, lambda *done: (keep(*done), bar.update()))
        self.seconds = time.perf_counter() - started
        self._count("prompts_cut", self.prompts_cut, len(requests))
        self.answers = [answers[number] for number in range(len(requests))]
        return [answer.text for answer in self.answers]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Per request ``(context, continuation[, {"visual": images}])``: the continuation's log-probability, and
        whether greedy decoding would give it.

        Raises:
            PromptError: a continuation is longer than the model can score; nothing has been computed then.
        """
        pairs, too_long = [], 0
        for number, request in enumerate(requests):
            context, continuation, *rest = request.args
            if images := _images(rest):
                context = context.replace(_TASK_PLACEHOLDER, IMAGE_PLACEHOLDER)
            ids, tokens = self._pair(context, continuation)
            # A token is scored by what is before it, so one of the context has to stay; the engine wants room for one.
            if len(tokens) > (most := self.max_length - 2):
                raise PromptError(
                    f"{_name(request, number)}: the continuation has {len(tokens)} tokens, of which "
                    f"max_model_len={self.max_length} leaves room for {most}; raise it, or leave the document out"
                )
            too_long += not images and len(ids) + len(tokens) > self.max_length - 1
            pairs.append((ids, tokens, images))
        self._count("contexts_cut", too_long, len(requests))

        def cache(number: int, score: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[number].args, score)

        return self._score(pairs, "log-likelihoods", disable_tqdm, cache)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._score([(context, tokens, []) for _, context, tokens in requests], "log-likelihoods", True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows as long as the model allows, every token predicted once."""
        pairs, owners, split = [], [], 0
        for number, request in enumerate(requests):
            # A window has one token more than max_seq_len, and the engine wants room for one more.
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=self.max_length - 2, context_len=1
            )
            of_text = [(*map(list, make_disjoint_window(window)), []) for window in windows]
            pairs += of_text
            owners += [number] * len(of_text)
            split += len(of_text) > 1
        self._count("texts_split", split, len(requests))
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._score(pairs, "windows", disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # How they are carried out.

    def _answer(self, prompts: list[Any], params: list[SamplingParams], done: Callable[[int, Answer], Any]) -> None:
        """Answer prompts; ``done(number, answer)`` is called for each as soon as it is there, in any order."""
        for number, output in self.llm.as_completed(prompts, params):
            completion, logprobs = output.outputs[0], None
            if completion.logprobs is not None:
                pairs = zip(completion.logprobs, completion.token_ids, strict=True)
                logprobs = tuple(entry[token].logprob for entry, token in pairs)
            answer = Answer(
                prompt_ids=tuple(output.prompt_token_ids),
                token_ids=tuple(completion.token_ids),
                text=completion.text,
                truncated=completion.finish_reason == "length",
                cached_tokens=output.metrics.num_cached_tokens,
                logprobs=logprobs,
            )
            done(number, answer)

    def _score(
        self,
        pairs: list[tuple[list[int], list[int], list[Any]]],
        what: str,
        disable_tqdm: bool,
        cache: Callable[[int, tuple[float, bool]], None] = lambda number, score: None,
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, given (context ids, continuation ids, images)."""
        prompts = []
        for context, tokens, images in pairs:
            ids = [*context, *tokens]
            if images:
                prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": images}})
            else:
                # lm-eval's rule: the oldest context goes first.
                prompts.append({"text_token_ids": ids[-(self.max_length - 1) :]})
        scores: dict[int, tuple[float, bool]] = {}
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        with self._bar(what, len(prompts), disable_tqdm) as bar:
            for number, output in self.llm.as_completed(prompts, params):
                count, ids = len(pairs[number][1]), output.prompt_token_ids
                # The first token of a prompt has no log-probability.
                first = max(1, len(ids) - count) if count else len(ids)
                entries = zip(output.prompt_logprobs[first:], ids[first:], strict=True)
                own = [entry[token] for entry, token in entries]
                scores[number] = sum(each.logprob for each in own), all(each.rank == 1 for each in own)
                cache(number, scores[number])
                bar.update()
        return [scores[number] for number in range(len(pairs))]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's rule: encode both together, and the continuation is what the context alone does not have."""
        if context:
            return self._encode_pair(context, continuation)
        tokens, prefix = self.tok_encode(continuation), self.prefix_token_id
        return (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)

    def _prompt(self, context: str, images: list[Any], room: int) -> Any:
        """What the engine is asked, short enough to leave ``room`` tokens for the answer. Without images, whatever the
        text spells is text."""
        if images:
            text = context.replace(_TASK_PLACEHOLDER, IMAGE_PLACEHOLDER)
            return {"prompt": text, "multi_modal_data": {"image": images}}
        if room >= self.max_length:
            raise OptionError(f"max_gen_toks={room} leaves no room for a prompt in max_model_len={self.max_length}")
        ids = self.tok_encode(context)
        kept = maybe_truncate(ids, room, self.max_length)[0]
        self.prompts_cut += len(kept) < len(ids)
        return {"text_token_ids": kept}

    def _sampling(self, gen_kwargs: dict[str, Any]) -> SamplingParams:
        """A task's generation arguments in the engine's terms.

        Raises:
            OptionError: an argument that the engine does not have.
        """
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until, max_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        if not kwargs.pop("do_sample"):
            kwargs["temperature"] = 0.0
        if unknown := sorted(kwargs.keys() - _PASSED_ON):
            raise OptionError(
                f"generation argument {unknown[0]!r} is unknown; there are {', '.join(sorted(_PASSED_ON))}"
            )
        # A special token never shows in an answer's text: as a stop it has to be watched for among the tokens.
        special = self.tokenizer.all_special_tokens + list(map(str, self.tokenizer.added_tokens_decoder.values()))
        stop_ids = [self.tokenizer.convert_tokens_to_ids(text) for text in until if text in special]
        return SamplingParams(
            **_NEUTRAL
            | kwargs
            | {
                "max_tokens": max_tokens,
                "stop": [] if self._think_end else [text for text in until if text and text not in special],
                "stop_token_ids": [*kwargs.get("stop_token_ids", ()), *stop_ids],
                "logprobs": 0 if self.answer_logprobs else None,
            }
        )

    def _count(self, kind: str, number: int, of: int) -> None:
        self.cut[kind] += number
        if number:
            _log.warning("%d of %d %s (max_model_len=%d)", number, of, _CUT[kind], self.max_length)

    def _bar(self, what: str, total: int, disable: bool) -> tqdm:
        return tqdm(total=total, desc=what, unit="", disable=disable or not self.progress)


def _images(rest: list[dict[str, Any]]) -> list[Any]:
    """The images of a request's last argument, if it has one."""
    return [image for image in rest[0].get("visual") or [] if image is not None] if rest else []


def _name(request: Any, number: int) -> str:
    """How a document is found again: by its task and its number there."""
    task, document = (getattr(request, name, None) for name in ("task_name", "doc_id"))
    return f"request {number}" if document is None else f"task {task}, document {document}"
