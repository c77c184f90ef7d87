"""One answer to a request, from its prompt to its last token."""

from __future__ import annotations

import bisect
import itertools
import time
from dataclasses import dataclass, field, replace

import torch

from qwen3vl_moe.engine.calls import Call
from qwen3vl_moe.engine.constraints import Constraints
from qwen3vl_moe.engine.detokenizer import TextStream
from qwen3vl_moe.engine.kv_cache import block_key
from qwen3vl_moe.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.inputs.frames import Part
from qwen3vl_moe.inputs.processor import ImageInput, Prompt
from qwen3vl_moe.model import VisionFeatures


@dataclass
class Tally:
    """Seconds of steps of decoding, added up once for all sequences that are in every one of them."""

    decode: float = 0.0
    sample: float = 0.0


@dataclass(eq=False)
class Sequence:
    """State of one answer; a request has ``params.n`` of them.

    Prompt and answer are one list of tokens; the first ``num_computed`` of them are in the cache. A step computes the
    next few: a piece of the prompt, the last token alone, or (after a preemption) all of them again. When none is
    left uncomputed, the step's last logits give the next token. So prefill, decode and recompute are one case, and a
    beginning that the cache already holds just makes it start further on.

    Attributes:
        request_id: unique within the engine, but for the answers of one request.
        prompt: token ids, positions, images.
        params: complete sampling parameters.
        max_len: most tokens of prompt and answer together.
        eos_token_ids: tokens that end the answer (empty with ignore_eos).
        text: of the answer; :meth:`spell` brings it up to the last token.
        generator: random numbers of a request with a seed, else None.
        index: which of the request's answers this is.
        constraints: what the request asks of single tokens; None: nothing.
        call: who waits for it, if it is given up with that call.
        error: what ended the answer before its time; None: nothing did.
        token_ids: prompt, then answer.
        num_computed: how many of them are in the cache.
        block_table: cache blocks in order.
        features: vision features per image, None before they are computed and after the prompt is in the cache.
        num_prompt_tokens: of the prompt.
        position_offset: of a token of the answer, its M-RoPE position (the same on all three axes) less its place.
        most_tokens: as many as prompt and answer may have together.
        ending: tokens that end the answer once it has min_tokens tokens.
        watched: whether every token has to be looked at as it comes, for stop strings or log-probabilities.
        admissions: how often it was given blocks to begin with.
    """

    request_id: str
    prompt: Prompt
    params: SamplingParams
    max_len: int
    eos_token_ids: frozenset[int]
    text: TextStream
    generator: torch.Generator | None
    metrics: RequestMetrics
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    index: int = 0
    constraints: Constraints | None = None
    call: Call | None = None
    error: UserError | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt.token_ids)
        self.num_prompt_tokens, self.admissions = len(self.token_ids), 0
        self.position_offset = self.prompt.next_position - self.num_prompt_tokens
        answer = self.max_len if self.params.max_tokens is None else self.params.max_tokens
        self.most_tokens = min(self.max_len, self.num_prompt_tokens + answer)
        self.features: list[VisionFeatures | None] = [None] * len(self.prompt.images)
        self._image_ends = [image.start + image.num_tokens for image in self.prompt.images]
        self._parts: list[tuple[int, int, Part]] = []  # where each begins and ends in the prompt
        for part, group in itertools.groupby(self.prompt.images, lambda image: image.part):
            if part is not None:
                pictures = list(group)
                self._parts.append((pictures[0].start, pictures[-1].start + pictures[-1].num_tokens, part))
        self.logprobs: list[dict[int, Logprob]] = []
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self.ending = self.eos_token_ids.union(self.params.stop_token_ids or ())
        self.watched = self.text.watches or self.params.logprobs is not None
        self._shown = self._spelled = 0
        self._tally, self._counted = Tally(), Tally()
        self._block_keys: list[bytes] = []

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def remaining(self) -> int:
        """The most tokens that the answer may still get."""
        return self.most_tokens - len(self.token_ids)

    @property
    def ends_next(self) -> bool:
        """Whether the next token is the last one, whatever it is."""
        return len(self.token_ids) + 1 >= self.most_tokens

    def just_takes(self, token_id: int) -> bool:
        """Whether this, as the next token of an answer that has begun, is appended and that is all."""
        return not (self.watched or token_id in self.ending or len(self.token_ids) + 1 >= self.most_tokens)

    @property
    def needs_history(self) -> bool:
        """Whether the host has to know the answer so far before it launches the next step."""
        return self.constraints is not None and self.constraints.needs_history(self.num_output_tokens)

    def images_in(self, start: int, stop: int) -> list[tuple[int, ImageInput]]:
        """Images, and groups of a video's frames (with their number), that have placeholder tokens in a span."""
        if start >= self.num_prompt_tokens:  # as in every step of decoding
            return []
        # They stand in order, and of a long video there are hundreds.
        first = bisect.bisect_right(self._image_ends, start)
        last = bisect.bisect_left(self.prompt.images, stop, lo=first, key=lambda image: image.start)
        return [(number, self.prompt.images[number]) for number in range(first, last)]

    @property
    def undecoded(self) -> list[Part]:
        """Parts of the prompt's videos whose frames are not there yet."""
        return [part for *_, part in self._parts if not part.ready]

    @property
    def undecodable(self) -> UserError | None:
        """Why one of them never will be; None: nothing is known of that."""
        errors = (part.exception() for *_, part in self._parts if part.done())
        return next((error for error in errors if isinstance(error, UserError)), None)

    def part_from(self, place: int) -> tuple[Part | None, int]:
        """The part of a video whose frames are needed next from a place on, and where it makes way for the next one.

        Each part is computed by itself, however many are there: so the same requests make the same steps, whatever time
        their decoding takes. None: no more frames are needed than are there.
        """
        if not self._parts:  # nearly all; asked once a sequence and step
            return None, len(self.token_ids)
        number = bisect.bisect_right(self._parts, place, key=lambda each: each[1])
        if number == len(self._parts):
            return None, len(self.token_ids)
        next_starts = [start for start, *_ in self._parts[number + 1 : number + 2]]
        return self._parts[number][2], next_starts[0] if next_starts else len(self.token_ids)

    def block_keys(self, first: int, last: int, block_size: int) -> list[bytes]:
        """Names by content (:func:`.kv_cache.block_key`) of the full blocks from number ``first`` up to ``last``."""
        while len(self._block_keys) < last:
            start = len(self._block_keys) * block_size
            stop = start + block_size
            images = [(image.digest, image.start - start) for _, image in self.images_in(start, stop)]
            parent = self._block_keys[-1] if self._block_keys else b""
            self._block_keys.append(block_key(parent, self.token_ids[start:stop], images))
        return self._block_keys[first:last]

    @property
    def reusable(self) -> int:
        """How many of the first tokens may be taken from the cache: not those whose logits are still needed."""
        known = len(self.token_ids) if self.params.prompt_logprobs is None else len(self.prompt_logprobs)
        return min(known, len(self.token_ids)) - 1

    def start_at(self, num_cached: int) -> None:
        """Begin, or begin again, behind tokens that were found in the cache."""
        self.num_computed = num_cached
        self.admissions += 1
        if not self.metrics.num_preemptions:
            self.metrics.num_cached_tokens = num_cached

    def advance(self, computed: int) -> None:
        """The first ``computed`` tokens are in the cache now. Features of a cached prompt are not needed any more."""
        self.num_computed = computed
        if self.features and computed >= self.num_prompt_tokens:
            self.features = [None] * len(self.features)

    def reset(self) -> None:
        """The cache has taken this sequence's blocks: what is not found again is computed again."""
        self.num_computed = 0
        self.metrics.num_preemptions += 1

    def rewind(self, num_output: int, vocabulary: int) -> None:
        """Go back to the first ``num_output`` tokens of the answer, none of which has ended it, with nothing computed.

        The generator has drawn a row of ``vocabulary`` numbers for each of them.
        """
        del self.token_ids[self.num_prompt_tokens + num_output :], self.logprobs[num_output:]
        self._block_keys = []
        self.text.clear()
        self._spelled = 0
        for number, token_id in enumerate(self.output_ids if self.text.watches else (), start=1):
            self.text.push(token_id, may_stop=number > (self.params.min_tokens or 0))
        if self.generator is not None:
            self.generator.manual_seed(self.params.seed or 0)
            row = torch.empty(vocabulary, device=self.generator.device)
            for _ in range(num_output):
                row.exponential_(generator=self.generator)

    def append(self, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        """Take the next token of the answer, and end the answer if it has to."""
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = time.time()
        is_last = self.ends_next
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)

        watches, may_stop = self.text.watches, self.num_output_tokens > (self.params.min_tokens or 0)
        if may_stop and token_id in self.ending:
            shown = self.params.include_stop_str_in_output
            if shown and watches:
                self.text.push(token_id, may_stop=False)
            self.finish("stop", None if token_id in self.eos_token_ids else token_id, unspelled=0 if shown else 1)
        elif watches and (stop := self.text.push(token_id, may_stop)) is not None:
            self.finish("stop", stop)
        elif is_last:
            self.finish("length")

    def spell(self, unspelled: int = 0) -> None:
        """Bring the text up to the last token, but for ``unspelled`` ones: it is made only when somebody wants it.

        Where stop strings are looked for, the text is there already; and once the answer has ended.
        """
        stop = len(self.token_ids) - unspelled
        if not (self.text.watches or self.finished):
            self.text.extend(self.token_ids[self.num_prompt_tokens + self._spelled : stop])
            self._spelled = stop - self.num_prompt_tokens

    def share(self, tally: Tally) -> None:
        """From now on be in the steps that a tally counts, and in no others that any does."""
        self.count()
        self._tally, self._counted = tally, replace(tally)

    def count(self) -> None:
        """Bring the metrics up to the last step."""
        before, self._counted = self._counted, replace(self._tally)
        self.metrics.stages["decode"] += self._counted.decode - before.decode
        self.metrics.stages["sample"] += self._counted.sample - before.sample

    def fail(self, error: UserError) -> None:
        """End the answer by an error, which the caller gets in its place."""
        self.error = error
        self.finish("error")

    def finish(self, reason: str, stop: int | str | None = None, unspelled: int = 0) -> None:
        """End the answer, whose last ``unspelled`` tokens are no part of its text."""
        self.spell(unspelled)
        self.text.flush()
        self.share(Tally())
        self.metrics.finished_time = time.time()
        # The reason last: interrupted before it, the answer has not finished, and its last token is taken back.
        self.stop_reason = stop
        self.finish_reason = reason

    def output(self) -> RequestOutput:
        """The answer so far; ``new_text`` is what this call adds to the one before it."""
        self.spell()
        self.count()
        text, asked = self.text.text, self.params.logprobs is not None
        token_ids = self.output_ids
        completion = CompletionOutput(
            index=self.index,
            text=text,
            new_text=text[self._shown :],
            token_ids=token_ids,
            logprobs=list(self.logprobs) if asked else None,
            cumulative_logprob=(
                sum(entry[token].logprob for entry, token in zip(self.logprobs, token_ids, strict=True))
                if asked
                else None
            ),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self._shown = len(text)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=list(self.prompt.token_ids),
            prompt_logprobs=list(self.prompt_logprobs) if self.params.prompt_logprobs is not None else None,
            outputs=[completion],
            finished=self.finished,
            metrics=self.metrics,
            num_image_tokens=sum(image.num_tokens for image in self.prompt.images),
            num_cached_tokens=self.metrics.num_cached_tokens,
        )
