"""What a user calls: load a checkpoint, chat, generate, stream.

Prompts are made (templates, tokens, images) in threads ahead of the engine, which itself runs in the caller's thread.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine.engine import Engine
from qwen3vl_moe.engine.outputs import RequestOutput
from qwen3vl_moe.engine.params import EngineOptions, GenerationDefaults, SamplingParams
from qwen3vl_moe.engine.runner import uses_graphs
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import OptionError, PromptError, UserError
from qwen3vl_moe.inputs.access import media_access
from qwen3vl_moe.inputs.processor import Processor, Prompt
from qwen3vl_moe.inputs.workers import prefetch
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops.dispatch import kernels_in_use
from qwen3vl_moe.weights import load_model, resolve
from qwen3vl_moe.weights.placement import tma_problem

Conversation = list[dict[str, Any]]  # messages: {"role": ..., "content": text or a list of text and image items}
Prepare = Callable[[Any], Prompt]


class LLM:
    """A loaded model that answers.

    ::

        llm = LLM("Qwen/Qwen3-VL-30B-A3B-Instruct")
        content = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
        print(llm.chat([{"role": "user", "content": content}])[0].outputs[0].text)

    Args:
        model: a checkpoint directory, a hub id, or "demo": the small trained checkpoint of this package.
        device: "auto" (a GPU where there is one), "cuda", "cuda:1", "cpu".
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        moe: "tma" (Hopper), "reference" (plain torch), "auto".
        min_pixels, max_pixels: area to which images are resized, in pixels; None: the checkpoint's.
        alpha: what transparent images become: "white", on a white ground; "drop", as transformers has them.
        media_root: the directory that the files of images have to lie in; None: anywhere.
        allow_hosts: the hosts that images are downloaded from, ".example.org" for all below it; None: any.
        allow_private_hosts: whether images may be downloaded from this machine and from private networks.
        expert_layout: "published" or "transformers5", for checkpoints that do not tell.
        progress: show the bars of loading and warming up.
        engine_options: fields of :class:`EngineOptions`: ``max_model_len``, ``max_num_seqs``, ``max_prefill_tokens``,
            ``max_encoder_tokens``, ``block_size``, ``num_blocks``, ``gpu_memory_utilization``, ``seed``,
            ``enforce_eager``, ``async_scheduling``, ``enable_prefix_caching``.

    Raises:
        UserError: an option, or the checkpoint, cannot be used; one line says why.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        moe: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        alpha: str = "white",
        media_root: str | Path | None = None,
        allow_hosts: Iterable[str] | str | None = None,
        allow_private_hosts: bool = True,
        expert_layout: str | None = None,
        progress: bool = True,
        **engine_options: Any,
    ):
        options = _engine_options(engine_options)
        self.name, self.options, self.random_weights = str(model), options, False
        self.moe_fallback: str | None = None
        directory = resolve(model)
        # All that is small is read before the weights, so that a mistake in it shows at once.
        config = Qwen3VLMoeConfig.from_pretrained(directory)
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        access = media_access(media_root, allow_hosts, allow_private_hosts)
        longest = options.model_len(config.text.max_positions)
        self.processor = Processor.from_pretrained(
            directory, config, **limits, max_model_len=longest, access=access, alpha=alpha
        )
        tokenizer = self.processor.tokenizer
        defaults = GenerationDefaults.from_pretrained(directory, self.processor.eos_token_id)
        weights = load_model(directory, device, dtype, moe, expert_layout=expert_layout, progress=progress)
        if moe == "auto" and weights.moe == "reference":
            self.moe_fallback = tma_problem(weights.device, weights.dtype, config.text)
            if weights.device.type == "cuda":  # on a CPU nobody expects the kernel
                warnings.warn(f"moe='auto' runs the experts in plain torch: {self.moe_fallback}", stacklevel=2)
        self.engine = Engine(weights, tokenizer, defaults, options, progress)

    @classmethod
    def from_parts(
        cls, model: Qwen3VLMoe, processor: Processor, defaults: GenerationDefaults | None = None, **engine_options: Any
    ) -> LLM:
        """An LLM around a model that is in memory already.

        Args:
            defaults: the checkpoint's sampling; None: greedy, until the tokenizer's end-of-text token.
        """
        self = cls.__new__(cls)
        if defaults is None:
            eos = processor.eos_token_id
            defaults = GenerationDefaults(frozenset() if eos is None else frozenset({eos}))
        self.name, self.random_weights, self.moe_fallback = "a model in memory", False, None
        self.processor, self.options = processor, _engine_options(engine_options)
        self.engine = Engine(model, processor.tokenizer, defaults, self.options)
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What "auto" and the size of the memory came to, and which kernels run.

        ``moe_fallback`` is there only if moe="auto" could not take the fused kernel, and says why.
        """
        model, engine = self.engine.model, self.engine
        head_dims = model.config.text.head_dim, model.config.vision.head_dim
        fallback = {} if self.moe_fallback is None else {"moe_fallback": self.moe_fallback}
        return {
            "model": self.name,
            "random_weights": self.random_weights,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "moe": model.moe,
            **fallback,
            **kernels_in_use(model.device, model.dtype, head_dims),
            "cuda_graphs": uses_graphs(model, self.options),
            "max_model_len": engine.max_model_len,
            "max_num_seqs": self.options.max_num_seqs,
            "max_prefill_tokens": self.options.max_prefill_tokens,
            "kv_cache_tokens": engine.cache.num_blocks * engine.cache.block_size,
        }

    @property
    def stats(self) -> dict[str, int]:
        """Reuse of the cache so far, in tokens: how many were looked up, and how many of them were found.

        A preempted request counts again. The names are those of vLLM's metrics.
        """
        scheduler = self.engine.scheduler
        return {
            "prefix_cache_queries": scheduler.num_queried_tokens,
            "prefix_cache_hits": scheduler.num_cached_tokens,
        }

    def chat(
        self,
        conversations: Conversation | list[Conversation],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; see :meth:`generate` for the rest.

        Args:
            conversations: messages ``{"role": "user", "content": ...}`` where content is a text or a list of
                ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": path | URL | PIL image | bytes}``.
        """
        many = [conversations] if _is_conversation(conversations) else conversations
        return self._complete(many, self.processor.chat, "conversation", sampling_params)

    def generate(
        self, prompts: Any | list[Any], sampling_params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue one prompt or several, with no chat template.

        Args:
            prompts: a text, a list of token ids, ``{"prompt": text, "multi_modal_data": {"image": one or a list}}``
                (or ``"prompt_token_ids"`` for ``"prompt"``), or a list of such.
            sampling_params: one for all, or one per prompt; None takes everything from the checkpoint.

        Returns:
            One output per prompt, in their order.

        Raises:
            PromptError: a prompt cannot be used; the others are given up, and the message says which one it was.
            OptionError: sampling parameters that the model cannot serve, or not as many as prompts.
        """
        many = [prompts] if _is_prompt(prompts) else prompts
        return self._complete(many, self.processor.prompt, "prompt", sampling_params)

    def as_completed(
        self,
        conversations_or_prompts: Any | list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        return_exceptions: bool = False,
    ) -> Iterator[tuple[int, RequestOutput | UserError]]:
        """Answer many conversations and prompts, and give each answer as soon as it is finished.

        :meth:`chat` and :meth:`generate` wait for all of these. Closing the iterator gives the rest up.

        Args:
            conversations_or_prompts: one or a list; each is a conversation as in :meth:`chat`, or a prompt as in
                :meth:`generate`.
            sampling_params: one for all, or one per request.
            return_exceptions: where a request cannot be used, yield the error in place of its output and go on.

        Yields:
            ``(index, output)``, each index once. Requests begin in their order and end in any.

        Raises:
            PromptError, OptionError: as :meth:`generate`; with ``return_exceptions`` only for what is no list of
                requests, and for a wrong number of sampling parameters.
        """
        given = conversations_or_prompts
        many = [given] if _is_conversation(given) or _is_prompt(given) else given
        return self._as_completed(many, self._prepare, "request", sampling_params, return_exceptions)

    def stream(
        self, conversation_or_prompt: Any, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """The answer to one conversation (or prompt, as in :meth:`generate`) while it is being written.

        Yields an output per step that released text, and a last one with ``finished`` set. Each holds the whole answer
        so far; ``outputs[0].new_text`` is what the previous one did not have, and joining these gives the final text.
        A character or a stop string never shows in part. Closing the iterator gives the request up.

        Raises:
            PromptError, OptionError: at the call, before the first output.
        """
        prompt, arrival, seconds = _timed(self._prepare, conversation_or_prompt)
        return self._stream(self.engine.request(prompt, sampling_params or SamplingParams(), arrival, seconds))

    def _stream(self, sequence: Sequence) -> Iterator[RequestOutput]:
        # Queued at the first next(): a stream that is never begun leaves nothing behind.
        self.engine.add(sequence)
        finished, shown = False, 0
        try:
            while not finished:
                if not sequence.finished:  # another call may have brought it to its end meanwhile
                    self.engine.step()
                finished = sequence.finished
                if finished or len(sequence.text.text) > shown:
                    shown = len(sequence.text.text)
                    yield sequence.output()
        finally:
            self.engine.abort(sequence)

    def _complete(self, items: Any, prepare: Prepare, kind: str, params: Any) -> list[RequestOutput]:
        outputs: dict[int, Any] = dict(self._as_completed(items, prepare, kind, params))  # an error was raised
        return [outputs[number] for number in range(len(outputs))]

    def _as_completed(
        self, items: Any, prepare: Prepare, kind: str, params: Any, return_exceptions: bool = False
    ) -> Iterator[tuple[int, RequestOutput | UserError]]:
        if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            raise PromptError(f"a {kind} or a list of them is needed, got {type(items).__name__}")
        items = list(items)
        params = _params_per_item(params, len(items), kind)
        if not return_exceptions:
            for each in params:
                self.engine.check(each)
        return self._run(items, prepare, kind, params, return_exceptions)

    def _run(
        self, items: list, prepare: Prepare, kind: str, params: list[SamplingParams], return_exceptions: bool
    ) -> Iterator[tuple[int, RequestOutput | UserError]]:
        going: dict[int, Sequence] = {}
        entered = 0
        # Images take far more memory as pixels than as files: only as many requests as can run are prepared ahead.
        with closing(prefetch(partial(_timed, prepare), items, self.options.max_num_seqs)) as prepared:
            try:
                while entered < len(items) or going:
                    while entered < len(items) and self.engine.has_room:
                        number, entered = entered, entered + 1
                        take = next(prepared)
                        try:
                            prompt, arrival, seconds = take()
                            sequence = self.engine.request(prompt, params[number], arrival, seconds)
                        except UserError as error:
                            if not return_exceptions:
                                where = f"{kind} {number}: " if len(items) > 1 else ""
                                raise type(error)(f"{where}{error}") from error.__cause__
                            yield number, error
                        else:
                            going[number] = sequence
                            self.engine.add(sequence)
                    self.engine.step()
                    for number in [number for number, sequence in going.items() if sequence.finished]:
                        yield number, going.pop(number).output()
            finally:
                # After an error or Ctrl-C nothing of this call stays behind, and the engine can go on.
                for sequence in going.values():
                    self.engine.abort(sequence)

    def _prepare(self, conversation_or_prompt: Any) -> Prompt:
        is_chat = _is_conversation(conversation_or_prompt)
        return (self.processor.chat if is_chat else self.processor.prompt)(conversation_or_prompt)


def _timed(prepare: Prepare, item: Any) -> tuple[Prompt, float, float]:
    """A prompt, when work on it began (seconds since the epoch), and how many seconds that took.

    Raises:
        PromptError: it cannot be prepared, for whatever reason: one bad request is that request's error alone.
    """
    arrival = time.time()
    try:
        return prepare(item), arrival, time.time() - arrival
    except UserError:
        raise
    except Exception as error:  # of a library that met what nobody foresaw; the cause keeps its traceback
        raise PromptError(f"the request cannot be prepared: {type(error).__name__}: {error}") from error


def _engine_options(given: dict[str, Any]) -> EngineOptions:
    unknown = sorted(set(given) - set(EngineOptions.__dataclass_fields__))
    if unknown:
        raise OptionError(
            f"unknown option {unknown[0]!r}; the engine has {', '.join(sorted(EngineOptions.__dataclass_fields__))}"
        )
    return EngineOptions(**given)


def _params_per_item(params: Any, count: int, kind: str) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    params = list(params)
    if len(params) != count:
        raise OptionError(f"{len(params)} sampling_params for {count} {kind}s: give one for all, or one for each")
    return params


def _is_conversation(value: Any) -> bool:
    return _is_list_of(value, Mapping) and all("role" in message for message in value)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str | Mapping) or _is_list_of(value, int)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, kind) for item in value)
