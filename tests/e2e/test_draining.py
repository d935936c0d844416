"""SIGTERM: no accepted request is lost, and later clients are refused a connection."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from live_server import LiveServer, serving
from raw_http import SECONDS, RawClient, get, post

pytestmark = pytest.mark.attacks

COMPLETIONS = "/v1/completions"
SHORT = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
HUGE = {**SHORT, "max_tokens": 120, "stream": True, "return_logits": True}
"""A stream of 16 MB, which a connection with a small receive buffer does not take in unread. So it runs until its client reads on."""


@contextlib.contextmanager
def server(tiny_llama: Path, tmp_path: Path, *options: str) -> Iterator[LiveServer]:
    log = tmp_path / "server.log"
    fixed = ("--dtype", "float32", "--num-threads", "1", "--write-timeout", "1000")
    with serving(log, str(tiny_llama), *fixed, *options) as live:
        yield live


def huge_stream(live: LiveServer) -> RawClient:
    client = RawClient(live.url, receive_buffer=1 << 16).send(post(COMPLETIONS, HUGE))
    assert client.socket.recv(9, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 "
    return client


def wait_refused(url: str) -> None:
    """Connect until connections are refused. Accepted ones stay silent."""
    address = (urlsplit(url).hostname, urlsplit(url).port)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=SECONDS).close()
        except ConnectionRefusedError:
            return
    pytest.fail("the server still listens")


def test_whoever_has_connected_is_answered_and_whoever_comes_later_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with server(tiny_llama, tmp_path, "--drain-timeout", "1000") as live:
        with huge_stream(live) as stream, RawClient(live.url) as idle, RawClient(live.url) as slow:
            assert idle.send(get("/health")).answer().headers.get("connection") != "close"
            request = post(COMPLETIONS, SHORT)
            slow.send(request[:30])
            live.process.send_signal(signal.SIGTERM)
            wait_refused(live.url)
            assert idle.is_closed()
            answer = slow.send(request[30:]).answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert slow.is_closed()
            assert live.process.poll() is None
            assert stream.answer().body.endswith(b"data: [DONE]\n\n")
            assert stream.is_closed()
        assert live.process.wait(timeout=SECONDS) == 0


def test_requests_are_served_during_the_delay_and_a_second_signal_ends_everything(
    tiny_llama: Path, tmp_path: Path
) -> None:
    options = ("--drain-delay", "1000", "--drain-timeout", "1000")
    with server(tiny_llama, tmp_path, *options) as live, huge_stream(live) as stream:
        with RawClient(live.url) as kept:
            assert kept.send(post(COMPLETIONS, SHORT)).answer().status == 200
            live.process.send_signal(signal.SIGTERM)
            ready = 200
            while ready == 200:
                with RawClient(live.url) as balancer:
                    ready = balancer.send(get("/ready")).answer().status
            with RawClient(live.url) as late:
                for client in (kept, late):
                    answer = client.send(post(COMPLETIONS, SHORT)).answer()
                    assert (answer.status, answer.headers["connection"]) == (200, "close")
                    assert client.is_closed()
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(timeout=SECONDS) == 0
        with contextlib.suppress(ConnectionResetError):
            assert b"[DONE]" not in stream.rest()


def test_two_signals_in_a_row_end_the_server_without_an_error_in_its_log(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The second comes while the listeners' backlog is awaited."""
    with server(tiny_llama, tmp_path) as live:
        live.process.send_signal(signal.SIGTERM)
        while '"draining"' not in live.log.read_text():
            time.sleep(0.001)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(timeout=SECONDS) == 0
        log = live.log.read_text()
    assert "Traceback" not in log
    assert '"level":"error"' not in log


def test_what_runs_after_the_drain_timeout_ends_with_an_error_that_its_client_reads(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with server(tiny_llama, tmp_path, "--drain-timeout", "0.1") as live:
        with huge_stream(live) as stream:
            live.process.send_signal(signal.SIGTERM)
            while "still running after the drain timeout" not in live.log.read_text():
                time.sleep(0.01)
            events = stream.answer().body.split(b"\n\n")
        error = json.loads(events[-2].removeprefix(b"data: "))["error"]
        assert error["type"] == "server_error"
        assert live.process.wait(timeout=SECONDS) == 0


class Visitors:
    """Clients that send requests until they are refused a connection.

    Some keep their connections as long as they may.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._answered = threading.Semaphore(0)
        self.faults: list[Exception] = []
        self._threads = [threading.Thread(target=self._visit, args=(index % 2 == 0,)) for index in range(12)]
        for thread in self._threads:
            thread.start()

    def wait_answered(self, count: int) -> None:
        for _ in range(count):
            assert self._answered.acquire(timeout=SECONDS)

    def wait_refused(self) -> None:
        for thread in self._threads:
            thread.join()

    def _visit(self, stays: bool) -> None:
        try:
            while True:
                with RawClient(self._url) as client:
                    while self._ask(client) and stays:
                        pass
        except ConnectionRefusedError:
            return
        except Exception as fault:  # noqa: BLE001 - the test's own thread shows it
            self.faults.append(fault)

    def _ask(self, client: RawClient) -> bool:
        """Return whether the connection may be used again."""
        answer = client.send(post("/tokenize", {"prompt": "a b c"})).answer()
        assert answer.status == 200
        self._answered.release()
        return answer.headers.get("connection") != "close"


def test_a_restart_under_load_loses_no_request(tiny_llama: Path, tmp_path: Path) -> None:
    """Each client reads its answer or is refused a connection, so a balancer can try another server."""
    with server(tiny_llama, tmp_path, "--drain-timeout", "1000") as live:
        visitors = Visitors(live.url)
        visitors.wait_answered(200)
        live.process.send_signal(signal.SIGTERM)
        visitors.wait_refused()
        assert visitors.faults == []
        assert live.process.wait(timeout=SECONDS) == 0
