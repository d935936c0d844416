"""Bodies that are refused before they are read, over a real connection: the client still reads the reason."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

COMPLETIONS = "/v1/completions"
PIECE = b"a" * 65536
NUM_PIECES = 1000
LENGTH = NUM_PIECES * len(PIECE)
SECONDS = 60


def pieces(count: int = NUM_PIECES) -> Iterator[bytes]:
    """Yield the pieces of a body, by default of 65 MB. The server's limit is 8 MiB."""
    for _ in range(count):
        yield PIECE


def post(url: str, body: Iterable[bytes], headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
    """Send the whole body by urllib, and return status, headers and error object."""
    request = urllib.request.Request(  # noqa: S310 - the address of the tests' own server
        url, data=body, headers={"content-type": "application/json", **headers}, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=SECONDS)  # noqa: S310
    with caught.value as answer:
        return answer.code, dict(answer.headers), json.load(answer)["error"]


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    return socket.create_connection((address.hostname, address.port), timeout=SECONDS)


@pytest.mark.parametrize("headers", [{"content-length": str(LENGTH)}, {}], ids=["declared length", "chunked"])
def test_urllib_reads_why_its_body_was_refused(tiny_url: str, headers: dict[str, str]) -> None:
    status, answered, error = post(tiny_url + COMPLETIONS, pieces(), headers)
    assert (status, error["code"]) == (413, "request_too_large")
    assert answered["connection"] == "close"


def test_urllib_reads_why_a_request_was_refused_whose_body_is_not_too_long(tiny_url: str) -> None:
    status, _, error = post(f"{tiny_url}/nope", pieces(100), {"content-length": str(100 * len(PIECE))})
    assert (status, error["code"]) == (404, "not_found")


def test_the_answer_does_not_wait_for_the_body_and_the_connection_is_closed_after_it(tiny_url: str) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {LENGTH}\r\n\r\n"
    with connect(tiny_url) as connection:
        connection.sendall(head.encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.status == 413
        assert json.loads(answer.read())["error"]["code"] == "request_too_large"
        for piece in pieces():
            connection.sendall(piece)
        assert connection.recv(1) == b""


def test_a_client_that_expects_100_continue_gets_the_refusal_at_once(tiny_url: str) -> None:
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {10**12}\r\n\r\n"
    with connect(tiny_url) as connection, connection.makefile("rb") as lines:
        connection.sendall(head.encode())
        assert lines.readline().startswith(b"HTTP/1.1 413 ")


def test_a_refusal_before_a_body_that_is_not_too_long_keeps_the_connection(tiny_url: str) -> None:
    address = urlsplit(tiny_url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=SECONDS)
    try:
        connection.request("POST", "/nope", body=PIECE * 16)
        refused = connection.getresponse()
        refused.read()
        open_socket = connection.sock
        connection.request("GET", "/health")
        assert (refused.status, connection.getresponse().status) == (404, 200)
        assert connection.sock is open_socket
    finally:
        connection.close()
