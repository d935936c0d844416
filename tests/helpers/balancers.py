"""Debian's nginx and haproxy with the configurations that docker/ ships."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from live_server import free_port
from raw_http import SECONDS
from render_balancer import render

Kind = Literal["nginx", "haproxy"]
KINDS: tuple[Kind, ...] = ("nginx", "haproxy")
SERVER_STATE = re.compile(r"^Server replicas/(\S+) is (UP|DOWN)", re.MULTILINE)


@dataclass(frozen=True)
class Balancer:
    """A balancer that listens."""

    kind: Kind
    url: str
    directory: Path

    def logged(self, request_id: str) -> dict[str, Any]:
        """Return the line that the balancer wrote at a request's end, once it is there."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for line in (self.directory / "access.log").read_text().splitlines():
                if f'"request_id":"{request_id}"' in line:
                    entry: dict[str, Any] = json.loads(line)
                    return entry
            time.sleep(0.01)
        pytest.fail(f"{self.kind} logged no request {request_id}")

    def retried(self) -> list[dict[str, Any]]:
        """Return what nginx wrote of requests that it tried at more than one replica."""
        lines = (self.directory / "access.log").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if ", " in entry["upstream"]]

    def messages(self) -> str:
        """Return what it wrote elsewhere than in its access log."""
        return (self.directory / "errors.log").read_text()

    def wait_all_up(self) -> None:
        """Wait until no replica counts as down. nginx, which checks none, never takes one for down."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if all(state == "UP" for state in self._states().values()):
                return
            time.sleep(0.01)
        pytest.fail(f"{self.kind} takes a replica for down: {self._states()}")

    def _states(self) -> dict[str, str]:
        """Return the last state that haproxy's checks logged of each server, by its name. At first all are up."""
        return dict(SERVER_STATE.findall((self.directory / "access.log").read_text()))


@contextlib.contextmanager
def balancing(
    kind: Kind, directory: Path, replicas: tuple[str, str], changes: Mapping[str, str] | None = None
) -> Iterator[Balancer]:
    """Run a balancer in front of ``replicas``, each ``host:port``; ``changes`` is that of `render`."""
    directory.mkdir(parents=True)
    address = ("127.0.0.1", free_port())
    listen = f"{address[0]}:{address[1]}"
    written = render(kind, listen=listen, replicas=replicas, directory=directory, changes=changes)
    with (directory / "access.log").open("ab") as log, (directory / "errors.log").open("wb") as errors:
        process = subprocess.Popen(_command(kind, written), stdout=log, stderr=errors)
    try:
        _wait_listening(process, address, directory / "errors.log")
        yield Balancer(kind, f"http://{listen}", directory)
    finally:
        process.terminate()
        process.wait(SECONDS)


def _command(kind: Kind, written: Path) -> list[str]:
    if kind == "haproxy":
        return ["haproxy", "-f", str(written)]
    # Tests may run as root, and nginx's workers then as a user who may not write into the tests' directory.
    user = "user root; " if os.geteuid() == 0 else ""
    return ["nginx", "-e", "stderr", "-c", str(written), "-g", f"{user}daemon off;"]


def _wait_listening(process: subprocess.Popen[bytes], address: tuple[str, int], errors: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, errors.read_text()
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(address, SECONDS).close()
            return
        time.sleep(0.01)
    pytest.fail(f"the balancer does not listen:\n{errors.read_text()}")
