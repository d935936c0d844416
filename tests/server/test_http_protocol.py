"""What our HTTP protocol makes of the bytes of good, old, slow and hostile clients."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from logitserve.config import ServerConfig
from raw_http import RawClient, get, post
from served_app import ServedApp, echo, served
from starlette.types import Receive, Scope, Send

H2C = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__")


@pytest.fixture(scope="module")
def server() -> Iterator[ServedApp]:
    with served(max_headers=20, max_header_bytes=4096) as server:
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[ServedApp]:
    """A server that waits for nothing longer than a second."""
    with served(keep_alive=1, head_timeout=0.5, body_timeout=0.5) as server:
        yield server


# Offers of another protocol


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_an_offer_of_h2c_is_declined_with_its_body_and_its_connection_kept(
    server: ServedApp, size: int
) -> None:
    request = post("/a", "one", *H2C)
    with RawClient(server.url) as client:
        for start in range(0, len(request), size):
            client.send(request[start : start + size])
        first = client.answer()
        assert (first.status, first.body) == (200, b'"one"')
        assert "upgrade" not in first.headers["x-names"].split()
        assert client.send(post("/b", "two")).answer().body == b'"two"'
        assert client.send(post("/c", "three", *H2C)).answer().body == b'"three"'


def test_pipelined_offers_of_h2c_are_all_answered(server: ServedApp) -> None:
    with RawClient(server.url) as client:
        client.send(b"".join(post("/", number, *H2C) for number in range(4)) + get("/end", *H2C))
        assert [client.answer().body for _ in range(5)] == [b"0", b"1", b"2", b"3", b""]


def test_the_chunks_of_a_request_that_offers_a_websocket_are_its_body(server: ServedApp) -> None:
    head = get("/", "connection: keep-alive, upgrade", "upgrade: websocket", "transfer-encoding: chunked")
    with RawClient(server.url) as client:
        assert client.send(head + b"3\r\nabc\r\n0\r\n\r\n").answer().body == b"abc"
        assert client.send(get("/")).answer().status == 200


# Old clients


async def streaming(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001 - ASGI's signature
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in (b"one", b"", b"two"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"three"})


def test_an_http_1_0_client_reads_a_stream_without_frames_to_the_end_of_the_connection() -> None:
    with served(streaming) as server, RawClient(server.url) as old, RawClient(server.url) as client:
        head, _, body = (
            old.send(b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n").rest().partition(b"\r\n\r\n")
        )
        assert b"connection: close" in head.lower()
        assert b"transfer-encoding" not in head.lower()
        assert body == b"onetwothree"
        assert client.send(get("/")).answer().body == b"onetwothree"


def test_an_http_1_0_client_gets_an_answers_length_and_then_the_end(server: ServedApp) -> None:
    with RawClient(server.url) as old:
        answer = old.send(b"POST / HTTP/1.0\r\ncontent-length: 3\r\nexpect: 100-continue\r\n\r\nabc").answer()
        assert (answer.body, answer.headers["connection"]) == (b"abc", "close")
        assert old.is_closed()


# Heads


@pytest.mark.parametrize(
    ("head", "status", "says"),
    [
        ("GET / HTTP/1.1\r\n", 400, "Host"),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n", 400, "Host"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 3\r\n", 400, "Content-Length"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n", 400, "Content-Length"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3, 3\r\n", 400, "Content-Length"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: +3\r\n", 400, "Content-Length"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n", 400, "Content-Length"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0x3\r\n", 400, "Content-Length"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length:\r\n", 400, "Content-Length"),
        (f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {'9' * 30}\r\n", 400, "Content-Length"),
        ("POST / HTTP/1.1\r\nhost: x\r\ncontent-length : 3\r\n", 400, "header"),
        (
            "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n",
            400,
            "Content-Length",
        ),
        (
            "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n",
            400,
            "Content-Length",
        ),
        ("POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n", 400, "Transfer-Encoding"),
        ("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n", 501, "chunked"),
        ("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: identity\r\n", 501, "chunked"),
        ("POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n", 501, "chunked"),
        (
            "POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
            400,
            "Transfer-Encoding",
        ),
        ("GET / HTTP/1.1\r\nhost: x\r\nx-folded: a\r\n b\r\n", 400, "whitespace"),
        ("GET / HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n", 400, "value"),
        ("GET / HTTP/1.1\r\nhost: x\r\nx: a\rb\r\n", 400, "LF"),
        ("GET / HTTP/1.1\nhost: x\n", 400, "CRLF"),
        ("GET / HTTP/2.0\r\nhost: x\r\n", 505, "HTTP/2.0"),
        ("GET /\r\n", 505, "HTTP/0.9"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n", 400, "HTTP"),
        ("GET nowhere HTTP/1.1\r\nhost: x\r\n", 400, "HTTP"),
        ("GET /\xff HTTP/1.1\r\nhost: x\r\n", 400, "url"),
        ("FOO / HTTP/1.1\r\nhost: x\r\n", 400, "method"),
        ("CONNECT x:443 HTTP/1.1\r\nhost: x\r\n", 405, "CONNECT"),
        ("\x16\x03\x01\x02\x00\x01", 400, "method"),
        ("GET / HTTP/1.1\r\nhost: x\r\n" + "x: y\r\n" * 20, 431, "--max-headers"),
        (f"GET / HTTP/1.1\r\nhost: x\r\nx: {'y' * 5000}\r\n", 431, "--max-header-bytes"),
        (f"GET /{'y' * 5000} HTTP/1.1\r\nhost: x\r\n", 431, "--max-header-bytes"),
    ],
)
def test_a_head_that_others_could_read_otherwise_is_refused_by_name(
    server: ServedApp, head: str, status: int, says: str
) -> None:
    with RawClient(server.url) as client:
        answer = client.send(head.encode("latin-1") + b"\r\nabc").answer()
        assert answer.status == status
        assert says in answer.error["message"]
        assert answer.headers["connection"] == "close"
        assert client.is_closed()


def test_a_client_that_sends_a_huge_head_before_it_reads_reads_why_it_was_refused(server: ServedApp) -> None:
    with RawClient(server.url) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\nx: ").send(b"y" * (1 << 20))
        assert client.answer().status == 431


def test_a_whole_url_is_a_target_and_leading_empty_lines_are_ignored(server: ServedApp) -> None:
    with RawClient(server.url) as client:
        client.send(b"\r\n\r\nGET http://elsewhere/a%20b?c HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.answer().headers["x-path"] == "/a b"


def test_a_trailer_is_no_header(server: ServedApp) -> None:
    head = get("/", "transfer-encoding: chunked")
    with RawClient(server.url) as client:
        answer = client.send(head + b"1\r\na\r\n0\r\nauthorization: Bearer key\r\n\r\n").answer()
        assert (answer.status, answer.headers["x-names"]) == (200, "host transfer-encoding")
        client.send(head + b"1\r\na\r\n0\r\n" + b"x: y\r\n" * 30)
        assert client.answer().status == 431


def test_a_chunk_that_is_none_is_the_requests_error(server: ServedApp) -> None:
    with RawClient(server.url) as client:
        answer = client.send(get("/", "transfer-encoding: chunked") + b"1\r\nabc\r\n").answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_http")
        assert client.is_closed()


# Pipelines


def test_pipelined_requests_are_answered_in_order(server: ServedApp) -> None:
    with RawClient(server.url) as client:
        client.send(b"".join(post("/", number) for number in range(20)))
        assert [client.answer().body for _ in range(20)] == [b"%d" % number for number in range(20)]


def test_a_refusal_comes_after_the_answers_that_are_owed(server: ServedApp) -> None:
    with RawClient(server.url) as client:
        client.send(post("/", 1) + post("/", 2) + b"nonsense\r\n\r\n" + post("/", 3))
        assert [client.answer().status for _ in range(3)] == [200, 200, 400]
        assert client.is_closed()


def test_a_pipeline_has_an_end(server: ServedApp) -> None:
    with RawClient(server.url) as client:
        client.send(get("/") * 1000)
        answers = [client.answer().status for _ in range(34)]
        assert answers == [200] * 33 + [400]
        assert client.is_closed()


# Slow clients


def test_a_connection_that_never_says_anything_is_closed_without_a_word(hasty: ServedApp) -> None:
    with RawClient(hasty.url) as client:
        assert client.rest() == b""


@pytest.mark.parametrize("before", [b"", get("/")], ids=["first request", "second request"])
def test_a_head_that_does_not_end_is_refused(hasty: ServedApp, before: bytes) -> None:
    with RawClient(hasty.url) as client:
        if before:
            assert client.send(before).answer().status == 200
        answer = client.send(b"GET / HTTP/1.1\r\nhost: x\r\nx: y").answer()
        assert (answer.status, answer.error["code"]) == (408, "request_too_slow")
        assert "--head-timeout" in answer.error["message"]
        assert client.is_closed()


def test_an_idle_connection_is_closed_after_keep_alive(hasty: ServedApp) -> None:
    with RawClient(hasty.url) as client:
        assert client.send(get("/")).answer().status == 200
        assert client.send(b"\r\n").is_closed()


def test_idle_connections_are_kept_for_longer_than_those_of_balancers() -> None:
    assert ServerConfig().keep_alive == 75
    with served(keep_alive=300) as server:
        assert server.server.config.timeout_keep_alive == 300


def test_a_body_that_trickles_is_given_up(hasty: ServedApp) -> None:
    """Its bytes come often enough that it is never silent."""
    with RawClient(hasty.url) as client:
        client.send(get("/", "content-length: 1000000"))
        client.socket.settimeout(0.05)
        answer = b""
        while not answer:
            client.send(b"x")
            try:
                answer = client.socket.recv(1000)
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"--body-timeout" in answer


def test_a_client_is_not_blamed_for_a_body_that_the_server_does_not_read() -> None:
    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)  # two periods
        await echo(scope, receive, send)

    body = b"x" * (64 << 20)
    with served(late, body_timeout=0.5) as server, RawClient(server.url) as client:
        client.send(get("/", f"content-length: {len(body)}")).send(body)
        assert len(client.answer().body) == len(body)


# Many clients


def test_the_oldest_silent_connection_makes_room_for_a_newcomer() -> None:
    with served(max_connections=10) as server:
        silent = [RawClient(server.url) for _ in range(40)]
        with RawClient(server.url) as client:
            assert client.send(get("/")).answer().status == 200
            assert all(one.is_closed() for one in silent[:31])
            assert silent[-1].send(get("/")).answer().status == 200
        for one in silent:
            one.close()


def test_a_newcomer_is_refused_at_once_while_every_connection_has_spoken() -> None:
    with served(max_connections=3) as server:
        clients = [RawClient(server.url) for _ in range(3)]
        assert [client.send(get("/")).answer().status for client in clients] == [200] * 3
        with RawClient(server.url) as refused:
            answer = refused.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "--max-connections" in answer.error["message"]
            assert refused.is_closed()
        clients[0].close()
        for client in clients[1:]:
            assert client.send(get("/")).answer().status == 200
            client.close()
