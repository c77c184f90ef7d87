"""The loop: sequences in, steps, finished sequences out.

An interrupt (Ctrl-C) may strike at any line. Whatever is changed in several steps is marked before the first and after
the last of them; where the mark was left, nothing of the half-done change is used: every sequence goes back to the
queue with no blocks, and finds most of them by their content again.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from dataclasses import replace

import numpy as np
import torch

from qwen3vl_moe.engine.admission import Admission
from qwen3vl_moe.engine.arrivals import Arrivals
from qwen3vl_moe.engine.calls import Call
from qwen3vl_moe.engine.chunks import Chunk, Decoding, Step
from qwen3vl_moe.engine.constraints import Constraints, tokens_of_bad_words
from qwen3vl_moe.engine.defaults import GenerationDefaults
from qwen3vl_moe.engine.detokenizer import TextStream, TokenBytes
from qwen3vl_moe.engine.executor import Executor
from qwen3vl_moe.engine.grammar import Grammars
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.engine.outputs import Logprob, RequestMetrics
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.engine.prepare import prepare
from qwen3vl_moe.engine.runner import ChunkResult, Launched, Runner, StepResult
from qwen3vl_moe.engine.sampler import TokenLogprob
from qwen3vl_moe.engine.scheduler import Scheduler
from qwen3vl_moe.engine.sequence import Sequence
from qwen3vl_moe.engine.workers import Workers
from qwen3vl_moe.errors import NumbersError, OptionError, PromptError, UserError
from qwen3vl_moe.inputs.processor import Prompt
from qwen3vl_moe.model import Qwen3VLMoe

_DAMAGED = "the weights or settings of the checkpoint are damaged, or the dtype is too narrow"


class Engine:
    """Scheduler, cache and runner around one model. Not thread-safe.

    Args:
        model: on its device.
        tokenizer: for the text of tokens.
        defaults: the checkpoint's sampling defaults.
        options: sizes.
        progress: show how far the warm-up is.
        workers: the processes of the model's other ranks, if it has any.
    """

    def __init__(
        self,
        model: Qwen3VLMoe,
        tokenizer,
        defaults: GenerationDefaults,
        options: EngineOptions,
        progress: bool = False,
        workers: Workers | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        on_gpu = model.device.type == "cuda"
        self.cache, options, self.max_model_len = prepare(model, options, progress)
        self.scheduler = Scheduler(
            self.cache,
            options.seats,
            options.max_prefill_tokens,
            options.max_encoder_tokens,
            options.enable_prefix_caching,
        )
        executor = Executor(model, self.cache.tensor, options, self.max_model_len, workers)
        executor.warm_up(progress)
        self.runner = Runner(executor, self.cache.block_size, options.seed)
        self._runs_ahead = on_gpu if options.async_scheduling is None else options.async_scheduling
        # Steps whose tokens have not been read: at most two inside of step(), one outside.
        self._launched: deque[Launched] = deque()
        self._last_read = 0.0  # when the last tokens were, in seconds since the epoch
        self._token_bytes = TokenBytes(tokenizer)
        vocab_size = model.config.text.vocab_size
        grammars = Grammars(tokenizer, vocab_size, defaults.eos_token_ids)
        self.admission = Admission(defaults, grammars, vocab_size, self.max_model_len)
        self._ids = itertools.count()
        self._arrivals = Arrivals()
        self._stalled = False  # whether the last step had nothing to compute but what waits for frames
        self._half_done = False  # whether a change of what scheduler, cache and sequences hold was broken off
        self._taking: tuple[Sequence, int] | None = None  # who is given a token, and how many it had of its answer

    @property
    def defaults(self) -> GenerationDefaults:
        """The checkpoint's sampling defaults; new ones hold for requests that begin afterwards."""
        return self.admission.defaults

    @defaults.setter
    def defaults(self, defaults: GenerationDefaults) -> None:
        self.admission = replace(self.admission, defaults=defaults)

    def check(self, params: SamplingParams) -> SamplingParams:
        """See :meth:`.Admission.check`; a grammar is known to :meth:`requests` afterwards. Any thread may ask."""
        return self.admission.check(params)

    @property
    def has_room(self) -> bool:
        """Whether the next step should see one more request, if there is one.

        There has to be a free seat. Images take long to prepare, so no more of them than fill a step are waited for:
        the step then computes while others are prepared. (One that lacks frames fills none.) Requests alone decide, not
        the clock, so that the same calls make the same steps again. Any thread may ask.
        """
        waiting = self.scheduler.waiting.copy()  # at once: other threads change it meanwhile
        ready = [sequence for sequence in waiting if not sequence.undecoded]
        images = sum(image.num_tokens for sequence in ready for image in sequence.prompt.images)
        seats = self.scheduler.max_num_seqs - len(self.scheduler.running) - len(waiting)
        return seats > 0 and images < min(self.scheduler.max_prefill_tokens, self.scheduler.max_encoder_tokens)

    def request(
        self, prompt: Prompt, params: SamplingParams, arrival: float | None = None, preprocess: float = 0.0
    ) -> Sequence:
        """The sequence of a request for one answer; for the rest see :meth:`requests`."""
        [sequence] = self.requests(prompt, params, arrival, preprocess)
        return sequence

    def requests(
        self,
        prompt: Prompt,
        params: SamplingParams,
        arrival: float | None = None,
        preprocess: float = 0.0,
        call: Call | None = None,
    ) -> list[Sequence]:
        """Check a request and make a sequence for each of its answers, ready for :meth:`add`.

        Args:
            arrival: when work on it began (seconds since the epoch); now if None.
            preprocess: seconds that it took to make the prompt.
            call: who waits for it: once that is over, so is the request. None: it is not given up by itself.

        Raises:
            PromptError: the prompt leaves no room for an answer in max_model_len.
            OptionError: see :meth:`check`.
        """
        params = self.check(self.admission.formed(params, prompt))
        self._check_length(prompt)
        eos = frozenset() if params.ignore_eos else self.defaults.eos_token_ids
        form = params.structured_outputs
        constraints = Constraints(
            params,
            ending=eos.union(params.stop_token_ids or ()),
            suppressed=self.defaults.suppressed,
            bad_words=tokens_of_bad_words(self.tokenizer, params.bad_words or ()),
            grammar=None if form is None else self.admission.grammars.of(form),
        )
        request_id, arrival = str(next(self._ids)), time.time() if arrival is None else arrival
        sequences = []
        for index in range(params.n):
            own = params
            if index:  # the first answer's prompt is everybody's
                seed = None if params.seed is None else (params.seed + index) % 2**63
                own = replace(params, seed=seed, prompt_logprobs=None)
            sequence = Sequence(
                request_id=request_id,
                prompt=prompt,
                params=own,
                max_len=self.max_model_len,
                eos_token_ids=eos,
                text=self._text_stream(own),
                generator=None if own.seed is None else torch.Generator(self.model.device).manual_seed(own.seed),
                metrics=RequestMetrics(arrival_time=arrival),
                index=index,
                constraints=(constraints.of_next_answer() if index else constraints) or None,
                call=call,
            )
            sequence.metrics.stages["preprocess"] = preprocess
            sequences.append(sequence)
        return sequences

    def _text_stream(self, params: SamplingParams) -> TextStream:
        if not params.detokenize:
            return TextStream(None)
        stop, include = tuple(params.stop or ()), params.include_stop_str_in_output
        return TextStream(self._token_bytes, stop, include, params.skip_special_tokens)

    def _check_length(self, prompt: Prompt) -> None:
        num_tokens = len(prompt.token_ids)
        if num_tokens >= self.max_model_len:
            images = sum(image.num_tokens for image in prompt.images)
            videos = any(image.of_video for image in prompt.images)
            raise PromptError(
                f"the prompt has {num_tokens} tokens"
                + (f" ({images} of images{' and frames' if videos else ''})" if images else "")
                + f", which leaves no room for an answer in max_model_len={self.max_model_len}; shorten it"
                + (", lower max_pixels" if images else "")
                + (", take fewer frames" if videos else "")
                + " or raise max_model_len"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self._arrivals.add(sequence)
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Give a request up and free what it holds. Harmless on a finished one."""
        if sequence.finished:
            return
        sequence.finish("abort")
        self._arrivals.forget()
        if self._half_done:  # settle() keeps only what has not finished
            return
        self._half_done = True
        self.scheduler.remove(sequence)
        self._forget_finished()
        self._half_done = False

    def settle(self) -> None:
        """After an interrupt: give up what no call waits for any more, and take back what was done by half."""
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.call is not None and sequence.call.over:
                self.abort(sequence)
        if not self._half_done:
            return
        self._launched.clear()
        going = dict.fromkeys([*self.scheduler.running, *self.scheduler.waiting])  # in one, or for a moment in both
        self.scheduler.begin_again([sequence for sequence in going if not sequence.finished])
        for sequence in self.scheduler.waiting:
            taking, had = self._taking or (None, 0)
            sequence.rewind(
                had if sequence is taking else sequence.num_output_tokens, self.model.config.text.vocab_size
            )
        self._taking, self._half_done = None, False

    def step(self) -> None:
        """Compute one step; the sequences in it carry the result.

        If the step after it does not depend on its tokens, that one is launched before they are read. Interrupted while
        it waits, it leaves what was launched to the next call; interrupted elsewhere, or if something fails, what was
        launched is dropped and computed again.
        """
        if self._half_done:
            self.settle()
        self._half_done = True
        for sequence, error in self._arrivals.failed():
            sequence.fail(error)
            self.scheduler.remove(sequence)
        self._arrivals.forget()
        if not self._launched:
            self._launch(self.scheduler.schedule())
        if self._launched and self._runs_ahead and len(self._launched) == 1:
            self._launch(self.scheduler.ahead(self._launched[0].chunks), self._launched[0])
        self._half_done, self._stalled = False, not self._launched
        if not self._launched:
            return
        step = self._launched[0]
        result = self.runner.read(step)
        self._half_done = True
        # What was launched ahead waited for the step before it.
        model_seconds = time.time() - max(step.started, self._last_read) - sum(result.seconds.values())
        self._last_read = time.time()
        self._launched.popleft()
        if isinstance(step.chunks, Decoding):
            self._take_decoded(step.chunks, result, max(0.0, model_seconds))
        else:
            self._take_all(step.chunks, result, max(0.0, model_seconds))
        self._forget_finished()
        self._taking, self._half_done = None, False

    def wait_for_frames(self) -> None:
        """Wait for frames, if the last step had nothing to compute; other threads may use the engine meanwhile."""
        if self._stalled:
            self._arrivals.wait()

    def _launch(self, chunks: Step, after: Launched | None = None) -> None:
        if not chunks:
            return
        if after is None:  # else every sequence has been in a step before
            now = time.time()
            for chunk in chunks:
                metrics = chunk.sequence.metrics
                if metrics.first_scheduled_time is None:
                    metrics.first_scheduled_time = now
                    metrics.stages["queue"] = now - metrics.arrival_time - metrics.stages["preprocess"]
        self._launched.append(self.runner.launch(chunks, after))
        if after is None:  # else their tokens are not known yet
            self.scheduler.name_blocks(chunks)

    def _take_all(self, chunks: list[Chunk], result: StepResult, model_seconds: float) -> None:
        """Give every sequence of a step what that has computed for it."""
        seconds, size, sampled = result.seconds, self.cache.block_size, itertools.count()
        tokens, finite = result.tokens_R.tolist(), np.isfinite(result.highest_R).tolist()
        for number, chunk in enumerate(chunks):
            sequence, row = chunk.sequence, next(sampled) if chunk.samples else None
            if sequence.finish_reason is not None:  # meanwhile: this row is of no use
                continue
            stages = sequence.metrics.stages
            if row is not None:
                stages["sample"] += seconds["sample"]
            if chunk.is_prefill:
                stages["prefill"] += model_seconds
                if sequence in result.encoded:
                    stages["host_to_device"] += seconds["host_to_device"]
                    stages["vision"] += seconds["vision"]
            else:
                stages["decode"] += model_seconds
                # Most decode in most steps, and most tokens are no more than that: see _take_decoded.
                if row is not None and finite[row] and sequence.just_takes(tokens[row]):
                    sequence.token_ids.append(tokens[row])
                    sequence.num_computed += 1
                    if chunk.stop % size == 0:
                        self.scheduler.computed(chunk)
                    continue
            self._take(chunk, result.of(number, row))

    def _take_decoded(self, decoding: Decoding, result: StepResult, model_seconds: float) -> None:
        """The same for a step of decoding, in which nearly every sequence gets its token, and that is all.

        An interrupt may strike here too: a token is a sequence's own once it stands in its list.
        """
        decoding.tally.decode += model_seconds
        decoding.tally.sample += result.seconds["sample"]
        ends_S = (decoding.left_S == 1) | np.isin(result.tokens_R, decoding.endings)
        busy_S = ends_S | decoding.watched_S | ~np.isfinite(result.highest_R)
        rows = zip(decoding.sequences, result.tokens_R.tolist(), busy_S.tolist(), strict=True)
        for row, (sequence, token_id, is_busy) in enumerate(rows):
            if sequence.finish_reason is not None:  # meanwhile: this row is of no use
                continue
            if is_busy:
                self._take(decoding[row], result.of(row, row))
            else:
                sequence.token_ids.append(token_id)
                sequence.num_computed += 1
        fills_S = decoding.stops_S % self.cache.block_size == 0
        for row in np.flatnonzero(fills_S & ~busy_S).tolist():
            if not decoding.sequences[row].finished:
                self.scheduler.computed(decoding[row])

    def _take(self, chunk: Chunk, result: ChunkResult) -> None:
        """Give a sequence what a step has computed for it."""
        sequence = chunk.sequence
        self._taking = sequence, sequence.num_output_tokens
        error = _error_of(sequence, result)
        if error is not None:
            sequence.fail(error)
        else:
            for entry in result.prompt_logprobs:
                sequence.prompt_logprobs.append(self._readable(sequence, len(sequence.prompt_logprobs), entry))
            if result.token_id is not None:
                own = result.logprobs
                logprobs = self._readable(sequence, len(sequence.token_ids), own) if own else None
                sequence.append(result.token_id, logprobs)
            self.scheduler.computed(chunk)
        if sequence.finished:
            self.scheduler.remove(sequence)

    def _forget_finished(self) -> None:
        """Steps launched ahead for sequences that have all ended meanwhile are not waited for."""
        while self._launched and self._launched[0].in_vain:
            self._launched.popleft()

    def _readable(self, sequence: Sequence, place: int, entries: list[TokenLogprob]) -> dict[int, Logprob]:
        """Log-probabilities of what stands, or could stand, at a place of a sequence."""
        before, decode = sequence.token_ids[max(0, place - 4) : place], sequence.params.detokenize
        readable: dict[int, Logprob] = {}
        for token_id, logprob, rank in entries:
            if token_id not in readable:
                text = self._token_bytes.decoded(token_id, before) if decode else None
                readable[token_id] = Logprob(logprob, rank, text)
        return readable


def _error_of(sequence: Sequence, result: ChunkResult) -> UserError | None:
    """Why a chunk's result cannot be used, if it cannot."""
    if result.prompt_logprobs and any(math.isnan(entry[0][1]) for entry in result.prompt_logprobs):
        known = len(sequence.prompt_logprobs) + len(result.prompt_logprobs)
        return NumbersError(f"the logits of the prompt's first {known} tokens are not all finite: {_DAMAGED}")
    if result.token_id is None or math.isfinite(result.highest_logit):
        return None
    number = sequence.num_output_tokens + 1
    if result.highest_logit == -math.inf and sequence.constraints is not None:
        return OptionError(
            f"token {number} of the answer: structured_outputs, allowed_token_ids, bad_words, min_tokens and "
            "suppressed tokens rule out all"
        )
    return NumbersError(f"token {number} of the answer: its logits are not finite ({result.highest_logit}): {_DAMAGED}")
