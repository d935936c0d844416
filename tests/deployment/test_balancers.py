"""Two servers behind the nginx.conf and the haproxy.cfg that docker/ ships: what passes through, and how."""

from __future__ import annotations

import contextlib
import itertools
import json
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from balancers import KINDS, Balancer, Kind, balancing
from byte_model import save_byte_model
from live_server import free_port
from raw_http import SECONDS, RawClient, get, post
from recording_server import RecordingServer, recording
from replicas import Replica, two_replicas

pytestmark = [pytest.mark.deployments, pytest.mark.timeout(900)]

COMPLETIONS = "/v1/completions"
SHORT = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

Balancers = dict[str, Balancer]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Replica]]:
    directory = tmp_path_factory.mktemp("replicas")
    with two_replicas(directory, save_byte_model(directory / "model")) as both:
        yield both


@pytest.fixture(scope="module")
def balancers(
    replicas: tuple[Replica, Replica], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Balancers]:
    """Run each balancer in front of the same two replicas."""
    addresses = (replicas[0].address, replicas[1].address)
    with contextlib.ExitStack() as opened:
        yield {
            kind: opened.enter_context(balancing(kind, tmp_path_factory.mktemp(kind) / "run", addresses))
            for kind in KINDS
        }


@pytest.fixture(params=KINDS)
def balancer(request: pytest.FixtureRequest, balancers: Balancers) -> Balancer:
    return balancers[request.param]


