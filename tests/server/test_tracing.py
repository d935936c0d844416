"""Spans of requests, as a collector receives them, and the trace's id in the log."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from logitengine.errors import EngineDeadError
from logitengine.link.messages import FinishReason, GenerationRequest, StepOutput
from logitserve.telemetry.otlp import check_endpoint
from logitserve.telemetry.trace_context import trace_id_of
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from scripted_engine import OpenApp, Step
from span_collector import SpanCollector, attributes, collecting

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
UNSAMPLED = f"00-{TRACE}-{PARENT}-00"
SECRET = "a very secret prompt"
BODY = {"prompt": SECRET, "max_tokens": 2}


def two_tokens(request: GenerationRequest) -> list[Step]:
    first = StepOutput(request_id=request.request_id, index=0, token_ids=[504], num_cached_tokens=1)
    last = StepOutput(request_id=request.request_id, index=0, token_ids=[338], finish_reason="length")
    return [first, last]


@pytest.fixture
def collector() -> Iterator[SpanCollector]:
    with collecting() as collector:
        yield collector


async def test_a_request_is_a_span_with_its_events_in_order_and_its_usage(
    open_app: OpenApp, collector: SpanCollector
) -> None:
    async with open_app(two_tokens, otlp_endpoint=collector.url, served_model_name=["small"]) as app:
        answer = await app.post("/v1/completions", BODY, headers={"x-request-id": "r-1"})
    (span,) = collector.spans
    assert (span.name, span.kind) == ("POST /v1/completions", Span.SPAN_KIND_SERVER)
    assert [event.name for event in span.events] == ["queue", "prefill", "decode", "end"]
    times = [
        span.start_time_unix_nano,
        *(event.time_unix_nano for event in span.events),
        span.end_time_unix_nano,
    ]
    assert times == sorted(times)
    usage = answer.json()["usage"]
    assert attributes(span.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "logitserve.request_id": "r-1",
        "gen_ai.provider.name": "logitserve",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.response.model": "small",
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 1,
    }
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert span.parent_span_id == b""
    assert collector.paths == ["/v1/traces"]
    assert collector.resource["service.name"] == "logitserve"


async def test_nothing_that_a_client_wrote_and_no_key_is_exported(
    open_app: OpenApp, collector: SpanCollector
) -> None:
    headers = {"authorization": "Bearer hush-hush", "user-agent": "secretive"}
    async with open_app(two_tokens, otlp_endpoint=collector.url, api_key=["hush-hush"]) as app:
        answer = await app.post("/v1/completions?secret=1", BODY, headers=headers)
        await app.post("/v1/completions", {**BODY, "secret": 1}, headers=headers)
        await app.client.get("/secret", headers=headers)
        await app.client.get("/v1/models/secret", headers=headers)
    text = answer.json()["choices"][0]["text"]
    assert len(collector.spans) == 4
    for body in collector.bodies:
        assert b"secret" not in body
        assert b"hush" not in body
        assert text.encode() not in body


async def test_a_clients_trace_goes_on(open_app: OpenApp, collector: SpanCollector) -> None:
    headers = {"traceparent": SAMPLED, "tracestate": "vendor=x"}
    async with open_app(two_tokens, otlp_endpoint=collector.url) as app:
        await app.post("/v1/completions", BODY, headers=headers)
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.trace_state == "vendor=x"


async def test_a_client_that_samples_nothing_gets_no_span(
    open_app: OpenApp, collector: SpanCollector
) -> None:
    async with open_app(two_tokens, otlp_endpoint=collector.url) as app:
        await app.post("/v1/completions", BODY, headers={"traceparent": UNSAMPLED})
    assert collector.spans == []


async def test_probes_and_scrapes_are_no_spans(open_app: OpenApp, collector: SpanCollector) -> None:
    async with open_app(otlp_endpoint=collector.url) as app:
        for path in ("/health", "/ready", "/metrics", "/version"):
            await app.client.get(path)
    assert [span.name for span in collector.spans] == ["GET /version"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_ends_is_a_span_with_an_error(
    open_app: OpenApp, collector: SpanCollector, *, stream: bool
) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [*two_tokens(request)[:1], EngineDeadError("it died")]

    async with open_app(script, otlp_endpoint=collector.url) as app:
        await app.post("/v1/completions", {**BODY, "stream": stream})
        await app.post("/v1/completions", {**BODY, "n": 1000})
    failed, refused = collector.spans
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert attributes(failed.attributes)["error.type"] == "engine_dead"
    assert attributes(failed.attributes)["http.response.status_code"] == (200 if stream else 503)
    assert refused.status.code == Status.STATUS_CODE_UNSET, "a client's fault is no error of the server"
    assert attributes(refused.attributes)["error.type"] == "invalid_value"


async def test_a_collector_that_fails_is_logged_once_and_loses_only_spans(
    open_app: OpenApp, collector: SpanCollector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 400
    async with open_app(two_tokens, otlp_endpoint=collector.url) as app:
        for _ in range(3):
            assert (await app.post("/v1/completions", BODY)).status_code == 200
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["spans cannot be exported (--otlp-endpoint) and are lost"]


async def test_a_collector_that_never_answers_holds_up_the_end_for_a_moment_only(
    open_app: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with open_app(two_tokens, otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}") as app:
            await app.post("/v1/completions", BODY)
    assert "spans were lost: the collector did not take them within 2 s" in caplog.messages


@pytest.mark.parametrize("traced", [False, True])
async def test_the_log_has_the_trace_of_the_client(
    open_app: OpenApp, collector: SpanCollector, caplog: pytest.LogCaptureFixture, *, traced: bool
) -> None:
    def broken(_request: GenerationRequest) -> list[Step]:
        raise ZeroDivisionError

    options = {"otlp_endpoint": collector.url} if traced else {}
    with caplog.at_level(logging.INFO):
        async with open_app(broken, **options) as app:
            await app.post("/v1/completions", BODY, headers={"traceparent": SAMPLED})
            await app.post("/v1/completions", BODY, headers={"traceparent": UNSAMPLED})
            await app.client.get("/version")
    found = [(record.getMessage(), getattr(record, "trace_id", None)) for record in caplog.records]
    lines = [line for line in found if line[0] in {"request", "unforeseen error"}]
    assert lines[:4] == [("unforeseen error", TRACE), ("request", TRACE)] * 2
    _, own = lines[4]
    assert (own is not None and own != TRACE) if traced else own is None


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (SAMPLED, TRACE),
        (f"01-{TRACE}-{PARENT}-01-more", TRACE),
        (f"{SAMPLED}-more", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (SAMPLED.upper(), None),
        (f"01-{TRACE}-{PARENT}-01-{'x' * 600}", None),
        ("", None),
    ],
)
def test_a_trace_id_is_taken_from_a_valid_header_only(traceparent: str, trace_id: str | None) -> None:
    assert trace_id_of(traceparent.encode()) == trace_id


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://collector/otlp/", "https://collector/otlp/v1/traces"),
        ("http://collector:4318/v1/traces", "http://collector:4318/v1/traces"),
    ],
)
def test_the_path_for_traces_is_added_where_it_is_missing(given: str, url: str) -> None:
    assert check_endpoint(given) == check_endpoint(url) == url


@pytest.mark.parametrize("given", ["collector:4318", "grpc://collector:4317", "http://", "http://c/?a=b"])
def test_an_endpoint_that_is_no_http_url_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="must be the address of a collector"):
        check_endpoint(given)


def test_without_its_packages_a_start_is_refused_in_one_line() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from logitserve.cli import main; main(['serve', '--otlp-endpoint', 'http://127.0.0.1:4318'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "logitserve serve: error: --otlp-endpoint needs packages that are not installed: pip install 'logitserve[otel]'\n"
    )


def test_the_sdk_is_not_imported_unless_it_is_asked_for() -> None:
    code = "import sys, logitserve.cli, logitserve.http.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_the_clients_trace_stays_in_the_log_where_the_sdk_is_turned_off(
    open_app: OpenApp,
    collector: SpanCollector,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with caplog.at_level(logging.INFO):
        async with open_app(two_tokens, otlp_endpoint=collector.url) as app:
            await app.post("/v1/completions", BODY)
            await app.post("/v1/completions", BODY, headers={"traceparent": SAMPLED})
    lines = [vars(record) for record in caplog.records if record.name == "logitserve.access"]
    assert [line.get("trace_id") for line in lines] == [None, TRACE]


async def test_each_finish_reason_is_exported_once(open_app: OpenApp, collector: SpanCollector) -> None:
    def three_choices(request: GenerationRequest) -> list[Step]:
        reasons: tuple[FinishReason, ...] = ("stop", "length", "stop")
        return [
            StepOutput(request_id=request.request_id, index=index, token_ids=[338], finish_reason=reason)
            for index, reason in enumerate(reasons)
        ]

    async with open_app(three_choices, otlp_endpoint=collector.url) as app:
        await app.post("/v1/completions", {**BODY, "n": 3})
    (span,) = collector.spans
    assert attributes(span.attributes)["gen_ai.response.finish_reasons"] == ["length", "stop"]
