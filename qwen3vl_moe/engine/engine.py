"""The loop: sequences in, steps, finished sequences out."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass

from qwen3vl_moe.engine.detokenizer import TextStream, TokenBytes
from qwen3vl_moe.engine.kv_cache import KVCache, plan_blocks, usable_model_len
from qwen3vl_moe.engine.outputs import Logprob, RequestMetrics
from qwen3vl_moe.engine.params import GenerationDefaults, SamplingParams
from qwen3vl_moe.engine.runner import Runner, free_cache_bytes
from qwen3vl_moe.engine.sampler import TokenLogprob
from qwen3vl_moe.engine.scheduler import Scheduler
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.errors import OptionError, PromptError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.processor import Prompt

_DEFAULT_MODEL_LEN = 32768  # the published model could do 262144, which is 24 GiB of cache for a single sequence


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine.

    Attributes:
        max_model_len: most tokens of prompt and answer; None: 32768, or fewer where the model or the cache hold fewer.
        max_num_seqs: most sequences in a step.
        max_prefill_tokens: most prompt tokens in a step.
        block_size: tokens in a cache block.
        num_blocks: cache blocks; None sizes the cache from the memory of the device.
        gpu_memory_utilization: part of the device's memory that weights, steps and cache may take together.
        seed: of the requests that name none.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 128
    max_prefill_tokens: int = 8192
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_prefill_tokens", "block_size", "num_blocks"):
            value = getattr(self, name)
            optional = name in ("max_model_len", "num_blocks")
            if not (value is None and optional) and not (type(value) is int and value >= 1):
                raise OptionError(f"{name}={value!r}: an integer of at least 1 is needed")
        if type(self.seed) is not int:
            raise OptionError(f"seed={self.seed!r}: an integer is needed")
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


class Engine:
    """Scheduler, cache and runner around one model. Not thread-safe.

    Args:
        model: on its device.
        tokenizer: for the text of tokens.
        defaults: the checkpoint's sampling defaults.
        options: sizes.
    """

    def __init__(self, model: Qwen3VLMoe, tokenizer, defaults: GenerationDefaults, options: EngineOptions):
        self.model, self.tokenizer, self.defaults = model, tokenizer, defaults
        text = model.config.text
        model_len = options.model_len(text.max_positions)
        num_blocks = plan_blocks(
            text,
            model.dtype,
            block_size=options.block_size,
            max_model_len=model_len,
            max_num_seqs=options.max_num_seqs,
            num_blocks=options.num_blocks,
            free_bytes=free_cache_bytes(
                model, options.max_prefill_tokens, options.max_num_seqs, options.gpu_memory_utilization
            ),
        )
        self.max_model_len = usable_model_len(options.max_model_len, model_len, num_blocks, options.block_size)
        self.cache = KVCache(text, num_blocks, options.block_size, model.dtype, model.device)
        self.scheduler = Scheduler(self.cache, options.max_num_seqs, options.max_prefill_tokens)
        self.runner = Runner(model, self.cache)
        self._token_bytes = TokenBytes(tokenizer)
        self._decoded: dict[int, str] = {}
        self._ids = itertools.count()
        self._seeds = random.Random(options.seed)

    def check(self, params: SamplingParams) -> None:
        """Raises OptionError for parameters that this model cannot serve."""
        vocabulary = self.model.config.text.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocabulary:
                raise OptionError(f"{name}={getattr(params, name)}: the vocabulary has only {vocabulary} tokens")
        outside = [token for token in params.stop_token_ids if token >= vocabulary]
        if outside:
            raise OptionError(f"stop_token_ids: {outside[0]} is outside of the vocabulary ({vocabulary} tokens)")

    def add(self, prompt: Prompt, params: SamplingParams, arrival: float | None = None) -> Sequence:
        """Queue a request.

        Args:
            arrival: when it came (seconds since the epoch), if work on it has begun before; now if None.

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
        # Drawn for every request, so that one that brings its own seed does not shift those after it.
        seed = self._seeds.getrandbits(63)
        sequence = Sequence(
            request_id=str(next(self._ids)),
            prompt=prompt,
            params=params,
            max_len=self.max_model_len,
            eos_token_ids=frozenset() if params.ignore_eos else self.defaults.eos_token_ids,
            text=TextStream(self._token_bytes, params.stop),
            seed=seed if params.seed is None else params.seed,
            metrics=RequestMetrics(arrival_time=time.time() if arrival is None else arrival),
        )
        sequence.metrics.stages["preprocess"] = time.time() - sequence.metrics.arrival_time
        self.scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """Give a request up and free what it holds. Harmless on a finished one."""
        if not sequence.finished:
            self.scheduler.remove(sequence)
            sequence.finish("abort")

    def step(self) -> None:
        """Compute one step; the sequences in it carry the result."""
        started = time.time()
        chunks = self.scheduler.schedule()
        if not chunks:
            return
        for chunk in chunks:
            metrics = chunk.sequence.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = started
                metrics.stages["queue"] = started - metrics.arrival_time - metrics.stages["preprocess"]

        step = self.runner.run(chunks)
        model_seconds = time.time() - started - step.vision_seconds

        for chunk, result in zip(chunks, step.results, strict=True):
            sequence = chunk.sequence
            stages = sequence.metrics.stages
            stages["vision"] += step.vision_seconds if sequence in step.encoded else 0.0
            stages["prefill" if chunk.is_prefill else "decode"] += model_seconds
            sequence.prompt_logprobs += [self._readable(entry) for entry in result.prompt_logprobs]
            sequence.advance(chunk.stop)
            if result.token_id is not None:
                sequence.append(result.token_id, self._readable(result.logprobs) if result.logprobs else None)
            if sequence.finished:
                self.scheduler.remove(sequence)

    def _readable(self, entries: list[TokenLogprob]) -> dict[int, Logprob]:
        readable: dict[int, Logprob] = {}
        for token_id, logprob, rank in entries:
            if token_id not in self._decoded:
                self._decoded[token_id] = self.tokenizer.decode([token_id])
            readable.setdefault(token_id, Logprob(logprob, rank, self._decoded[token_id]))
        return readable
