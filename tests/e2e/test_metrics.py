"""Metrics of a real server: every one of them is there and moves, and none of the counters goes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import LiveServer, serving
from metrics_page import Page
from raw_http import RawClient

GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "logitserve:num_requests_parked",
    "logitserve:kv_blocks_used",
    "logitserve:kv_blocks",
    "logitserve:queued_requests",
    "logitserve:queued_tokens",
    "logitserve:requests_in_flight",
    "logitserve:held_bytes",
    "logitserve:held_body_bytes",
    "logitserve:open_connections",
    "logitserve:ready",
    "logitserve:draining",
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "logitserve:engine_step_seconds",
}
COUNTERS = {
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "logitserve:requests_aborted_total",
    "logitserve:requests_failed_total",
    "logitserve:refusals_total",
    "logitserve:logits_rows_total",
    "logitserve:logits_bytes_total",
    "logitserve:http_requests_total",
    "logitserve:engine_steps_total",
    "logitserve:engine_restarts_total",
}
MOVING = COUNTERS | {f"{name}_count" for name in HISTOGRAMS}
KEY = {"authorization": "Bearer hush-hush"}
LONG = {"prompt": list(range(100, 150)), "max_tokens": 200, "ignore_eos": True}
SECONDS = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[LiveServer]:
    """Serve with a KV cache that three long requests fill."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = ["--num-blocks", "24", "--api-key", "hush-hush", "--served-model-name", "tiny"]
    with serving(log, str(tiny_llama), *options) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=SECONDS, headers=KEY) as client:
        yield client


def page_of(client: httpx.Client) -> Page:
    return Page.of(client.get("/metrics").raise_for_status().text)


def wait_for(client: httpx.Client, condition: Callable[[Page], bool]) -> Page:
    """Scrape until the condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition(page := page_of(client)):
        assert time.monotonic() < deadline, page
        time.sleep(0.05)
    return page


def complete(client: httpx.Client, **body: object) -> None:
    client.post("/v1/completions", json={**LONG, **body}).raise_for_status()


def leave_a_stream(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        next(answer.iter_lines())


def kill_the_engine_under_a_stream(client: httpx.Client, server: LiveServer) -> str:
    """Return what the stream's client reads."""
    with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        (engine,) = psutil.Process(server.process.pid).children()
        engine.kill()
        return "\n".join([first, *lines])


def test_every_metric_is_there_and_moves_and_no_counter_goes_back(
    client: httpx.Client, server: LiveServer
) -> None:
    fresh = page_of(client)
    assert fresh.names >= GAUGES
    assert fresh("logitserve:kv_blocks") == 24
    assert fresh("logitserve:open_connections") >= 1

    with ThreadPoolExecutor(5) as pool:
        work = [pool.submit(complete, client, seed=seed, temperature=1) for seed in range(5)]
        busy = wait_for(client, lambda page: page("vllm:num_requests_running") > 0)
        for job in work:
            job.result()
    assert busy("logitserve:requests_in_flight") >= 1
    assert busy("vllm:kv_cache_usage_perc") == busy("logitserve:kv_blocks_used") / 24 > 0
    complete(client, max_tokens=2, return_logits={"positions": "all", "top_k": 3})
    assert client.post("/v1/completions", json={**LONG, "n": 1000}).status_code == 400
    leave_a_stream(client)
    wait_for(client, lambda page: page("logitserve:requests_aborted_total") == 1)
    before = wait_for(client, lambda page: page("vllm:num_requests_running") == 0)
    assert before("logitserve:logits_rows_total", positions="prompt") == 50
    assert before("logitserve:logits_rows_total", positions="generated") == 2
    assert before("logitserve:engine_restarts_total") == 0

    assert "engine_dead" in kill_the_engine_under_a_stream(client, server)
    server.wait_ready(SECONDS)
    complete(client)
    after = wait_for(client, lambda page: page("vllm:num_requests_running") == 0)
    assert after("logitserve:engine_restarts_total") == 1
    assert after("logitserve:requests_failed_total", code="engine_dead") == 1
    assert after.names >= MOVING
    assert [name for name in sorted(MOVING) if after(name) <= fresh(name)] == []
    back = [key for key, value in before.samples.items() if key[0] in MOVING and after.samples[key] < value]
    assert back == [], "the second engine counts from nought, and the page goes on"
    assert after("vllm:generation_tokens_total") >= before("vllm:generation_tokens_total") + 200
    assert {labels["model_name"] for name in after.names for labels in after.labels(name)} == {"tiny"}


def test_a_refusal_before_there_is_a_request_is_counted(client: httpx.Client, server: LiveServer) -> None:
    with RawClient(server.url) as raw:
        assert raw.send(b"no HTTP at all\r\n\r\n").answer().error["code"] == "invalid_http"
    assert page_of(client)("logitserve:refusals_total", status="400", code="invalid_http") == 1
