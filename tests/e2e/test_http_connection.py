"""Old, odd and hostile HTTP/1 clients of a whole server, over raw sockets."""

from __future__ import annotations

import gzip
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, serving
from raw_http import RawClient, get, post

COMPLETIONS = "/v1/completions"
BODY = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
H2C = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__")
FILES = 120


@pytest.fixture(scope="module")
def poor(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that may open fewer files than it may have connections."""
    log = tmp_path_factory.mktemp("poor") / "server.log"
    with serving(log, str(tiny_llama), "--dtype", "float32", "--num-threads", "1") as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        yield server


def test_a_client_that_offers_h2c_is_answered_and_keeps_its_connection(tiny_url: str) -> None:
    with RawClient(tiny_url) as client:
        first = client.send(post(COMPLETIONS, BODY, *H2C)).answer()
        second = client.send(post(COMPLETIONS, BODY)).answer()
    assert (first.status, second.status) == (200, 200)
    assert json.loads(first.body)["choices"] == json.loads(second.body)["choices"]


def test_an_http_1_0_client_reads_a_stream_to_the_end_of_the_connection(tiny_url: str) -> None:
    request = post(COMPLETIONS, {**BODY, "stream": True}).replace(b"HTTP/1.1", b"HTTP/1.0")
    with RawClient(tiny_url) as client:
        head, _, body = client.send(request).rest().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    lines = [line for line in body.split(b"\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"


def test_head_is_answered_as_get_and_the_connection_is_kept(tiny_url: str) -> None:
    with RawClient(tiny_url) as client:
        got = client.send(get("/health")).answer()
        client.send(get("/health").replace(b"GET", b"HEAD") + get("/version"))
        head = client.head()
        assert (head.status, head.headers["content-length"]) == (200, got.headers["content-length"])
        assert "version" in json.loads(client.answer().body)


def test_a_gzipped_body_is_answered(tiny_url: str) -> None:
    body = gzip.compress(json.dumps(BODY).encode())
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-encoding: gzip\r\ncontent-length: {len(body)}\r\n\r\n"
    with RawClient(tiny_url) as client:
        assert client.send(head.encode() + body).answer().status == 200
        assert client.send(post(COMPLETIONS, BODY)).answer().status == 200


def test_silent_connections_beyond_the_limit_on_files_keep_nobody_out(poor: LiveServer) -> None:
    """The server runs out of descriptors, and goes on once some are free."""
    silent = [RawClient(poor.url) for _ in range(3 * FILES)]
    for client in silent:
        client.close()
    for _ in range(3):
        with RawClient(poor.url) as client:
            assert client.send(post(COMPLETIONS, BODY)).answer().status == 200
