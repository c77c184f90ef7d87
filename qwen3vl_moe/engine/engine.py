"""The loop: sequences in, steps, finished sequences out."""

from __future__ import annotations

import itertools
import time
from collections import deque

import torch

from qwen3vl_moe.engine.detokenizer import TextStream, TokenBytes
from qwen3vl_moe.engine.kv_cache import KVCache, plan_cache
from qwen3vl_moe.engine.outputs import Logprob, RequestMetrics
from qwen3vl_moe.engine.params import EngineOptions, GenerationDefaults, SamplingParams
from qwen3vl_moe.engine.runner import ChunkResult, Launched, Runner, StepResult, free_cache_bytes
from qwen3vl_moe.engine.sampler import TokenLogprob
from qwen3vl_moe.engine.scheduler import Chunk, Scheduler
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.inputs.processor import Prompt
from qwen3vl_moe.model import Qwen3VLMoe


class Engine:
    """Scheduler, cache and runner around one model. Not thread-safe.

    Args:
        model: on its device.
        tokenizer: for the text of tokens.
        defaults: the checkpoint's sampling defaults.
        options: sizes.
        progress: show how far the warm-up is.
    """

    def __init__(
        self,
        model: Qwen3VLMoe,
        tokenizer,
        defaults: GenerationDefaults,
        options: EngineOptions,
        progress: bool = False,
    ):
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        free_bytes = None if options.num_blocks else free_cache_bytes(model, options)
        num_blocks, self.max_model_len = plan_cache(model.config.text, model.dtype, options, free_bytes)
        self.cache = KVCache(model.config.text, num_blocks, options.block_size, model.dtype, model.device)
        self.scheduler = Scheduler(
            self.cache,
            options.max_num_seqs,
            options.max_prefill_tokens,
            options.max_encoder_tokens,
            options.enable_prefix_caching,
        )
        self.runner = Runner(model, self.cache, options, self.max_model_len)
        self.runner.warm_up(progress)
        by_default = model.device.type == "cuda"
        self._runs_ahead = by_default if options.async_scheduling is None else options.async_scheduling
        # Steps whose tokens have not been read: at most two inside of step(), one outside.
        self._launched: deque[Launched] = deque()
        self._last_read = 0.0  # when the last tokens were, in seconds since the epoch
        self._token_bytes = TokenBytes(tokenizer)
        self._decoded: dict[int, str] = {}
        self._ids = itertools.count()

    def check(self, params: SamplingParams) -> None:
        """Raises OptionError for parameters that this model cannot serve."""
        vocabulary = self.model.config.text.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocabulary:
                raise OptionError(f"{name}={getattr(params, name)}: the vocabulary has only {vocabulary} tokens")
        outside = [token for token in params.stop_token_ids or () if token >= vocabulary]
        if outside:
            raise OptionError(f"stop_token_ids: {outside[0]} is outside of the vocabulary ({vocabulary} tokens)")

    @property
    def has_room(self) -> bool:
        """Whether the next step should see one more request, if there is one.

        There has to be a free seat. Images take long to prepare, so no more of them than fill a step are waited for:
        the step then computes while others are prepared. Requests alone decide, not the clock, so that the same calls
        make the same steps again.
        """
        waiting = self.scheduler.waiting
        images = sum(image.num_tokens for sequence in waiting for image in sequence.prompt.images)
        seats = self.scheduler.max_num_seqs - len(self.scheduler.running) - len(waiting)
        return seats > 0 and images < min(self.scheduler.max_prefill_tokens, self.scheduler.max_encoder_tokens)

    def request(
        self, prompt: Prompt, params: SamplingParams, arrival: float | None = None, preprocess: float = 0.0
    ) -> Sequence:
        """Check a request and make its sequence, ready for :meth:`add`.

        Args:
            arrival: when work on it began (seconds since the epoch); now if None.
            preprocess: seconds that it took to make the prompt.

        Raises:
            PromptError: the prompt leaves no room for an answer in max_model_len.
            OptionError: see :meth:`check`.
        """
        self.check(params)
        num_tokens = len(prompt.token_ids)
        if num_tokens >= self.max_model_len:
            images = sum(image.num_tokens for image in prompt.images)
            raise PromptError(
                f"the prompt has {num_tokens} tokens"
                + (f" ({images} of images)" if images else "")
                + f", which leaves no room for an answer in max_model_len={self.max_model_len}; shorten it"
                + (", lower max_pixels" if images else "")
                + " or raise max_model_len"
            )
        params = self.defaults.complete(params)
        generator = None if params.seed is None else torch.Generator(self.model.device).manual_seed(params.seed)
        sequence = Sequence(
            request_id=str(next(self._ids)),
            prompt=prompt,
            params=params,
            max_len=self.max_model_len,
            eos_token_ids=frozenset() if params.ignore_eos else self.defaults.eos_token_ids,
            text=TextStream(self._token_bytes, tuple(params.stop or ())),
            generator=generator,
            metrics=RequestMetrics(arrival_time=time.time() if arrival is None else arrival),
        )
        sequence.metrics.stages["preprocess"] = preprocess
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Give a request up and free what it holds. Harmless on a finished one."""
        if not sequence.finished:
            self.scheduler.remove(sequence)
            sequence.finish("abort")
            self._forget_finished()

    def step(self) -> None:
        """Compute one step; the sequences in it carry the result.

        If the step after it does not depend on its tokens, that one is launched before they are read. Interrupted while
        it waits, it leaves what was launched to the next call; if taking the tokens fails, what was launched is dropped
        and computed again.
        """
        if not self._launched:
            self._launch(self.scheduler.schedule())
        if not self._launched:
            return
        step = self._launched[0]
        if self._runs_ahead and len(self._launched) == 1:
            self._launch(self.scheduler.ahead(step.chunks), step)
        result = self.runner.read(step)
        # What was launched ahead waited for the step before it.
        model_seconds = time.time() - max(step.started, self._last_read) - sum(result.seconds.values())
        self._last_read = time.time()
        try:
            self._launched.popleft()
            for chunk, of_chunk in zip(step.chunks, result.results, strict=True):
                if not chunk.sequence.finished:  # else this row is of no use
                    self._take(chunk, of_chunk, result, max(0.0, model_seconds))
        except BaseException:
            self._launched.clear()  # tokens may be missing from here on: both steps are computed again
            raise
        self._forget_finished()

    def _launch(self, chunks: list[Chunk], after: Launched | None = None) -> None:
        now = time.time()
        for chunk in chunks:
            metrics = chunk.sequence.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
                metrics.stages["queue"] = now - metrics.arrival_time - metrics.stages["preprocess"]
        if chunks:
            self._launched.append(self.runner.launch(chunks, after))
            if after is None:  # else their tokens are not known yet
                self.scheduler.name_blocks(chunks)

    def _take(self, chunk: Chunk, of_chunk: ChunkResult, of_step: StepResult, model_seconds: float) -> None:
        """Give a sequence what a step has computed for it."""
        sequence = chunk.sequence
        stages, is_encoded = sequence.metrics.stages, sequence in of_step.encoded
        for stage, takes_part in (
            ("host_to_device", is_encoded),
            ("vision", is_encoded),
            ("sample", chunk.samples),
        ):
            stages[stage] += of_step.seconds[stage] if takes_part else 0.0
        stages["prefill" if chunk.is_prefill else "decode"] += model_seconds
        sequence.prompt_logprobs += [self._readable(entry) for entry in of_chunk.prompt_logprobs]
        if of_chunk.token_id is not None:
            sequence.append(of_chunk.token_id, self._readable(of_chunk.logprobs) if of_chunk.logprobs else None)
        self.scheduler.computed(chunk)
        if sequence.finished:
            self.scheduler.remove(sequence)

    def _forget_finished(self) -> None:
        """Steps launched ahead for sequences that have all ended meanwhile are not waited for."""
        while self._launched and all(chunk.sequence.finished for chunk in self._launched[0].chunks):
            self._launched.popleft()

    def _readable(self, entries: list[TokenLogprob]) -> dict[int, Logprob]:
        readable: dict[int, Logprob] = {}
        for token_id, logprob, rank in entries:
            if token_id not in self._decoded:
                self._decoded[token_id] = self.tokenizer.decode([token_id])
            readable.setdefault(token_id, Logprob(logprob, rank, self._decoded[token_id]))
        return readable
