"""Traces: a span for each request, sent to a collector by OpenTelemetry's SDK. Imported only where it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import time_ns

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from logitserve import __version__
from logitserve.http.scope import header, headers
from logitserve.telemetry.metrics import SERVER_ERROR
from logitserve.telemetry.record import RequestRecord
from logitserve.telemetry.routes import OTHER

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
"""Longest wait for the collector when the server ends."""

LONGEST_TRACESTATE = 512
"""Longest ``tracestate`` that is passed on, in characters, as W3C has it."""

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}

QUIET = ("opentelemetry.exporter", "opentelemetry.trace")
"""Loggers of the SDK that write a line for each try, and for each odd header of a client."""

Value = str | int | Sequence[str]


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """A request's span, which began at ``start`` (nanoseconds of the wall clock)."""

    span: Span
    start: int


class Tracing:
    """The tracer of one app. Spans wait in a bounded queue; a thread of the SDK's sends them.

    The SDK reads its own variables too: OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_BSP_….
    """

    def __init__(self, endpoint: str) -> None:
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(_Exporter(OTLPSpanExporter(endpoint)))
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("logitserve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: RequestRecord, scope: Scope) -> RequestSpan:
        """Begin the span of a request that has just come, and give its record the trace's id."""
        has_route = record.route != OTHER
        method = "_OTHER" if record.method == OTHER else record.method
        name = "HTTP" if record.method == OTHER else method
        attributes: dict[str, Value] = {
            "http.request.method": method,
            "url.scheme": scope.get("scheme", "http"),
            "logitserve.request_id": record.request_id,
        }
        if has_route:
            attributes["http.route"] = record.route
        start = time_ns()
        span = self._tracer.start_span(
            f"{name} {record.route}" if has_route else name,
            context=self._parent(record, scope),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=start,
        )
        context = span.get_span_context()
        if context.is_valid:  # it is not where OTEL_SDK_DISABLED is set
            record.trace_id = format_trace_id(context.trace_id)
        return RequestSpan(span, start)

    def end(self, request_span: RequestSpan, record: RequestRecord, model_name: str | None) -> None:
        """End the span with what the record has of the request."""
        span, start = request_span.span, request_span.start
        if not span.is_recording():
            return
        times = (
            ("queue", record.queued),
            ("prefill", record.begun),
            ("decode", record.first_token),
            ("end", record.last_token),
        )
        for name, seconds in times:
            if seconds is not None:
                span.add_event(name, timestamp=start + round((seconds - record.arrived) * 1e9))
        span.set_attributes(_attributes(record, model_name))
        failure = record.failure
        if failure is not None and failure.status >= SERVER_ERROR:
            span.set_status(StatusCode.ERROR, failure.code)
        span.end(start + round(record.seconds * 1e9))

    async def close(self) -> None:
        """Send what waits, for as long as FLUSH_SECONDS."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._processor.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is gone, since it waited long enough
                loop.call_soon_threadsafe(done.set)

        # A thread of asyncio's pool would hold up the end of the process.
        threading.Thread(target=shut_down, name="flush-spans", daemon=True).start()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await done.wait()
        except TimeoutError:
            logger.warning("spans were lost: the collector did not take them within %g s", FLUSH_SECONDS)

    def _parent(self, record: RequestRecord, scope: Scope) -> Context:
        """Return the client's trace context where its header is valid."""
        if record.trace_id is None:
            return Context()
        carrier: Mapping[str, str] = {"traceparent": header(scope, b"traceparent").decode("latin-1")}
        tracestate = b",".join(headers(scope, b"tracestate")).decode("latin-1")
        if tracestate and len(tracestate) <= LONGEST_TRACESTATE:
            carrier = {**carrier, "tracestate": tracestate}
        return self._propagator.extract(carrier, Context())


def _attributes(record: RequestRecord, model_name: str | None) -> dict[str, Value]:
    """Return OpenTelemetry's attributes of the request, without anything of its prompts, answer and key."""
    attributes: dict[str, Value] = {}
    if record.status:
        attributes["http.response.status_code"] = record.status
    if record.failure is not None:
        attributes["error.type"] = record.failure.code or str(record.failure.status)
    elif record.has_left:
        attributes["error.type"] = "client_left"
    if record.counts is None:
        return attributes
    attributes |= {
        "gen_ai.provider.name": "logitserve",
        "gen_ai.usage.input_tokens": record.counts.prompt,
        "gen_ai.usage.output_tokens": record.counts.completion,
        "gen_ai.usage.cache_read.input_tokens": record.counts.cached,
        "gen_ai.response.finish_reasons": sorted(set(record.finish_reasons)),
    }
    if model_name is not None:
        attributes["gen_ai.response.model"] = model_name
    if record.route in OPERATIONS:
        attributes["gen_ai.operation.name"] = OPERATIONS[record.route]
    if record.answer_id is not None:
        attributes["gen_ai.response.id"] = record.answer_id
    return attributes


def _resource() -> Resource:
    """Return the description of this process. The SDK's variables have the last word."""
    own = Resource.create({"service.name": "logitserve", "service.version": __version__})
    return own.merge(OTELResourceDetector().detect())


class _Exporter(SpanExporter):
    """Logs once that spans are lost, and once that they are no longer."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._num_lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            if self._num_lost:
                logger.info("spans are exported again", extra={"lost": self._num_lost})
            self._num_lost = 0
            return result
        if not self._num_lost:
            logger.warning("spans cannot be exported (--otlp-endpoint) and are lost")
        self._num_lost += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
