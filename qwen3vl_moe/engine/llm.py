"""What a user calls: load a checkpoint, chat, generate, stream.

Prompts are made (templates, tokens, images) in threads ahead of the engine, which itself runs in the caller's thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine.arguments import (
    is_conversation,
    is_prompt,
    listed,
    one_params,
    params_per_item,
    parse_options,
    refuse_arguments,
)
from qwen3vl_moe.engine.cuda_graphs import uses_graphs
from qwen3vl_moe.engine.dealer import answers_of_all
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.engine.engine import Engine
from qwen3vl_moe.engine.follower import start_ranks
from qwen3vl_moe.engine.outputs import RequestOutput
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.engine.replicas import Replicas, start_replicas
from qwen3vl_moe.engine.service import Prepare, Service
from qwen3vl_moe.engine.workers import Workers
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.inputs.access import media_access
from qwen3vl_moe.inputs.processor import Processor, Prompt
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops.dispatch import kernels_in_use
from qwen3vl_moe.weights import load_model, resolve
from qwen3vl_moe.weights.placement import not_taken, parse_device, require_division, settle_threads

How = tuple[str, dict[str, Any]]  # see LLM.preparing
Conversation = list[dict[str, Any]]  # messages: {"role": ..., "content": text or a list of text, image and video items}


class LLM:
    """A loaded model that answers.

    ::

        llm = LLM("Qwen/Qwen3-VL-30B-A3B-Instruct")
        content = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
        print(llm.chat([{"role": "user", "content": content}])[0].outputs[0].text)

    Several threads may call one LLM: each step serves the requests of all calls, and calls take turns at the steps. A
    call works while its result is waited for; a stream that is neither read nor closed holds nobody up. (Which requests
    share a step then depends on the clock, and so may the last bits of their numbers, and draws without a seed.)

    Args:
        model: a checkpoint directory, a hub id, or "demo": the small trained checkpoint of this package.
        device: "auto" (a GPU where there is one), "cuda", "cuda:1", "cpu". On a CPU, a narrow model such as the demo
            sets torch to one thread, unless the environment has OMP_NUM_THREADS or MKL_NUM_THREADS.
        dtype: "auto" (the checkpoint's), or a torch dtype or its name.
        moe: "tma" (Hopper), "triton" (any GPU from compute capability 8.0 on), "reference" (plain torch), "auto".
        min_pixels, max_pixels: area to which images are resized (of videos: docs/video.md); None: the checkpoint's.
        alpha: what transparent images become: "white", on a white ground; "drop", as transformers has them.
        media_root: the directory that files of images and videos have to lie in; None: anywhere.
        allow_hosts: the hosts that images and videos are downloaded from, ".example.org" for all below it; None: any.
        allow_private_hosts: whether they may be downloaded from this machine and from private networks.
        expert_layout: "published" or "transformers5", for checkpoints that do not tell.
        tensor_parallel_size: among how many GPUs (processes, on a CPU) every layer is divided: from ``device`` on. The
            other processes are started by this one and end with it (:meth:`close`).
        data_parallel_size: how many engines, each with the whole model on GPUs of its own, share the requests of
            :meth:`chat`, :meth:`generate` and :meth:`as_completed`. A :meth:`stream` is the first one's.
        progress: show the bars of loading and warming up.
        engine_options: fields of :class:`EngineOptions`: ``max_model_len``, ``max_num_seqs``, ``max_prefill_tokens``,
            ``max_encoder_tokens``, ``block_size``, ``num_blocks``, ``gpu_memory_utilization``, ``seed``,
            ``enforce_eager``, ``async_scheduling``, ``enable_prefix_caching``, ``kv_cache_dtype``.

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
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        progress: bool = True,
        **engine_options: Any,
    ):
        asked = dict(locals()) | {"progress": False}  # of other engines: one bar is enough
        del asked["self"], asked["engine_options"]
        options = parse_options(engine_options)
        self.name, self.options, self.random_weights, directory = str(model), options, False, resolve(model)
        self.moe_fallback: str | None = None
        # What is small is read before the weights, so that a mistake in it shows at once.
        config = Qwen3VLMoeConfig.from_pretrained(directory)
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        access = media_access(media_root, allow_hosts, allow_private_hosts)
        longest = options.model_len(config.text.max_positions)
        device = parse_device(device)
        settle_threads(device, config.text)
        self.processor = Processor.from_pretrained(
            directory,
            config,
            **limits,
            max_model_len=longest,
            access=access,
            alpha=alpha,
            resize_on_device=device.type == "cuda",
        )
        defaults = GenerationDefaults.from_pretrained(directory, self.processor.eos_token_id, config.text.vocab_size)
        require_division(config.text, tensor_parallel_size)
        self._replicas = start_replicas(f"{__name__}:LLM", asked | engine_options | {"device": device})
        arguments: dict[str, Any] = {"path_or_id": str(directory), "moe": moe, "expert_layout": expert_layout}
        arguments |= {"dtype": str(dtype).removeprefix("torch."), "progress": False}
        self._workers = start_ranks(tensor_parallel_size, device, arguments, options)
        arguments |= {"device": device, "progress": progress}
        with nullcontext() if self._workers is None else self._workers.together(hold=False):
            if self._workers is not None:
                arguments["ranks"] = self._workers.ranks
            weights = load_model(**arguments)
            if moe == "auto":
                taken = weights.moe, weights.device, weights.dtype, config.text, tensor_parallel_size
                self.moe_fallback = not_taken(*taken)
                if self.moe_fallback is not None and weights.device.type == "cuda":  # nobody expects kernels on a CPU
                    what = "the portable kernels" if weights.moe == "triton" else "plain torch"
                    warnings.warn(f"moe='auto' runs the experts in {what}: {self.moe_fallback}", stacklevel=2)
            self.engine = Engine(weights, self.processor.tokenizer, defaults, options, progress, self._workers)
        # Perhaps less than was asked for: the cache has its say. What cannot fit is refused before it is decoded.
        self.processor.max_model_len = self.engine.max_model_len
        self.service = Service(self.engine)
        if self._replicas is not None:
            self._replicas.wait()

    @classmethod
    def from_parts(
        cls,
        model: Qwen3VLMoe,
        processor: Processor,
        defaults: GenerationDefaults | None = None,
        workers: Workers | None = None,
        replicas: Replicas | None = None,
        **engine_options: Any,
    ) -> LLM:
        """An LLM around a model that is in memory already.

        Args:
            processor: with ``resize_on_device`` for a model on a GPU, which spares the host the resize of images.
            defaults: the checkpoint's sampling; None: greedy, until the tokenizer's end-of-text token.
            workers: the processes of the model's other ranks, which were told the same options.
            replicas: other engines of the same model.
        """
        self = cls.__new__(cls)
        if defaults is None:
            eos = processor.eos_token_id
            defaults = GenerationDefaults(frozenset() if eos is None else frozenset({eos}))
        self.name, self.random_weights, self.moe_fallback = "a model in memory", False, None
        self.processor, self.options = processor, parse_options(engine_options)
        self._workers, self._replicas = workers, replicas
        with nullcontext() if workers is None else workers.together(hold=False):
            self.engine = Engine(model, processor.tokenizer, defaults, self.options, workers=workers)
        self.service = Service(self.engine)
        if replicas is not None:
            replicas.wait()
        return self

    def close(self) -> None:
        """End the processes of other ranks and engines, if there are any; this LLM cannot be used afterwards."""
        for others in (self._workers, self._replicas):
            if others is not None:
                others.close()

    @property
    def settings(self) -> dict[str, Any]:
        """What "auto" and the size of the memory came to, and which kernels run.

        ``moe_fallback`` is there only if moe="auto" could not take the fastest kernels, and says why.
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
            **kernels_in_use(model.device, model.dtype, head_dims, engine.cache.tensor[0]),
            **({"cpu_threads": torch.get_num_threads()} if model.device.type == "cpu" else {}),
            "tensor_parallel_size": model.ranks.size,
            "data_parallel_size": 1 if self._replicas is None else self._replicas.size,
            "cuda_graphs": uses_graphs(model, self.options),
            "max_model_len": engine.max_model_len,
            "max_num_seqs": engine.scheduler.max_num_seqs,
            "max_prefill_tokens": self.options.max_prefill_tokens,
            "kv_cache_dtype": "fp8"
            if self.options.kv_cache_dtype == "fp8"
            else str(model.dtype).removeprefix("torch."),
            "kv_cache_tokens": engine.cache.num_blocks * engine.cache.block_size,
        }

    @property
    def stats(self) -> dict[str, int]:
        """Reuse of the cache so far, in tokens: how many were looked up, and how many of them were found.

        A preempted request counts again. The names are those of vLLM's metrics.
        """
        scheduler = self.engine.scheduler
        others = {} if self._replicas is None else self._replicas.stats
        return {
            "prefix_cache_queries": scheduler.num_queried_tokens + others.get("prefix_cache_queries", 0),
            "prefix_cache_hits": scheduler.num_cached_tokens + others.get("prefix_cache_hits", 0),
        }

    def chat(
        self,
        messages: Conversation | list[Conversation],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        tools: list[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **not_built: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several; see :meth:`generate` for the rest.

        Args:
            messages: ``{"role": "user", "content": ...}`` where content is a text or a list of
                ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": path | URL | PIL image | bytes}``;
                or a list of such conversations.
            tools, chat_template_kwargs, add_generation_prompt, continue_final_message: of all conversations; see
                :meth:`.Processor.chat`.
        """
        refuse_arguments(not_built)
        asked = {
            "tools": tools,
            "chat_template_kwargs": chat_template_kwargs,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        many = [messages] if is_conversation(messages) else messages
        return self._complete(many, ("chat", asked), "conversation", sampling_params, use_tqdm)

    def generate(
        self,
        prompts: Any | list[Any],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = False,
        **not_built: Any,
    ) -> list[RequestOutput]:
        """Continue one prompt or several, with no chat template.

        Args:
            prompts: a text, a list of token ids, ``{"prompt": text, "multi_modal_data": {"image": one or a list}}``
                (also ``"video"``, and ``"prompt_token_ids"`` for ``"prompt"``; :meth:`.Processor.prompt` has the rest),
                or a list of such.
            sampling_params: one for all, or one per prompt; None takes everything from the checkpoint.
            use_tqdm: show how many of the answers are there, and the tokens per second of prompts and answers; unlike
                vLLM nothing is shown unasked.
            not_built: vLLM's arguments that have no meaning here are refused by name.

        Returns:
            One output per prompt, in their order.

        Raises:
            PromptError: a prompt cannot be used; the others are given up, and the message says which one it was.
            OptionError: sampling parameters that the model cannot serve, or not as many as prompts.
            NumbersError: the model's logits are not finite.
        """
        refuse_arguments(not_built)
        many = [prompts] if is_prompt(prompts) else prompts
        return self._complete(many, ("prompt", {}), "prompt", sampling_params, use_tqdm)

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        """The checkpoint's tokenizer, shared: other threads may be at work with it."""
        return self.processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request takes that brings no parameters: the checkpoint's, else the neutral values."""
        return self.engine.defaults.complete(SamplingParams())

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
                :meth:`generate`. In a list, a function without arguments may stand for one: a thread calls it shortly
                before the request begins, so that what a large job holds need not be in memory all at once.
            sampling_params: one for all, or one per request.
            return_exceptions: where a request cannot be used, yield the error in place of its output and go on.

        Yields:
            ``(index, output)``, each index once. Requests begin in their order and end in any.

        Raises:
            PromptError, OptionError: as :meth:`generate`; with ``return_exceptions`` only for what is no list of
                requests, and for a wrong number of sampling parameters.
        """
        given = conversations_or_prompts
        many = [given] if is_conversation(given) or is_prompt(given) else given
        return self._as_completed(many, ("any", {}), "request", sampling_params, return_exceptions)

    def stream(
        self, conversation_or_prompt: Any, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """The answer to one conversation (or prompt, as in :meth:`generate`) while it is being written.

        Yields an output per step that released text, and a last one with ``finished`` set. Each holds the whole answer
        so far; ``outputs[0].new_text`` is what the previous one did not have, and joining these gives the final text.
        A character or a stop string never shows in part. Closing the iterator gives the request up.

        Raises:
            PromptError, OptionError: at the call; of frames of a video file that cannot be decoded, with an output.
        """
        return self.service.stream(conversation_or_prompt, self._prepare_any, one_params(sampling_params))

    def _complete(self, items: Any, how: How, kind: str, params: Any, use_tqdm: bool = False) -> list[RequestOutput]:
        items = listed(items, kind)
        done = self._as_completed(items, how, kind, params)
        # No bar rather than one that shows nothing: making one takes a lock that all threads share, and an interrupt in
        # the middle of that would leave it taken.
        bar = tqdm(total=len(items), desc="Processed prompts") if use_tqdm else None
        with closing(done), nullcontext() if bar is None else bar:
            outputs: dict[int, Any] = {}
            output: Any
            tokens = {"prompt": 0, "answer": 0}
            for number, output in done:  # an error was raised
                outputs[number] = output
                if bar is not None:
                    tokens["prompt"] += len(output.prompt_token_ids)
                    tokens["answer"] += sum(len(answer.token_ids) for answer in output.outputs)
                    seconds = max(bar.format_dict["elapsed"], 1e-9)
                    speeds = (f"{count / seconds:.0f} {what} tokens/s" for what, count in tokens.items())
                    bar.set_postfix_str(", ".join(speeds), refresh=False)
                    bar.update()
        return [outputs[number] for number in range(len(outputs))]

    def _as_completed(
        self, items: Any, how: How, kind: str, params: Any, return_exceptions: bool = False
    ) -> Generator[tuple[int, RequestOutput | UserError], None, None]:
        items = listed(items, kind)
        params = params_per_item(params, len(items), kind)
        if not return_exceptions:
            for each in {id(each): each for each in params}.values():
                self.engine.check(each)
        prepare = self.preparing(*how)
        if self._replicas is None:
            return self.service.answers(items, prepare, kind, params, return_exceptions)
        return answers_of_all(self._replicas, self.service, prepare, how, items, kind, params, return_exceptions)

    def preparing(self, how: str, asked: Mapping[str, Any]) -> Prepare:
        """What makes prompts of requests, named so that other processes find it, too.

        Args:
            how: "chat", "prompt", or "any" of these.
            asked: arguments of :meth:`.Processor.chat`.
        """
        known = {"chat": self._prepare_chat, "prompt": self._prepare_prompt, "any": self._prepare_any}
        return partial(known[how], **asked)

    def _prepare_any(self, conversation_or_prompt: Any, **asked: Any) -> Prompt:
        if callable(conversation_or_prompt):
            conversation_or_prompt = conversation_or_prompt()
        is_chat = is_conversation(conversation_or_prompt)
        return (self._prepare_chat if is_chat else self._prepare_prompt)(conversation_or_prompt, **asked)

    def _prepare_chat(self, conversation: Any, **asked: Any) -> Prompt:
        return self.processor.chat(conversation, **asked)

    def _prepare_prompt(self, prompt: Any, **asked: Any) -> Prompt:
        return self.processor.prompt(prompt, **asked)
