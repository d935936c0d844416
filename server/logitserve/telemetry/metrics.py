"""Metrics that the server counts itself: of requests, their times and their tokens.

A metric with vLLM's name means what it means there.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from logitserve.telemetry.histogram import TokenHistogram
from logitserve.telemetry.record import Failure, RequestRecord

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0),
)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

SERVER_ERROR = 500


class Metrics:
    """The metrics of one app, in a registry of its own.

    Label values come from fixed sets: templates of routes, methods, statuses, codes. None is a client's text.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.inter_token_latency = TokenHistogram(
            "vllm:inter_token_latency_seconds", "Time between outputs of a choice.", SECONDS
        )
        registry.register(self.inter_token_latency)
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens",
            "Tokens of prompts that the engine has begun, cached ones included.",
            registry=registry,
        )
        self._time_to_first_token = self._seconds(
            "vllm:time_to_first_token", "Time from a request's arrival to its first token."
        )
        self._queue_time = self._seconds(
            "vllm:request_queue_time", "Time from the queue's start to the request's first step."
        )
        self._prefill_time = self._seconds(
            "vllm:request_prefill_time", "Time from a request's first step to its first token."
        )
        self._decode_time = self._seconds(
            "vllm:request_decode_time", "Time from a request's first token to its last."
        )
        self._latency = self._seconds(
            "vllm:e2e_request_latency", "Time from a request's arrival to the end of its answer."
        )
        self._request_prompt_tokens = Histogram(
            "vllm:request_prompt_tokens",
            "Tokens of a request's prompts.",
            buckets=TOKENS,
            registry=registry,
        )
        self._request_generation_tokens = Histogram(
            "vllm:request_generation_tokens",
            "Tokens generated for a request, for all its choices.",
            buckets=TOKENS,
            registry=registry,
        )
        self._success = Counter(
            "vllm:request_success", "Choices of complete answers.", ["finished_reason"], registry=registry
        )
        self._aborted = Counter(
            "logitserve:requests_aborted",
            "Requests whose client left, or stopped reading, before the answer's end.",
            registry=registry,
        )
        self._failed = Counter(
            "logitserve:requests_failed",
            "Requests that waited for the engine or ran, and ended with an error of status 500 or above.",
            ["code"],
            registry=registry,
        )
        self._refusals = Counter(
            "logitserve:refusals",
            "Errors that answered requests, or ended answers that had begun.",
            ["status", "code"],
            registry=registry,
        )
        self._requests = Counter(
            "logitserve:http_requests",
            "Requests by the template of their path. Status 0: dropped before the answer began; 499: the client left.",
            ["path", "method", "status"],
            registry=registry,
        )
        self._rows = Counter(
            "logitserve:logits_rows", "Rows of logits handed to answers.", ["positions"], registry=registry
        )
        self.row_bytes = Counter(
            "logitserve:logits_bytes", "Bytes of these rows before they are encoded.", registry=registry
        )
        # Series that exist from the start have no gap before their first event.
        self.generated_rows = self._rows.labels("generated")
        self.prompt_rows = self._rows.labels("prompt")
        for reason in ("stop", "length"):
            self._success.labels(reason)

    def _seconds(self, name: str, documentation: str) -> Histogram:
        return Histogram(f"{name}_seconds", documentation, buckets=SECONDS, registry=self.registry)

    def begun(self, record: RequestRecord) -> None:
        """Count a request that the engine has begun."""
        if record.queued is not None and record.begun is not None:
            self._queue_time.observe(record.begun - record.queued)

    def answered(self, record: RequestRecord) -> None:
        """Count a request whose first token has come."""
        if record.first_token is not None:
            self._time_to_first_token.observe(record.first_token - record.arrived)

    def refused(self, failure: Failure) -> None:
        """Count an error that a client was answered with."""
        self._refusals.labels(str(failure.status), failure.code or "none").inc()

    def ended(self, record: RequestRecord) -> None:
        """Count a request that is over."""
        self._requests.labels(record.route, record.method, str(record.status)).inc()
        failure = record.failure
        if failure is not None:
            self.refused(failure)
        if record.counts is None:
            return
        if record.has_left:
            self._aborted.inc()
        elif failure is None:
            self._completed(record, record.counts.prompt, record.counts.completion)
        elif failure.status >= SERVER_ERROR:
            self._failed.labels(failure.code or "none").inc()

    def _completed(self, record: RequestRecord, num_prompt_tokens: int, num_tokens: int) -> None:
        for reason in record.finish_reasons:
            self._success.labels(reason).inc()
        self._request_prompt_tokens.observe(num_prompt_tokens)
        self._request_generation_tokens.observe(num_tokens)
        self._latency.observe(record.seconds)
        if record.first_token is not None and record.last_token is not None:
            self._decode_time.observe(record.last_token - record.first_token)
            if record.begun is not None:
                self._prefill_time.observe(record.first_token - record.begun)
