"""Metrics of the server, in front of a scripted engine: exact numbers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitengine.errors import EngineDeadError
from logitengine.link.messages import (
    Array,
    EngineStats,
    FinishReason,
    GenerationRequest,
    LogitsRows,
    PromptOutput,
    StepOutput,
)
from metrics_page import Page
from scripted_engine import App, OpenApp, Step
from starlette.types import Message

pytestmark = pytest.mark.anyio

BODY = {"prompt": [33, 34, 35], "max_tokens": 4}


def tokens(request: GenerationRequest, count: int, reason: FinishReason = "length") -> list[Step]:
    steps: list[Step] = [
        StepOutput(request_id=request.request_id, index=index, token_ids=[33], finish_reason=end)
        for number in range(count)
        for index in range(request.n)
        for end in [reason if number == count - 1 else None]
    ]
    return steps


def four_tokens(request: GenerationRequest) -> list[Step]:
    return tokens(request, 4)


async def page_of(app: App) -> Page:
    answer = await app.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return Page.of(answer.text)


async def test_a_request_is_counted_with_its_tokens_and_times(open_app: OpenApp) -> None:
    async with open_app(four_tokens, served_model_name=["small", "other"]) as app:
        before = await page_of(app)
        assert before("vllm:request_success_total", finished_reason="length") == 0
        await app.post("/v1/completions", {**BODY, "n": 2, "temperature": 1})
        page = await page_of(app)
    assert page("vllm:request_success_total", finished_reason="length") == 2
    assert page("vllm:prompt_tokens_total") == 3
    assert page("vllm:inter_token_latency_seconds_count") == 6, "three gaps for each choice"
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert page(f"vllm:{name}_seconds_count") == 1
    assert page("vllm:e2e_request_latency_seconds_count") == 1
    assert page("vllm:request_prompt_tokens_sum") == 3
    assert page("vllm:request_generation_tokens_sum") == 8
    assert page("vllm:request_generation_tokens_bucket", le="5.0") == 0
    assert page("vllm:request_generation_tokens_bucket", le="10.0") == 1
    assert page("logitserve:http_requests_total", path="/v1/completions", method="POST", status="200") == 1
    assert {labels["model_name"] for name in page.names for labels in page.labels(name)} == {"small"}
    assert not [name for name in page.names if name.endswith("_created")]


async def test_times_add_up_to_the_whole(open_app: OpenApp) -> None:
    """The engine says that the first step began a while before its output; that while is prefill, and no queue."""
    first, going = asyncio.Event(), asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        begun, *rest = tokens(request, 3)
        assert isinstance(begun, StepOutput)
        return [
            first.wait(),
            StepOutput(request_id=request.request_id, index=0, token_ids=[33], begun_seconds=0.05),
            going.wait(),
            *rest,
        ]

    async with open_app(script) as app:
        work = asyncio.create_task(app.post("/v1/completions", BODY))
        await app.engine.running(1)
        await asyncio.sleep(0.1)
        first.set()
        await asyncio.sleep(0.1)
        going.set()
        await work
        page = await page_of(app)
    queue, prefill, decode = (
        page(f"vllm:request_{name}_time_seconds_sum") for name in ("queue", "prefill", "decode")
    )
    assert queue > 0.04
    assert prefill >= 0.05
    assert decode > 0.09
    assert page("vllm:inter_token_latency_seconds_sum") == pytest.approx(decode)
    assert page("vllm:time_to_first_token_seconds_sum") >= queue + prefill
    assert (
        page("vllm:e2e_request_latency_seconds_sum") >= page("vllm:time_to_first_token_seconds_sum") + decode
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_ends_is_counted_as_failed_and_not_as_answered(
    open_app: OpenApp, *, stream: bool
) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [*tokens(request, 2)[:1], EngineDeadError("it died")]

    async with open_app(script) as app:
        await app.post("/v1/completions", {**BODY, "stream": stream})
        page = await page_of(app)
    assert page("logitserve:requests_failed_total", code="engine_dead") == 1
    assert page("logitserve:refusals_total", status="503", code="engine_dead") == 1
    assert page("vllm:request_success_total") == page("logitserve:requests_aborted_total") == 0
    assert page("vllm:e2e_request_latency_seconds_count") == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_an_abort_and_no_failure(open_app: OpenApp, *, stream: bool) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [*tokens(request, 2)[:1], asyncio.Event().wait()]

    async with open_app(script) as app:
        gone = asyncio.Event()
        body = json.dumps({"prompt": [33], "stream": stream}).encode()
        told: list[Message] = [{"type": "http.request", "body": body}]

        async def receive() -> Message:
            if told:
                return told.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_message: Message) -> None:
            pass

        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"host", b"test"), (b"content-type", b"application/json")],
        }
        work = asyncio.create_task(app.asgi(scope, receive, send))
        await app.engine.running(1)
        assert (await page_of(app))("logitserve:requests_in_flight") == 1
        gone.set()
        await work
        page = await page_of(app)
    assert page("logitserve:requests_aborted_total") == 1
    assert page("logitserve:requests_failed_total") == page("logitserve:refusals_total") == 0
    assert page("logitserve:requests_in_flight") == 0


async def test_every_refusal_is_counted_by_its_code(open_app: OpenApp) -> None:
    key = {"authorization": "Bearer hush"}
    async with open_app(four_tokens, api_key=["hush"], max_body_bytes=1000) as app:
        await app.post("/v1/completions", BODY)
        for body in (
            {"prompt": "a", "n": 100},
            {"prompt": "a", "colour": 1},
            {"prompt": "a" * 2000},
            {"prompt": "a", "model": "x"},
        ):
            await app.post("/v1/completions", body, headers=key)
        await app.client.get("/nowhere", headers=key)
        await app.client.delete("/v1/models", headers=key)
        page = Page.of((await app.client.get("/metrics", headers=key)).text)
    refused = {
        (labels["status"], labels["code"]): page(
            "logitserve:refusals_total", status=labels["status"], code=labels["code"]
        )
        for labels in page.labels("logitserve:refusals_total")
    }
    assert refused == {
        ("401", "invalid_api_key"): 1,
        ("400", "invalid_value"): 1,
        ("400", "unknown_parameter"): 1,
        ("413", "request_too_large"): 1,
        ("404", "model_not_found"): 1,
        ("404", "not_found"): 1,
        ("405", "method_not_allowed"): 1,
    }
    assert page("logitserve:requests_failed_total") == 0, "nothing of it came to the engine"


async def test_labels_hold_nothing_that_a_client_chose(open_app: OpenApp) -> None:
    async with open_app(four_tokens, served_model_name=["m"]) as app:
        for number in range(20):
            await app.client.get(f"/secret-{number}")
            await app.client.get(f"/v1/models/secret-{number}")
            await app.client.request(f"SECRET{number}", "/version")
            await app.post(f"/v1/completions?secret={number}", {**BODY, "model": f"secret-{number}"})
        await app.client.head("/version")
        answer = await app.client.get("/metrics")
    page = Page.of(answer.text)
    assert "secret" not in answer.text.lower()
    assert page("logitserve:http_requests_total", path="other") == 20
    assert page("logitserve:http_requests_total", path="/v1/models/{name:path}", status="404") == 20
    assert page("logitserve:http_requests_total", path="/version", method="other") == 20
    assert page("logitserve:http_requests_total", path="/version", method="HEAD", status="200") == 1


async def test_rows_and_their_bytes_are_counted_as_answers_take_them(open_app: OpenApp) -> None:
    def rows(count: int) -> LogitsRows:
        return LogitsRows(
            values=Array("float32", (count, 2), bytes(8 * count)),
            token_ids=Array("int32", (count, 2), bytes(8 * count)),
        )

    def script(request: GenerationRequest) -> list[Step]:
        prompt = PromptOutput(offset=0, logits=rows(3))
        return [
            StepOutput(request_id=request.request_id, index=0, token_ids=[33], logits=rows(1), prompt=prompt),
            StepOutput(
                request_id=request.request_id, index=0, token_ids=[33], logits=rows(1), finish_reason="stop"
            ),
        ]

    async with open_app(script) as app:
        answer = await app.post(
            "/v1/completions", {**BODY, "return_logits": {"top_k": 2, "positions": "all"}}
        )
        assert answer.status_code == 200
        page = await page_of(app)
    assert page("logitserve:logits_rows_total", positions="generated") == 2
    assert page("logitserve:logits_rows_total", positions="prompt") == 3
    assert page("logitserve:logits_bytes_total") == 5 * 16
    assert page("vllm:request_success_total", finished_reason="stop") == 1


async def test_the_engines_statistics_are_those_that_it_sent_last(open_app: OpenApp) -> None:
    async with open_app() as app:
        app.engine.stats = EngineStats(
            num_running=3,
            num_waiting=2,
            num_parked=1,
            num_used_blocks=16,
            num_steps=10,
            num_preemptions=4,
            num_prefix_query_tokens=100,
            num_prefix_hit_tokens=64,
            num_generated_tokens=30,
            step_seconds=0.5,
            step_counts=(1, 2, 3, *[0] * 10, 4),
        )
        page = await page_of(app)
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "logitserve:num_requests_parked": 1,
        "vllm:kv_cache_usage_perc": 0.25,
        "logitserve:kv_blocks_used": 16,
        "logitserve:kv_blocks": 64,
        "logitserve:engine_steps_total": 10,
        "vllm:num_preemptions_total": 4,
        "vllm:prefix_cache_queries_total": 100,
        "vllm:prefix_cache_hits_total": 64,
        "vllm:generation_tokens_total": 30,
        "logitserve:engine_step_seconds_sum": 0.5,
        "logitserve:engine_step_seconds_count": 10,
    }
    assert {name: page(name) for name in expected} == expected
    assert page("logitserve:engine_step_seconds_bucket", le="0.0025") == 3
    assert page("logitserve:engine_step_seconds_bucket", le="10.0") == 6


async def test_what_is_held_is_shown_while_it_is_held(open_app: OpenApp) -> None:
    def script(request: GenerationRequest) -> list[Step]:
        return [going.wait(), *tokens(request, 1)]

    going = asyncio.Event()
    async with open_app(script, max_held_bytes="16MiB") as app:
        body = {**BODY, "return_logits": {"top_k": 2}}
        work = [asyncio.create_task(app.post("/v1/completions", body)) for _ in range(3)]
        await app.engine.running(3)
        page = await page_of(app)
        assert page("logitserve:queued_requests") == page("logitserve:requests_in_flight") == 3
        assert page("logitserve:queued_tokens") == 9
        assert page("logitserve:held_bytes", kind="windows") > 0
        going.set()
        await asyncio.gather(*work)
        page = await page_of(app)
    for name in ("queued_requests", "queued_tokens", "requests_in_flight", "held_bytes", "held_body_bytes"):
        assert page(f"logitserve:{name}") == 0


async def test_the_page_is_there_while_nothing_else_is(open_app: OpenApp) -> None:
    async with open_app() as app:
        app.engine.reason = "loading the model"
        loading = await page_of(app)
        app.engine.reason = None
        ready = await page_of(app)
        app.state.draining = True
        draining = await page_of(app)
        head = await app.client.head("/metrics")
    assert (head.status_code, head.content) == (200, b"")
    shown = [(page("logitserve:ready"), page("logitserve:draining")) for page in (loading, ready, draining)]
    assert shown == [(0, 0), (1, 0), (0, 1)]
    assert draining("logitserve:requests_in_flight") == 0, "neither the scrape itself nor the probes are work"


async def test_the_page_needs_the_key_where_there_is_one(open_app: OpenApp) -> None:
    async with open_app(api_key=["hush"]) as app:
        refused = await app.client.get("/metrics")
        told = await app.client.get("/metrics", headers={"x-api-key": "hush"})
    assert (refused.status_code, told.status_code) == (401, 200)
    assert "vllm:" not in refused.text


ENDS = ("answered", "failed", "left", "refused")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ends=st.lists(st.sampled_from(ENDS), max_size=6))
def test_gauges_return_to_zero_and_every_request_is_counted_once(
    open_app: OpenApp, ends: Sequence[str]
) -> None:
    asyncio.run(check_requests(open_app, ends))


async def check_requests(open_app: OpenApp, ends: Sequence[str]) -> None:
    """Run requests that end in these ways at the same time."""
    going = asyncio.Event()

    def script(request: GenerationRequest) -> list[Step]:
        match ENDS[request.prompt_token_ids[0] - 33]:
            case "failed":
                return [going.wait(), EngineDeadError("it died")]
            case "left":
                return [asyncio.Event().wait()]
            case _:
                return [going.wait(), *tokens(request, 2)]

    async with open_app(script) as app:

        async def send(end: str) -> None:
            body = {"prompt": [33 + ENDS.index(end)], "max_tokens": 0 if end == "refused" else 2}
            with contextlib.suppress(httpx.HTTPError):
                await app.post("/v1/completions", {**body, "n": 1000 if end == "refused" else 1})

        work = [asyncio.create_task(send(end)) for end in ends]
        await app.engine.running(len([end for end in ends if end != "refused"]))
        for end, task in zip(ends, work, strict=True):
            if end == "left":
                task.cancel()
        going.set()
        await asyncio.gather(*work, return_exceptions=True)
        page = await page_of(app)
    counted = {
        "answered": page("vllm:request_success_total"),
        "failed": page("logitserve:requests_failed_total"),
        "left": page("logitserve:requests_aborted_total"),
        "refused": page("logitserve:refusals_total", status="400"),
    }
    assert counted == {end: ends.count(end) for end in ENDS}
    assert page("logitserve:http_requests_total", path="/v1/completions") == len(ends)
    for name in ("requests_in_flight", "queued_requests", "queued_tokens", "held_bytes", "held_body_bytes"):
        assert page(f"logitserve:{name}") == 0
