"""Debian's Prometheus scrapes a running server, and answers every query of the dashboard and of the alerts."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import START_SECONDS, LiveServer, serving
from metrics_page import Page
from monitoring import (
    ALERTS,
    METRIC,
    Prometheus,
    dashboard_queries,
    prometheus,
    scrape_config,
    variable_queries,
)

pytestmark = [pytest.mark.deployments, pytest.mark.timeout(600)]

KEY = "a-key-of-the-tests"
MODEL = "tiny"
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPT = list(range(100, 164))
"""Four KV blocks, so that a second request finds them in the prefix cache."""

LONG = {"prompt": PROMPT, "max_tokens": 440, "ignore_eos": True, "stream": True}
WINDOW = "10m"
"""Longer than the test."""


@dataclass(frozen=True)
class Watched:
    server: LiveServer
    prometheus: Prometheus

    @property
    def instance(self) -> str:
        return self.server.url.removeprefix("http://")

    def metric_names(self) -> set[str]:
        """Return the names of all series at /metrics."""
        answer = httpx.get(f"{self.server.url}/metrics", headers=HEADERS, timeout=30)
        assert answer.status_code == 200
        return Page.of(answer.text).names


@pytest.fixture(scope="module")
def watched(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A server that had every kind of request, the loss of its engine too, and the Prometheus that saw all of it."""
    folder = tmp_path_factory.mktemp("prometheus")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\n")
    options = ("--max-num-seqs", "2", "--max-queued-requests", "1", "--num-threads", "1")
    names = ("--served-model-name", MODEL, "--api-key-file", str(keys))
    with serving(folder / "server.log", str(tiny_llama), *names, *options) as server:
        target = server.url.removeprefix("http://")
        with prometheus(scrape_config(folder, [target], keys)) as scraper:
            seen = Watched(server, scraper)
            scraper.wait_for("count_over_time(logitserve:ready[5m]) >= 2")
            asyncio.run(use(server))
            scraper.wait_for("logitserve:engine_restarts_total == 1")
            scraper.wait_for("min(count_over_time(logitserve:requests_failed_total[5m])) >= 2")
            yield seen


async def use(server: LiveServer) -> None:
    """Send answers of each kind, refusals and an abort, and kill the engine under a stream."""
    async with httpx.AsyncClient(base_url=server.url, headers=HEADERS, timeout=120) as client:
        for stream in (False, True):
            chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": stream}
            assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        for positions in ("generated", "prompt"):
            rows = {"prompt": PROMPT, "max_tokens": 4, "return_logits": {"positions": positions, "top_k": 5}}
            assert (await client.post("/v1/completions", json=rows)).status_code == 200
        assert (await client.post("/v1/logits", json={"input": PROMPT})).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "a", "n": -1})).status_code == 400
        while 429 not in await burst(client):
            pass
        async with client.stream("POST", "/v1/completions", json=LONG) as answer:
            await anext(answer.aiter_lines())  # then the client leaves
        await lose_engine(client, server)


async def burst(client: httpx.AsyncClient) -> list[int]:
    """Return the statuses of more requests at once than may run and wait."""
    answers = await asyncio.gather(*(client.post("/v1/completions", json=LONG) for _ in range(8)))
    return [answer.status_code for answer in answers]


async def lose_engine(client: httpx.AsyncClient, server: LiveServer) -> None:
    """Kill the engine under a stream, and wait until requests are served by the next one."""
    async with client.stream("POST", "/v1/completions", json=LONG) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        for child in psutil.Process(server.process.pid).children():
            child.kill()
        assert any("engine_dead" in line for line in [line async for line in lines])
    await asyncio.to_thread(server.wait_ready, START_SECONDS)


def substituted(query: str, model_name: str, instance: str) -> str:
    """Return a query of the dashboard as Grafana sends it."""
    for variable, value in (
        ("$model_name", model_name),
        ("$instance", instance),
        ("$__rate_interval", WINDOW),
        ("$__range", WINDOW),
    ):
        query = query.replace(variable, value)
    assert "$" not in query
    return query


def test_every_metric_of_the_dashboard_and_the_alerts_is_served(watched: Watched) -> None:
    named = set(METRIC.findall(" ".join([*dashboard_queries().values(), ALERTS.read_text()])))
    assert len(named) > 20
    assert named <= watched.metric_names()


def test_prometheus_scrapes_with_the_key(watched: Watched) -> None:
    (target,) = watched.prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert httpx.get(f"{watched.server.url}/metrics", timeout=30).status_code == 401


@pytest.mark.parametrize("name", dashboard_queries())
def test_a_query_of_the_dashboard_returns_numbers(watched: Watched, name: str) -> None:
    expression = dashboard_queries()[name]
    for model_name, instance in ((".*", ".*"), (MODEL, re.escape(watched.instance).replace("\\", "\\\\"))):
        values = watched.prometheus.query(substituted(expression, model_name, instance))
        assert values
        assert not any(map(math.isnan, values)), values


def test_the_variables_of_the_dashboard_have_values(watched: Watched) -> None:
    expected = {"model_name": [MODEL], "instance": [watched.instance]}
    for name, (metric, label) in variable_queries().items():
        found = watched.prometheus.ask(f"label/{label}/values", **{"match[]": metric})
        assert found == expected.pop(name)
    assert not expected


def test_every_alert_is_evaluated_on_data_that_exist(watched: Watched) -> None:
    (group,) = watched.prometheus.ask("rules")["groups"]
    assert len(group["rules"]) == ALERTS.read_text().count("- alert: ")
    for rule in group["rules"]:
        assert rule["health"] == "ok", rule
        without_thresholds = re.sub(r" (?:==|>) [\d.]+", "", rule["query"])
        assert without_thresholds != rule["query"]
        values = watched.prometheus.query(without_thresholds)
        assert values, f"{rule['name']} compares nothing"
        assert not any(map(math.isnan, values)), f"{rule['name']}: {values}"


def test_the_loss_of_an_engine_is_told(watched: Watched) -> None:
    watched.prometheus.wait_for('ALERTS{alertname="LogitserveEngineRestarted", alertstate="firing"}')


def promtool(*arguments: str) -> None:
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_accepts_the_rules_and_each_fires_when_it_should() -> None:
    promtool("check", "rules", str(ALERTS))
    promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    promtool("check", "config", str(scrape_config(tmp_path, ["server-1:8000", "server-2:8000"], key)))
