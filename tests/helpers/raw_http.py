"""HTTP/1 spoken by hand, over a real socket, with nothing between the test and the bytes."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

SECONDS = 60
"""Longest time that a server may take for anything. Only a failing test waits that long."""


@dataclass(frozen=True)
class Answer:
    """One response. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        assert self.headers["content-type"] == "application/json"
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


class RawClient:
    """A connection to a server."""

    def __init__(self, url: str, receive_buffer: int | None = None) -> None:
        """Connect. The kernel takes little more than ``receive_buffer`` bytes ahead of the reader."""
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        with contextlib.ExitStack() as opened:
            self.socket = opened.enter_context(socket.socket())
            if receive_buffer is not None:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.settimeout(SECONDS)
            self.socket.connect((address.hostname, address.port))
            opened.pop_all()
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def head(self) -> Answer:
        """Read the head of a response."""
        line = self._file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers = http.client.parse_headers(self._file).items()
        return Answer(int(line.split()[1]), {name.lower(): value for name, value in headers}, b"")

    def answer(self) -> Answer:
        """Read one response with a length, or in chunks, and nothing of the next one."""
        head = self.head()
        if head.headers.get("transfer-encoding") == "chunked":
            body = self._chunks()
        else:
            body = self._file.read(int(head.headers["content-length"]))
        return Answer(head.status, head.headers, body)

    def rest(self) -> bytes:
        """Read to the end of the connection."""
        return self._file.read()

    def is_closed(self) -> bool:
        """Wait for the server's next byte or the end, and return whether the connection has ended."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._file.readline(), 16):
            body += self._file.read(size)
            assert self._file.readline() == b"\r\n"
        assert self._file.readline() == b"\r\n"
        return body


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode()


def post(path: str, document: object, *headers: str) -> bytes:
    body = json.dumps(document).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
