"""A server that keeps what reaches it: what a balancer sends, byte for byte, and how often."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from email.message import Message
from http.client import parse_headers
from typing import Literal

Behaviour = Literal["answers", "ends", "is silent"]


class RecordingServer(socketserver.ThreadingTCPServer):
    """Server that answers every request with 200, ends the connection, or says nothing.

    ``heads`` are the headers of all requests but probes.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.heads: list[Message] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.StreamRequestHandler):
    server: RecordingServer

    def handle(self) -> None:
        line = self.rfile.readline()
        head = parse_headers(self.rfile)
        self.rfile.read(int(head.get("content-length", 0)))
        is_probe = b" /ready " in line
        if line and not is_probe:
            self.server.heads.append(head)
        if is_probe or self.server.behaviour == "answers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        elif self.server.behaviour == "is silent":
            with contextlib.suppress(ConnectionResetError):
                self.rfile.read()  # until the balancer leaves
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def recording(behaviour: Behaviour) -> Iterator[RecordingServer]:
    with RecordingServer(behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
