"""The shipped dashboard and alert rules as lists of queries, and a Prometheus that can answer them."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import free_port

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboard.json"
SCRAPE_CONFIG = DOCKER / "prometheus" / "prometheus.yml"
ALERTS = DOCKER / "prometheus" / "alerts.yml"

METRIC = re.compile(r"\b(?:vllm|logitserve):\w+")
"""Names of the server's metrics in a query."""

START_SECONDS = 60
SCRAPE_SECONDS = 120


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def dashboard_queries() -> dict[str, str]:
    """Return the expression of every query, by the panel's title and the query's letter."""
    return {
        f"{panel['title']}, {target['refId']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    }


def variable_queries() -> dict[str, tuple[str, str]]:
    """Return the metric and the label that a variable of the dashboard takes its values from."""
    found = {}
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]["query"])
            assert match, variable
            found[variable["name"]] = (match[1], match[2])
    return found


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus process that answers queries."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """Return ``data`` of an answer of the HTTP API."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        document = answer.json()
        assert document["status"] == "success", f"{parameters}: {document}"
        return document["data"]

    def query(self, expression: str) -> list[float]:
        """Return the values of an expression at this moment, one for each series."""
        return [float(sample["value"][1]) for sample in self.ask("query", query=expression)["result"]]

    def wait_for(self, condition: str) -> None:
        """Ask until the condition holds for a series."""
        deadline = time.monotonic() + SCRAPE_SECONDS
        while not self.query(condition):
            assert time.monotonic() < deadline, f"{condition} did not hold; targets: {self.ask('targets')}"
            time.sleep(0.2)


def scrape_config(folder: Path, targets: list[str], credentials: Path) -> Path:
    """Write the shipped configuration and rules to ``folder``, with these targets and a scrape every other second."""
    text = SCRAPE_CONFIG.read_text()
    for pattern, replacement in (
        (r"targets: \[.*\]", f"targets: {json.dumps(targets)}"),
        (r"credentials_file: \S+", f"credentials_file: {credentials}"),
        (r"(scrape|evaluation)_interval: \S+", r"\1_interval: 2s"),
    ):
        assert re.search(pattern, text), pattern
        text = re.sub(pattern, replacement, text)
    (folder / ALERTS.name).write_text(ALERTS.read_text())
    config = folder / SCRAPE_CONFIG.name
    config.write_text(text)
    return config


@contextlib.contextmanager
def prometheus(config: Path) -> Iterator[Prometheus]:
    """Run Prometheus on loopback until it answers, with its data and log beside the configuration."""
    address = f"127.0.0.1:{free_port()}"
    log = config.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={config.with_suffix('.data')}",
                f"--web.listen-address={address}",
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{address}/-/ready", timeout=5).status_code == 200:
                    break
            if time.monotonic() > deadline:
                pytest.fail(f"Prometheus was not ready within {START_SECONDS} s:\n{log.read_text()}")
            time.sleep(0.1)
        yield Prometheus(f"http://{address}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
