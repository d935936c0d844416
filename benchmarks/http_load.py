"""What the HTTP benchmarks share: a server of ours, prompts that no cache knows, and requests read as bare bytes."""

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
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

READ_SIZE = 1 << 20


@contextlib.contextmanager
def serving(model: str, options: list[str]) -> Iterator[str]:
    """A server of ours on a free port, ready."""
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
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(f"{url}/ready", timeout=5),  # noqa: S310 - our own loopback address
        ):
            return
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")


@dataclass(frozen=True)
class Answer:
    """``nbytes`` of the body as it travelled, its last bytes, and the seconds to its first and to its last byte."""

    nbytes: int
    tail: bytes
    first_byte: float
    seconds: float

    @property
    def completion_tokens(self) -> int:
        """What the usage at the end of a JSON or SSE answer counts."""
        usage = self.tail[self.tail.rindex(b'"usage"') :]
        return int(usage.split(b'"completion_tokens":')[1].split(b",")[0].split(b"}")[0])


async def post(url: str, body: dict[str, Any]) -> Answer:
    """POST a JSON body and read the answer as fast as it comes. Anything but 200 ends the benchmark.

    The reading is bare on purpose: the client shares the cores with the server.
    """
    payload = json.dumps(body).encode()
    target = urlsplit(url)
    reader, writer = await asyncio.open_connection(target.hostname, target.port, limit=READ_SIZE)
    head = f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n"
    started = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
    status = (await reader.readline()).decode(errors="replace").strip()
    first_byte = time.perf_counter() - started
    if " 200 " not in f"{status} ":
        raise SystemExit(f"{url} answered {status}: {(await reader.read(2000)).decode(errors='replace')}")
    nbytes, tail = 0, b""
    while piece := await reader.read(READ_SIZE):
        nbytes += len(piece)
        tail = (tail + piece)[-4096:]
    writer.close()
    return Answer(nbytes, tail, first_byte, time.perf_counter() - started)


class RandomPrompts:
    """Prompts of random token ids, never the same twice, in no run, so that no prefix cache can help."""

    def __init__(self) -> None:
        self._chooser = random.Random()  # noqa: S311 - prompts, not secrets

    def __call__(self, count: int, num_tokens: int) -> list[list[int]]:
        return [[self._chooser.randrange(100, 49000) for _ in range(num_tokens)] for _ in range(count)]


def greedy(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """A request for exactly ``new_tokens`` tokens."""
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
