"""Prometheus metrics: requests, tokens, durations, load.

Each app has its own registry, so that several apps in one process are counted separately. The load is read from the
engine when metrics are rendered. Without prometheus-client a server runs without metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..._renamed import old_names
from ..engine import Engine, TextStream
from .errors import CLIENT_CLOSED_REQUEST

try:
    import prometheus_client
    from prometheus_client import Counter, Histogram, Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
except ModuleNotFoundError:
    _INSTALLED = False
else:
    _INSTALLED = True

TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def is_available() -> bool:
    """Return whether prometheus-client is installed, which `Metrics` needs."""
    return _INSTALLED


class Metrics:
    """The metrics of one app."""

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = Counter(
            "qwen_requests", "HTTP requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.durations = Histogram(
            "qwen_request_duration_seconds",
            "Time from a request to the end of its response",
            ["endpoint"],
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "qwen_time_to_first_token_seconds",
            "Time from queueing a request to its first token",
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self.output_token = Histogram(
            "qwen_time_per_output_token_seconds",
            "Time per token of a reply after its first one, on average over the reply",
            buckets=TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.queue_time = Histogram(
            "qwen_queue_time_seconds",
            "Time from queueing a request until it is in a step of the model",
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("qwen_prompt_tokens", "Prompt tokens", registry=self.registry)
        self.cached_tokens = Counter(
            "qwen_cached_prompt_tokens", "Prompt tokens found in the cache", registry=self.registry
        )
        self.completion_tokens = Counter("qwen_completion_tokens", "Generated tokens", registry=self.registry)
        self.finished = Counter(
            "qwen_finished_sequences", "Replies that have ended", ["reason"], registry=self.registry
        )
        self.registry.register(EngineCollector(engine))

    def record_generation(self, prompt_tokens: int, cached_tokens: int, streams: Iterable[TextStream]) -> None:
        """Record the replies to one request, at its end."""
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(cached_tokens)
        for stream in streams:
            self.completion_tokens.inc(stream.completion_tokens)
            self.finished.labels(stream.finish_reason or "cancelled").inc()  # it is told so with the next step
            if stream.queue_seconds is not None:
                self.queue_time.observe(stream.queue_seconds)
            if stream.first_token_seconds is not None:
                self.first_token.observe(stream.first_token_seconds)
                if stream.seconds is not None and stream.completion_tokens > 1:
                    seconds = stream.seconds - stream.first_token_seconds
                    self.output_token.observe(seconds / (stream.completion_tokens - 1))

    def render(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' text format, and its media type."""
        return prometheus_client.generate_latest(self.registry), prometheus_client.CONTENT_TYPE_LATEST


class EngineCollector:
    """Reads the load of an engine when metrics are rendered."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        load = self.engine.load()
        blocks = self.engine.scheduler.block_manager
        yield GaugeMetricFamily("qwen_running_sequences", "Replies being generated", load.running)
        yield GaugeMetricFamily("qwen_queued_sequences", "Replies waiting in the queue", load.queued)
        yield GaugeMetricFamily(
            "qwen_cache_usage_ratio",
            "Share of the key/value cache that running replies hold",
            1 - blocks.num_free / blocks.num_blocks,
        )
        yield CounterMetricFamily(
            "qwen_preemptions",
            "Replies that were interrupted because the cache was full",
            self.engine.scheduler.num_preemptions,
        )


class MetricsMiddleware:
    """Records every request and its duration under the path of its route."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = CLIENT_CLOSED_REQUEST, time.perf_counter()

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_observed)
        except Exception:
            status = 500
            raise
        finally:
            # The route's path instead of the request's, which would allow any number of labels.
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.durations.labels(endpoint).observe(time.perf_counter() - started)


__getattr__ = old_names(__name__, {"available": "is_available"})
