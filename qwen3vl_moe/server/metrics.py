"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily

from qwen3vl_moe.server.streams import Stream

disable_created_metrics()  # a second line for each, with the time of its birth
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_PREFIX = "qwen3vl_moe_"


class Metrics:
    """Counts of one server.

    Args:
        gauges: gives what is true now, {name: (what it says, value)}.
    """

    def __init__(self, gauges: Callable[[], dict[str, tuple[str, float]]]):
        self._registry = CollectorRegistry()

        def counter(name: str, says: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(_PREFIX + name, says, labels, registry=self._registry)

        def histogram(name: str, says: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(_PREFIX + name, says, buckets=buckets, registry=self._registry)

        self._requests = counter(
            "requests", "Requests by endpoint and HTTP status; 499: the client went away.", ("endpoint", "status")
        )
        self._prompt = counter("prompt_tokens", "Tokens of prompts, media included, of requests that have ended.")
        self._cached = counter("cached_prompt_tokens", "Of these, tokens that were in the cache.")
        self._written = counter("generation_tokens", "Tokens of answers, of requests that have ended.")
        self._preempted = counter("preemptions", "Answers that had to give their blocks back for a while.")
        self._first = histogram("time_to_first_token_seconds", "From the request's body to its first token.")
        self._queue = histogram("queue_time_seconds", "From a prompt that is ready to its first step.")
        self._prepare = histogram("preparation_time_seconds", "Chat template, tokens, decoding and resizing of media.")
        self._whole = histogram("request_seconds", "From the request's body to the last token.")
        per_token = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
        self._each = histogram("time_per_output_token_seconds", "Between tokens, the mean of an answer.", per_token)
        self._registry.register(_Now(gauges))

    def answered(self, endpoint: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(endpoint, str(status)).inc()

    def ended(self, stream: Stream, usage: dict[str, Any]) -> None:
        """Count the tokens and times of a request that was answered whole."""
        self._prompt.inc(usage["prompt_tokens"])
        self._cached.inc(usage["prompt_tokens_details"]["cached_tokens"])
        self._written.inc(usage["completion_tokens"])
        count = usage["completion_tokens"] / max(1, len(stream.metrics))
        for each in stream.metrics:
            self._preempted.inc(each.num_preemptions)
            if each.first_token_time is None or each.finished_time is None:
                continue
            self._first.observe(each.first_token_time - each.arrival_time)
            self._whole.observe(each.finished_time - each.arrival_time)
            self._queue.observe(each.stages["queue"])
            self._prepare.observe(each.stages["preprocess"])
            if count > 1:
                self._each.observe((each.finished_time - each.first_token_time) / (count - 1))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Now:
    """What is true at the moment of asking."""

    def __init__(self, gauges: Callable[[], dict[str, tuple[str, float]]]):
        self._gauges = gauges

    def collect(self) -> Any:
        for name, (says, value) in self._gauges().items():
            yield GaugeMetricFamily(_PREFIX + name, says, value=value)
