"""Clients that request much and read little or nothing: some are dropped, and no others wait for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from live_server import LiveServer, serving

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
OPTIONS = ("--dtype", "float32", "--num-threads", "1", "--logits-window-bytes", str(1 << 20))
GREEDY = {"prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True}
LONG = {**GREEDY, "max_tokens": 480}
RECEIVE_BUFFER = 4 << 10
SEGMENT = 1 << 10
"""Bytes of a slow network's segment.

With loopback's large segments a client would take nothing, and then 64 KiB at once.
"""


def asked(server: LiveServer, path: str, body: dict[str, Any], request_id: str = "x") -> socket.socket:
    """Send a request and return its connection unread. With small buffers the kernels take few bytes."""
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
    connection.settimeout(60)
    connection.connect((address.hostname, address.port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nx-request-id: {request_id}\r\n"
        f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def read_to_end(connection: socket.socket, pause: float = 0.0) -> bytes:
    """Return all bytes that come, read a receive buffer at a time with a pause after each."""
    received = b""
    while piece := connection.recv(RECEIVE_BUFFER):
        received += piece
        time.sleep(pause)
    return received


@pytest.fixture(scope="module")
def impatient(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Serve with a cache that holds just two long requests, so that leaked blocks show at once."""
    log = tmp_path_factory.mktemp("readers") / "server.log"
    cache = ("--num-blocks", "64", "--no-prefix-caching")
    with serving(log, str(tiny_llama), *OPTIONS, *cache, "--write-timeout", "2") as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {**LONG, "return_logits": True, "stream": True}),
        ("/v1/logits", {"input": [5] * 500}),
        (COMPLETIONS, {**LONG, "max_tokens": 100, "return_logits": True}),
    ],
    ids=["stream", "Arrow", "whole"],
)
async def test_a_client_that_never_reads_is_dropped_and_frees_what_it_held(
    impatient: LiveServer, request: pytest.FixtureRequest, path: str, body: dict[str, Any]
) -> None:
    name = request.node.callspec.id
    with contextlib.closing(asked(impatient, path, body, name)) as connection:
        entry = await impatient.logged(name)
        assert entry["status"] == 200
        if path == COMPLETIONS and "stream" in body:
            assert entry["completion_tokens"] < LONG["max_tokens"]
        assert "took nothing" in impatient.log.read_text()
        async with httpx.AsyncClient(base_url=impatient.url, timeout=60) as client:
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=LONG) for _ in range(2)))
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [480, 480]
        with pytest.raises(ConnectionResetError):
            read_to_end(connection)


def test_slow_clients_receive_everything(impatient: LiveServer) -> None:
    """The clients read 80 KiB a second at most, so a slice of a body takes them longer than the timeout."""
    body = {**GREEDY, "max_tokens": 2, "return_logits": True}

    def read_slowly(*, stream: bool) -> bytes:
        with contextlib.closing(asked(impatient, COMPLETIONS, {**body, "stream": stream})) as connection:
            return read_to_end(connection, pause=0.05)

    with ThreadPoolExecutor() as pool:
        streamed = pool.submit(read_slowly, stream=True)
        whole = pool.submit(read_slowly, stream=False)
    expected = httpx.post(impatient.url + COMPLETIONS, json=body, timeout=60).content
    assert len(expected) > 500_000
    assert len(streamed.result()) > len(expected)
    assert streamed.result().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    _, _, content = whole.result().partition(b"\r\n\r\n")
    assert json.loads(content)["choices"] == json.loads(expected)["choices"]


async def test_a_newcomer_is_served_beside_64_streams_that_nobody_reads(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The 64 streams fill every place of a step and stay open."""
    body = {**LONG, "return_logits": True, "stream": True}
    with (
        serving(tmp_path / "server.log", str(tiny_llama), *OPTIONS) as server,
        contextlib.ExitStack() as open_streams,
    ):
        for _ in range(64):
            connection = open_streams.enter_context(contextlib.closing(asked(server, COMPLETIONS, body)))
            assert connection.recv(12) == b"HTTP/1.1 200"
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            answer = await client.post(COMPLETIONS, json={**GREEDY, "max_tokens": 32})
        assert answer.json()["usage"]["completion_tokens"] == 32
