"""Figures for Prometheus: of requests by route, of answers and of the decoder, the latter two with vLLM's names and
meanings behind `refrag_` (docs.vllm.ai, Metrics), so that its dashboards need another prefix only.

Labels come from routes, never from what clients make up: each value of a label is kept for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.responses import Response

if TYPE_CHECKING:
    from refrag_platform.decoding.scheduler import Load
    from refrag_platform.serving.generation import Generation, Refusal

REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
# vLLM's, which reach from a small model on a GPU to a large one under load.
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160
)  # fmt: skip
BETWEEN_TOKENS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)


class Metrics:
    """All figures; `load` tells what the decoder does, None while there is none."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ["endpoint", "method", "status"]

        def counter(name: str, help: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(name, help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=registry)

        self._total = counter("refrag_requests", "Requests that were answered", labels)
        self._seconds = histogram(
            "refrag_request_duration_seconds", "Seconds to a response's last byte", REQUEST_SECONDS, labels
        )
        self._at_once = Gauge("refrag_requests_in_progress", "Requests being answered", ["endpoint"], registry=registry)
        self._first_token = histogram(
            "refrag_time_to_first_token_seconds",
            "From a request's arrival to its first token, search and waiting included",
            FIRST_TOKEN_SECONDS,
        )
        self._between = histogram(
            "refrag_inter_token_latency_seconds", "From one token of a choice to the next", BETWEEN_TOKENS_SECONDS
        )
        self._prompt = counter("refrag_prompt_tokens", "Prompt positions after compression, those reused included")
        self._plain = counter("refrag_prompt_tokens_uncompressed", "Tokens of the same prompts in full")
        self._generated = counter("refrag_generation_tokens", "Tokens drawn")
        self._queried = counter("refrag_prefix_cache_queries", "Prompt positions looked up among earlier prompts'")
        self._hits = counter("refrag_prefix_cache_hits", "Those of them that were there")
        self._refused = counter("refrag_refusals", "Questions that the store holds nothing near to")
        registry.register(_Decoder(load))

    def begin(self, endpoint: str) -> None:
        """One request more at once."""
        self._at_once.labels(endpoint).inc()

    def end(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """It has been answered."""
        self._at_once.labels(endpoint).dec()
        self._total.labels(endpoint, method, status).inc()
        self._seconds.labels(endpoint, method, status).observe(seconds)

    def answered(self, generation: Generation | Refusal, arrived: float) -> None:
        """An answer has ended, or was given up. arrived: its request, in seconds of time.monotonic."""
        usage, drawn = generation.usage, [times for times in generation.token_times if times]
        if not generation.sources.answered:
            self._refused.inc()
        if not drawn:
            return
        self._first_token.observe(min(times[0] for times in drawn) - arrived)
        for times in drawn:
            for one, next_one in pairwise(times):
                self._between.observe(next_one - one)
        self._prompt.inc(usage.prompt_positions)
        self._plain.inc(usage.plain_prompt_tokens)
        self._generated.inc(usage.completion_tokens)
        self._queried.inc(usage.prompt_positions)
        self._hits.inc(usage.positions_reused)

    def page(self) -> Response:
        """All figures, as Prometheus reads them."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _Decoder(Collector):
    """The decoder's state at the moment of asking."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._load = load

    def collect(self) -> Iterator[GaugeMetricFamily]:
        load = self._load()
        yield GaugeMetricFamily("refrag_ready", "Whether the model is loaded and answers", float(load is not None))
        if load is None:
            return
        size, share = load.bytes_per_position, load.positions / load.most_positions
        for name, help, value in (
            ("num_requests_running", "Requests that the decoder reads or writes", load.running),
            ("num_requests_waiting", "Requests that wait for it", load.waiting),
            ("kv_cache_usage_perc", "Share of the positions for keys and values in use; 1: all", share),
            ("kv_cache_bytes", "Bytes of keys and values in use", load.positions * size),
            ("prefix_cache_bytes", "Bytes of keys and values kept of prompts' beginnings", load.kept_positions * size),
        ):
            yield GaugeMetricFamily(f"refrag_{name}", help, float(value))
