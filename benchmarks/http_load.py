"""Shared parts of the HTTP benchmarks: a server, prompts that no cache knows, and requests read as bare bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

READ_SIZE = 1 << 18
"""Bytes read at once, few enough to stay in a core's second-level cache."""

HEAD_END = b"\r\n\r\n"
TAIL_SIZE = 4096


@contextlib.contextmanager
def serving(model: str, options: list[str]) -> Iterator[str]:
    """Run a server on a free port until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "logitserve",
        "serve",
        model,
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    process = subprocess.Popen([*command, *options])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError),  # nobody listens yet, or the machine is busy
            urllib.request.urlopen(f"{url}/ready", timeout=5),  # noqa: S310 - our own loopback address
        ):
            return
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


@dataclass(frozen=True)
class Answer:
    """Size of the body on the wire, its last bytes, and the seconds to its first and to its last byte."""

    nbytes: int
    tail: bytes
    first_byte: float
    seconds: float

    @property
    def completion_tokens(self) -> int:
        """Number of tokens that the usage at the end of a JSON or SSE answer counts."""
        usage = self.tail[self.tail.rindex(b'"usage"') :]
        return int(usage.split(b'"completion_tokens":')[1].split(b",")[0].split(b"}")[0])


async def post(url: str, body: dict[str, Any]) -> Answer:
    """POST a JSON body and read the answer as fast as it arrives. A status other than 200 ends the benchmark.

    The client reads bare bytes on purpose, because it shares the cores with the server.
    """
    payload = json.dumps(body).encode()
    target = urlsplit(url)
    head = f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload
    if target.hostname is None:
        raise SystemExit(f"{url} names no host")
    loop = asyncio.get_running_loop()
    _, reading = await loop.create_connection(lambda: _Reading(request), target.hostname, target.port or 80)
    received = await reading.ended
    status = received.head.partition(b"\r\n")[0].decode(errors="replace")
    if " 200 " not in f"{status} ":
        raise SystemExit(f"{url} answered {status}: {received.tail.decode(errors='replace')}")
    return Answer(received.nbytes, received.tail, received.first_byte, received.seconds)


class _Reading(asyncio.BufferedProtocol):
    """Sends a request and receives its answer, every read into the same memory.

    ``ended`` resolves to the protocol itself once the server has closed. It then holds the answer's head and
    the parts of the body that `Answer` keeps.
    """

    def __init__(self, request: bytes) -> None:
        self.ended: asyncio.Future[_Reading] = asyncio.get_running_loop().create_future()
        self.head = self.tail = b""
        self.nbytes = 0
        self.first_byte = self.seconds = 0.0
        self._request = request
        self._space = memoryview(bytearray(READ_SIZE))
        self._started = time.perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        self.first_byte = self.first_byte or time.perf_counter() - self._started
        piece = self._space[:nbytes]
        if not self.head.endswith(HEAD_END):
            head, end, body = (self.head + bytes(piece)).partition(HEAD_END)
            self.head, piece = head + end, memoryview(body)
        self.nbytes += len(piece)
        self.tail = (self.tail + bytes(piece[-TAIL_SIZE:]))[-TAIL_SIZE:]

    def connection_lost(self, exc: Exception | None) -> None:
        self.seconds = time.perf_counter() - self._started
        if exc is None:
            self.ended.set_result(self)
        else:
            self.ended.set_exception(exc)


class RandomPrompts:
    """Prompts of random token ids, never the same twice in any run, so that no prefix cache can help."""

    def __init__(self) -> None:
        self._chooser = random.Random()  # noqa: S311 - prompts, not secrets

    def __call__(self, count: int, num_tokens: int) -> list[list[int]]:
        return [[self._chooser.randrange(100, 49000) for _ in range(num_tokens)] for _ in range(count)]


def greedy(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Return a request for exactly ``new_tokens`` tokens."""
    return {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "cpu": fields.get("model name"),
        "vectors": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16") if flag in flags],
    }
