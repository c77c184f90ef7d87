"""What a caller gets back. Field names are vLLM's; ``new_text``, ``num_image_tokens`` and ``stages`` are ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

STAGES = ("preprocess", "queue", "host_to_device", "vision", "prefill", "decode", "sample")


@dataclass(frozen=True)
class Logprob:
    """One token's natural log-probability, its rank (1 is the most likely) and its text.

    Of a character that several tokens make, the last one's text is the character and the others' is empty. Without
    ``detokenize`` there is none.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass
class RequestMetrics:
    """Times of one request, in seconds since the epoch, where they went, and what the cache saved.

    ``stages`` holds wall seconds: ``preprocess`` (template, tokens, image decoding and resizing; of a video that is
    computed while it is decoded, as far as nothing could be computed), ``queue`` (waiting for a first step),
    ``host_to_device`` (pixels), ``vision`` (patches and tower), ``prefill`` (prompt tokens, those recomputed after a
    preemption included), ``decode`` and ``sample`` (from logits to tokens on the host). A step that several requests
    share counts in full for each of them. ``num_cached_tokens`` counts the prompt tokens that were in
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
        index: which of the request's n answers this is.
        text: the answer so far, without special tokens and without the stop that ended it, unless these were asked for.
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

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """One request and its answers.

    Attributes:
        request_id: unique within the engine.
        prompt: the text after the chat template, None where the caller passed token ids.
        prompt_token_ids: with each image's placeholders expanded.
        prompt_logprobs: per prompt token, as ``logprobs`` above; the first is None. None if not asked for.
        outputs: n answers, in the order of their index.
        finished: whether all answers are complete.
        metrics: times; of several answers the first begin and the last end.
        num_image_tokens: how many of the prompt's tokens are of images, or of frames of videos.
        num_cached_tokens: how many of the prompt's tokens were in the cache already.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_image_tokens: int
    num_cached_tokens: int = 0


def joined(parts: Sequence[RequestOutput]) -> RequestOutput:
    """The output of a request, from those of its answers, each with one completion."""
    first, *others = parts
    if not others:
        return first
    metrics = [part.metrics for part in parts]

    def over_all(name: str, choose: Callable[[Iterable[float]], float]) -> float | None:
        known = [value for each in metrics if (value := getattr(each, name)) is not None]
        return choose(known) if known else None

    return replace(
        first,
        outputs=[completion for part in parts for completion in part.outputs],
        finished=all(part.finished for part in parts),
        metrics=RequestMetrics(
            arrival_time=first.metrics.arrival_time,
            first_scheduled_time=over_all("first_scheduled_time", min),
            first_token_time=over_all("first_token_time", min),
            finished_time=over_all("finished_time", max) if all(part.finished for part in parts) else None,
            num_preemptions=sum(each.num_preemptions for each in metrics),
            num_cached_tokens=first.metrics.num_cached_tokens,
            stages={stage: max(each.stages[stage] for each in metrics) for stage in STAGES},
        ),
    )
