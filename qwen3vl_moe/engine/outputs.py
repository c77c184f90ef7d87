"""What a caller gets back. Field names are vLLM's; ``new_text``, ``num_image_tokens`` and ``stages`` are ours."""

from __future__ import annotations

from dataclasses import dataclass, field

STAGES = ("preprocess", "queue", "host_to_device", "vision", "prefill", "decode", "sample")


@dataclass(frozen=True)
class Logprob:
    """One token's natural log-probability, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass
class RequestMetrics:
    """Times of one request, in seconds since the epoch, where they went, and what the cache saved.

    ``stages`` holds wall seconds: ``preprocess`` (template, tokens, image decoding and resizing), ``queue`` (waiting
    for a first step), ``host_to_device`` (pixels), ``vision`` (patches and tower), ``prefill`` (prompt tokens, those
    recomputed after a preemption included), ``decode`` and ``sample`` (from logits to tokens on the host). A step that
    several requests share counts in full for each of them. ``num_cached_tokens`` counts the prompt tokens that were in
    the cache when the request first ran; after a preemption more may be found.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    Attributes:
        index: always 0; requests have one answer each.
        text: the answer so far, without special tokens and without the stop that ended it.
        new_text: what ``text`` has gained since the stream's previous output.
        token_ids: every generated token, the one that ended the answer included.
        logprobs: per token, {token id: Logprob} of the token itself and of the most likely ones; None if not asked for.
        cumulative_logprob: sum of the tokens' own log-probabilities; None if not asked for.
        finish_reason: "stop", "length", "abort", or None while the answer is going on.
        stop_reason: the stop string or stop token id that ended it; None for end-of-text.
    """

    index: int
    text: str
    new_text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class RequestOutput:
    """One request and its answer.

    Attributes:
        request_id: unique within the engine.
        prompt: the text after the chat template, None where the caller passed token ids.
        prompt_token_ids: with each image's placeholders expanded.
        prompt_logprobs: per prompt token, as ``logprobs`` above; the first is None. None if not asked for.
        outputs: one answer.
        finished: whether the answer is complete.
        metrics: times.
        num_image_tokens: how many of the prompt's tokens are image tokens.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_image_tokens: int
