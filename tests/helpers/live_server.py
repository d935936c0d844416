"""A ``logitserve serve`` process, started as a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

START_SECONDS = 180
STOP_SECONDS = 60


@dataclass(frozen=True)
class LiveServer:
    """A server process that was ready after its start."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with httpx.Client(timeout=5) as client:
            while time.monotonic() < deadline:
                assert self.process.poll() is None, f"the server ended:\n{self.tail()}"
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/ready").status_code == 200:
                        return
                time.sleep(0.05)
        pytest.fail(f"the server was not ready within {seconds} s:\n{self.tail()}")

    async def logged(self, request_id: str) -> dict[str, Any]:
        """Return the log line of a request, once the request is over."""
        async with asyncio.timeout(30):
            while True:
                for line in self.log.read_text().splitlines():
                    if f'"request_id":"{request_id}"' in line:
                        entry: dict[str, Any] = json.loads(line)
                        return entry
                await asyncio.sleep(0.02)

    def tail(self) -> str:
        return self.log.read_text()[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    log: Path,
    *arguments: str,
    program: Sequence[str] = ("-m", "logitserve"),
    port: int | None = None,
    env: Mapping[str, str] | None = None,
) -> LiveServer:
    """Start a server on ``port`` or a free one. Its lines are appended to ``log``."""
    port = free_port() if port is None else port
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *program, "serve", "--port", str(port), *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
    return LiveServer(f"http://127.0.0.1:{port}", process, log)


@contextlib.contextmanager
def serving(
    log: Path, *arguments: str, program: Sequence[str] = ("-m", "logitserve")
) -> Iterator[LiveServer]:
    """Run a server with these arguments and wait until it is ready.

    ``program`` is what Python runs, with the same arguments as ``logitserve``.
    A server that still runs at the end gets SIGTERM and must exit with 0.
    """
    server = start(log, *arguments, program=program)
    process = server.process
    try:
        server.wait_ready(START_SECONDS)
        yield server
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=STOP_SECONDS) == 0, server.tail()
    finally:
        process.kill()
        process.wait()
