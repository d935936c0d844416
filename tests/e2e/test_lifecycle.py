"""Clients that go away, and stopping: the behaviour that a supervisor and a load balancer rely on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, serving

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
LONG = {"prompt": [5, 6, 7], "max_tokens": 480, "ignore_eos": True, "temperature": 0}
OPTIONS = ("--dtype", "float32", "--num-threads", "1")


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Serve with a cache that holds just two long requests, so that leaked blocks show at once."""
    log = tmp_path_factory.mktemp("lifecycle") / "server.log"
    with serving(log, str(tiny_llama), *OPTIONS, "--num-blocks", "64", "--no-prefix-caching") as server:
        yield server


async def first_token(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[httpx.Response, Any]:
    """Return a stream that has begun, and its lines."""
    request = client.build_request("POST", COMPLETIONS, json={**body, "stream": True})
    response = await client.send(request, stream=True)
    assert response.status_code == 200
    lines = response.aiter_lines()
    assert (await anext(lines)).startswith("data: ")
    return response, lines


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
async def test_clients_that_go_away_free_what_their_requests_held(
    server: LiveServer, *, streamed: bool
) -> None:
    for attempt in range(4):
        name = f"leaver-{streamed}-{attempt}"
        headers = {"x-request-id": name}
        async with httpx.AsyncClient(base_url=server.url, timeout=60, headers=headers) as client:
            if streamed:
                response, _ = await first_token(client, LONG)
                await response.aclose()
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(COMPLETIONS, json=LONG, timeout=0.15)
        assert (await server.logged(name))["completion_tokens"] < LONG["max_tokens"]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=LONG) for _ in range(2)))
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [480, 480]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_server_starts_ends_it_and_its_engine(
    tiny_llama: Path, number: signal.Signals
) -> None:
    """The signal comes when the engine's socket appears, before the server has installed its handlers."""
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as directory,
        subprocess.Popen(
            [sys.executable, "-m", "logitserve", "serve", str(tiny_llama), "--port", "0"],
            env={**os.environ, "TMPDIR": directory},
            stderr=subprocess.PIPE,  # the engine writes to it too, so its end means that both have gone
        ) as process,
    ):
        try:
            while not list(Path(directory).glob("logitserve-*/engine.sock")):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0
        assert not list(Path(directory).glob("logitserve-*"))
