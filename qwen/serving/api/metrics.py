"""Metrics for Prometheus: requests, tokens, times, load.

Each app has a registry of its own, so that several apps in one process count apart. The load is read from the engine
when somebody asks. Without prometheus-client a server runs, and counts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine import Engine

try:
    import prometheus_client
    from prometheus_client import Counter, Gauge, Histogram
except ModuleNotFoundError:
    _INSTALLED = False
else:
    _INSTALLED = True

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CLIENT_GONE = 499  # nginx's number for a client that left before there was an answer


def available() -> bool:
    """Whether prometheus-client is installed, which `Metrics` needs."""
    return _INSTALLED


class Metrics:
    """The counters of one app."""

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = Counter(
            "qwen_requests", "HTTP requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.durations = Histogram(
            "qwen_request_duration_seconds",
            "From the request to the end of its answer",
            ["endpoint"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "qwen_time_to_first_token_seconds",
            "From the request's entry into the queue to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("qwen_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.completion_tokens = Counter("qwen_completion_tokens", "Tokens generated", registry=self.registry)
        running = Gauge("qwen_running_sequences", "Replies that are being written", registry=self.registry)
        running.set_function(lambda: engine.load().running)
        queued = Gauge("qwen_queued_sequences", "Replies that wait for their turn", registry=self.registry)
        queued.set_function(lambda: engine.load().queued)

    def generated(
        self, prompt_tokens: int, completion_tokens: int, first_token_seconds: Iterable[float | None]
    ) -> None:
        """Count what one request came to; None is a reply that never had a token."""
        self.prompt_tokens.inc(prompt_tokens)
        self.completion_tokens.inc(completion_tokens)
        for seconds in first_token_seconds:
            if seconds is not None:
                self.first_token.observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and the media type of that."""
        return prometheus_client.generate_latest(self.registry), prometheus_client.CONTENT_TYPE_LATEST


class MetricsMiddleware:
    """Counts every request under the path of its route, and how long its answer took."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, started = CLIENT_GONE, time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except Exception:
            status = 500
            raise
        finally:
            # The path of the route and not of the request, of which there are as many as anybody likes to send.
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.durations.labels(endpoint).observe(time.perf_counter() - started)