@contextlib.contextmanager
def held(*replicas: Replica) -> Iterator[None]:
    """Let the engines compute nothing, but the steps that are allowed."""
    for replica in replicas:
        replica.hold()
    try:
        yield
    finally:
        for replica in replicas:
            replica.release()


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error object of an answer."""
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_each_token_arrives_before_the_next_is_computed(
    balancer: Balancer, replicas: tuple[Replica, Replica]
) -> None:
    with held(*replicas), httpx.Client(timeout=SECONDS) as client:
        for replica in replicas:
            replica.allow_step()
        # A row with each token, since tokens without text alone send no event.
        body = {**SHORT, "max_tokens": 4, "stream": True, "return_logits": {"top_k": 1}}
        with client.stream("POST", balancer.url + COMPLETIONS, json=body) as answer:
            events = (line for line in answer.iter_lines() if line.startswith("data: {"))
            for _ in range(4):
                assert json.loads(next(events).removeprefix("data: "))["choices"]
                for replica in replicas:
                    replica.allow_step()


def test_each_arrow_batch_arrives_before_the_next_is_computed(
    balancer: Balancer, replicas: tuple[Replica, Replica]
) -> None:
    class Body:
        """The bytes of an answer as a file that returns what has come."""

        closed = False

        def __init__(self, answer: httpx.Response) -> None:
            self._chunks = answer.iter_raw()
            self._rest = b""

        def read(self, size: int) -> bytes:
            while len(self._rest) < size and (chunk := next(self._chunks, b"")):
                self._rest += chunk
            taken, self._rest = self._rest[:size], self._rest[size:]
            return taken

    with held(*replicas), httpx.Client(timeout=SECONDS) as client:
        for replica in replicas:
            replica.allow_step()
        body = {
            "input": [5, 6, 7],
            "max_tokens": 4,
            "positions": "generated",
            "temperature": 0,
            "ignore_eos": True,
        }
        with client.stream("POST", f"{balancer.url}/v1/logits", json=body) as answer:
            batches = pa.ipc.open_stream(pa.PythonFile(Body(answer), mode="r"))
            for _ in range(4):
                assert batches.read_next_batch().num_rows == 1
                for replica in replicas:
                    replica.allow_step()


@contextlib.contextmanager
def steps(*replicas: Replica) -> Iterator[None]:
    """Allow held engines one step after the other."""
    over = threading.Event()

    def allow() -> None:
        while not over.wait(0.01):
            for replica in replicas:
                replica.allow_step()

    thread = threading.Thread(target=allow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_requests_without_a_conversation_go_where_fewest_run(
    balancer: Balancer, replicas: tuple[Replica, Replica]
) -> None:
    names = [f"fewest-{balancer.kind}-{index}" for index in range(4)]
    body = {**SHORT, "max_tokens": 1500, "stream": True, "return_logits": {"top_k": 1}}
    with held(*replicas), contextlib.ExitStack() as opened:
        for name in names:
            client = opened.enter_context(RawClient(balancer.url))
            with steps(*replicas):
                client.send(post(COMPLETIONS, body, f"x-request-id: {name}")).head()
    counts = Counter(balancer.logged(name)["upstream"] for name in names)
    assert sorted(counts.values()) == [2, 2]


def test_a_conversation_stays_on_one_replica(balancer: Balancer) -> None:
    used: dict[int, set[str]] = {}
    with httpx.Client(base_url=balancer.url, timeout=SECONDS) as client:
        for conversation, turn in itertools.product(range(12), range(3)):
            name = f"conversation-{balancer.kind}-{conversation}-{turn}"
            headers = {"x-conversation-id": f"talk {conversation}", "x-request-id": name}
            assert client.post(COMPLETIONS, json=SHORT, headers=headers).status_code == 200
            used.setdefault(conversation, set()).add(balancer.logged(name)["upstream"])
    assert all(len(upstreams) == 1 for upstreams in used.values())
    assert len(set.union(*used.values())) == 2


@pytest.mark.parametrize(
    "given", [None, "request-7.a:b_c", "two words", "x" * 65, "ok, two words", "two words, ok", 'ok, x"y']
)
def test_a_request_has_one_id_everywhere(
    balancer: Balancer, replicas: tuple[Replica, Replica], given: str | None
) -> None:
    headers = {"traceparent": TRACE, **({} if given is None else {"x-request-id": given})}
    answer = httpx.post(f"{balancer.url}{COMPLETIONS}?secret=1", json=SHORT, headers=headers, timeout=SECONDS)
    (name,) = answer.headers.get_list("x-request-id")
    assert (name == given) == (given == "request-7.a:b_c")
    entry = balancer.logged(name)
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", COMPLETIONS, 200)
    assert (entry["traceparent"], entry["client"]) == (TRACE, "127.0.0.1")
    assert "secret" not in json.dumps(entry)
    deadline = time.monotonic() + SECONDS
    while not any(replica.has_logged(name) for replica in replicas):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [(COMPLETIONS, {**SHORT, "max_tokens": -1}, 400), ("/v1/nothing", {}, 404), ("/v1/models", {}, 405)],
)
def test_errors_of_the_servers_pass_unchanged(
    balancer: Balancer, replicas: tuple[Replica, Replica], path: str, body: dict[str, Any], status: int
) -> None:
    direct, passed = (
        httpx.post(url + path, json=body, timeout=SECONDS) for url in (replicas[0].url, balancer.url)
    )
    assert passed.status_code == direct.status_code == status
    assert passed.content == direct.content
    assert error_of(passed)


def test_a_body_that_is_too_large_is_refused_with_an_error_object(balancer: Balancer) -> None:
    answer = httpx.post(
        balancer.url + COMPLETIONS,
        content=b" " * (9 << 20),
        headers={"x-request-id": "large"},
        timeout=SECONDS,
    )
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")
    assert "load balancer" in error_of(answer)["message"]
    assert answer.headers["x-request-id"] == "large"


def test_a_body_in_chunks_that_is_too_large_is_refused_with_an_error_object(balancer: Balancer) -> None:
    answer = httpx.post(balancer.url + COMPLETIONS, content=iter([b" " * (3 << 20)] * 3), timeout=SECONDS)
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")


def test_what_is_no_http_is_refused_by_nginx_with_an_error_object(balancers: Balancers) -> None:
    with RawClient(balancers["nginx"].url) as client:
        answer = client.send(b"GET / HTTP/1.1\r\nno header\r\n\r\n" * 2).answer()
    assert (answer.status, answer.error["code"]) == (400, "bad_request")


def test_headers_that_are_too_large_are_refused_by_nginx_with_an_error_object(balancers: Balancers) -> None:
    with RawClient(balancers["nginx"].url) as client:
        answer = client.send(get("/health", "x: " + "y" * 40_000)).answer()
    assert (answer.status, answer.error["code"]) == (431, "headers_too_large")


def test_paths_of_nginxs_own_are_unknown_to_clients(balancers: Balancers) -> None:
    answer = httpx.get(f"{balancers['nginx'].url}/.error/400")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    assert request_id_of(answer)


def test_metrics_are_not_offered(balancer: Balancer) -> None:
    answer = httpx.get(f"{balancer.url}/metrics")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


@pytest.fixture(params=KINDS)
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Balancer, RecordingServer]]:
    """Run a balancer whose two replicas are one server that records requests."""
    with (
        recording("answers") as server,
        balancing(request.param, tmp_path / "run", (server.address, server.address)) as balancer,
    ):
        yield balancer, server


def test_headers_reach_the_servers_as_they_need_them(recorded: tuple[Balancer, RecordingServer]) -> None:
    balancer, server = recorded
    headers = {
        "x-forwarded-for": "1.2.3.4",
        "traceparent": TRACE,
        "authorization": "Bearer key",
        "host": "api:8443",
    }
    assert httpx.post(balancer.url, json={}, headers=headers).status_code == 200
    (head,) = server.heads
    assert head["host"] == "api:8443"
    assert head.get_all("x-forwarded-for") == ["127.0.0.1"]
    assert head["x-forwarded-proto"] == "http"
    assert (head["traceparent"], head["authorization"]) == (TRACE, "Bearer key")
    assert head["connection"] == "close"
    assert len(head["x-request-id"]) >= 32


@pytest.mark.parametrize("protocol", ["websocket", "WebSocket", "h2c"])
def test_only_websockets_may_upgrade(recorded: tuple[Balancer, RecordingServer], protocol: str) -> None:
    balancer, server = recorded
    with RawClient(balancer.url) as client:
        websocket = ("sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==")
        asked = get("/", f"upgrade: {protocol}", "connection: upgrade", *websocket)
        assert client.send(asked).answer().status == 200
    (head,) = server.heads
    is_websocket = protocol.lower() == "websocket"
    assert (head["upgrade"] is not None) == is_websocket
    assert (head["connection"].lower() == "upgrade") == is_websocket


def request_id_of(answer: httpx.Response) -> str:
    (name,) = answer.headers.get_list("x-request-id")
    return str(name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_was_sent_is_not_sent_again(kind: Kind, tmp_path: Path) -> None:
    """The server may have computed it, so that another would compute it twice."""
    with recording("ends") as one, recording("ends") as two:
        with balancing(kind, tmp_path / "run", (one.address, two.address)) as balancer:
            answer = httpx.post(balancer.url + COMPLETIONS, json=SHORT, timeout=SECONDS)
            assert balancer.logged(request_id_of(answer))["status"] == 502
        assert (answer.status_code, error_of(answer)["code"]) == (502, "bad_gateway")
        assert len(one.heads) + len(two.heads) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_does_not_begin_in_time_is_an_error_that_clients_do_not_retry(
    kind: Kind, tmp_path: Path
) -> None:
    timeout = {
        "proxy_read_timeout    3600s": "proxy_read_timeout 1s",
        "timeout server 3600s": "timeout server 1s",
    }
    changes = {old: new for old, new in timeout.items() if old.startswith("proxy") == (kind == "nginx")}
    with recording("is silent") as one, recording("is silent") as two:
        with balancing(kind, tmp_path / "run", (one.address, two.address), changes) as balancer:
            answer = httpx.post(balancer.url + COMPLETIONS, json=SHORT, timeout=SECONDS)
            assert balancer.logged(request_id_of(answer))["status"] == 504
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        assert len(one.heads) + len(two.heads) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_without_replicas_the_answer_is_an_error_object(kind: Kind, tmp_path: Path) -> None:
    addresses = (f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")
    with balancing(kind, tmp_path / "run", addresses) as balancer:
        for headers in ({}, {"x-conversation-id": "one"}):
            answer = httpx.post(
                f"{balancer.url}{COMPLETIONS}?secret=1", json=SHORT, headers=headers, timeout=SECONDS
            )
            assert answer.status_code == (502 if kind == "nginx" else 503)
            assert error_of(answer)["type"] == "server_error"
            assert balancer.logged(request_id_of(answer))["path"] == COMPLETIONS
        assert "secret" not in balancer.messages()


def test_nginx_speaks_tls_where_the_lines_for_it_are_taken_in(
    replicas: tuple[Replica, Replica], tmp_path: Path
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    port = free_port()
    changes = {
        "#tls ": "",
        "listen 8443": f"listen 127.0.0.1:{port}",
        "/etc/nginx/tls/certificate.pem": str(certificate),
        "/etc/nginx/tls/key.pem": str(key),
    }
    addresses = (replicas[0].address, replicas[1].address)
    trusted = ssl.create_default_context(cafile=str(certificate))
    with (
        balancing("nginx", tmp_path / "run", addresses, changes),
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=SECONDS) as client,
    ):
        assert client.post(COMPLETIONS, json=SHORT).status_code == 200
        plain = httpx.get(f"http://127.0.0.1:{port}/health")
    assert (plain.status_code, error_of(plain)["code"]) == (400, "bad_request")
