"""Our HTTP protocol with the bytes of good, old, slow and hostile clients."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import Iterator

import pytest
from logitserve.config import ServerConfig
from logitserve.http.middleware.lingering_close import LingeringClose
from raw_http import SECONDS, RawClient, get, post
from served_app import ServedApp, echo, served
from starlette.types import Receive, Scope, Send

H2C = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__")


@pytest.fixture(scope="module")
def server() -> Iterator[ServedApp]:
    with served(max_headers=20, max_header_bytes=4096) as server:
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[ServedApp]:
    """A server whose timeouts are at most a second."""
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
        client.send(b"\r\n\r\nGET http://elsewhere/a%20b?c HTTP/1.1\r\nhost: elsewhere\r\n\r\n")
        assert client.answer().headers["x-path"] == "/a b"


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://localhost:80", "LOCALHOST"),
        ("http://me@localhost:8000", "localhost:8000"),
        ("https://[::1]", "[0::1]:443"),
    ],
)
def test_a_whole_url_names_the_host_in_any_spelling(server: ServedApp, url: str, host: str) -> None:
    with RawClient(server.url) as client:
        assert client.send(f"GET {url}/ HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()).answer().status == 200


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://evil.example", "localhost"),
        ("http://localhost@evil.example", "localhost"),
        ("http://localhost:8001", "localhost:8000"),
        ("https://localhost", "localhost:80"),
        ("http://localhost", ""),
    ],
)
def test_a_whole_url_on_another_host_than_the_hosts_header_is_refused(
    server: ServedApp, url: str, host: str
) -> None:
    with RawClient(server.url) as client:
        answer = client.send(f"GET {url}/ HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()).answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_host")


def test_a_head_within_the_bound_may_come_in_any_pieces(server: ServedApp) -> None:
    head = get("/", *(f"x-{number}: {'y' * 1000}" for number in range(3)))
    with RawClient(server.url) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(head), 10):
            client.send(head[start : start + 10])
        assert client.answer().status == 200


@pytest.mark.parametrize(
    "rest",
    [
        b"0\r\nx: " + b"y" * (1 << 20),
        b"1;" + b"y" * (1 << 20),
        b"0\r\n" + (b"x: " + b"y" * 1000 + b"\r\n") * 6,
    ],
    ids=["trailer", "chunk extension", "trailers"],
)
def test_what_comes_with_a_body_is_bounded_as_its_head_is(server: ServedApp, rest: bytes) -> None:
    with RawClient(server.url) as client:
        client.send(get("/", "transfer-encoding: chunked") + b"1\r\na\r\n" + rest)
        answer = client.answer()
        assert answer.status == 431
        assert "--max-header-bytes" in answer.error["message"]
        assert client.is_closed()


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


# Bodies that wait for 100 Continue


async def unreading(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001 - ASGI's signature
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


def test_an_answer_before_a_body_that_was_not_asked_for_ends_the_connection() -> None:
    with served(LingeringClose(unreading)) as server, RawClient(server.url) as client:
        answer = client.send(get("/", "expect: 100-continue", "content-length: 3")).answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        assert client.is_closed()


def test_a_body_that_was_asked_for_leaves_the_connection_open() -> None:
    with served(LingeringClose(echo)) as server, RawClient(server.url) as client:
        assert client.send(get("/", "expect: 100-continue", "content-length: 3")).head().status == 100
        assert client.send(b"abc").answer().body == b"abc"
        assert client.send(get("/")).answer().status == 200


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


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
def test_the_request_that_runs_learns_that_its_client_went_with_requests_behind_it(
    at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told: queue.Queue[str] = queue.Queue()

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        told.put(f"{scope['path']} runs")
        while (await receive())["type"] != "http.disconnect":
            pass
        await echo(scope, receive, send)
        told.put(f"{scope['path']} is left")

    with served(waiting) as server:
        with RawClient(server.url) as client:
            behind = post("/behind", 2) + post("/last", 3)
            client.send(post("/first", 1) + (behind if at_once else b""))
            assert told.get(timeout=SECONDS) == "/first runs"
            if not at_once:
                client.send(behind)
        assert told.get(timeout=SECONDS) == "/first is left"
    assert told.empty()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


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
    """The body's bytes come often enough that the client is never silent."""
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


def test_a_client_is_not_blamed_for_a_head_that_the_server_does_not_read() -> None:
    arrived = threading.Event()

    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            arrived.set()
            await asyncio.sleep(1)  # two periods
        await echo(scope, receive, send)

    requests = post("/slow", 0) + post("/", 1) * 8
    with served(late, head_timeout=0.5) as server, RawClient(server.url) as client:
        client.send(requests[:-50])
        assert arrived.wait(SECONDS)
        client.send(requests[-50:])
        assert [client.answer().status for _ in range(9)] == [200] * 9


def test_a_refused_client_that_takes_nothing_of_what_it_is_owed_is_dropped() -> None:
    loops: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001 - ASGI's signature
        loops.put(asyncio.get_running_loop())
        body = bytes(64 << 20)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    with served(large) as server, RawClient(server.url) as client:
        client.send(get("/") + b"nonsense\r\n\r\n")
        gone = server.open_connections.none_left.wait()
        asyncio.run_coroutine_threadsafe(gone, loops.get(timeout=SECONDS)).result(SECONDS)


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
