"""The processes of a soak: replicas that can be restarted, nginx before them, and what they are measured by."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from http_load import HEAD_END, wait_until_ready
from prometheus_client.parser import text_string_to_metric_families
from soak_load import Address, closing

RENDER = Path(__file__).parents[1] / "docker" / "render_balancer.py"
STOP_SECONDS = 120

GAUGES = (
    "logitserve:kv_blocks_used",
    "logitserve:kv_blocks",
    "logitserve:held_bytes",
    "logitserve:requests_in_flight",
)
COUNTERS = ("vllm:num_preemptions_total", "logitserve:requests_aborted_total", "vllm:generation_tokens_total")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Life:
    """Samples of one process: seconds since the beginning, resident and proportional bytes, and open descriptors."""

    replica: int
    role: str
    pid: int
    seconds: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    pss: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"replica {self.replica} {self.role}"


class Replica:
    """A server on a port of its own, with its engine."""

    def __init__(self, number: int, options: list[str], log: Path) -> None:
        self.number = number
        self.address: Address = ("127.0.0.1", free_port())
        self.lives: list[Life] = []
        self.metrics: dict[str, list[float]] = {name: [] for name in ("seconds", *GAUGES, *COUNTERS)}
        self.is_up = False
        self._log = log
        flags = ["--port", str(self.address[1]), "--log-level", "warning", "--log-format", "json"]
        self._command = [sys.executable, "-m", "logitserve", "serve", *options, *flags]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def start(self) -> None:
        """Start the server, wait until it is ready, and begin a life for it and one for its engine."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stderr=log)
        wait_until_ready(self.url, self._process)
        (engine,) = (
            child
            for child in psutil.Process(self._process.pid).children()
            if "logitengine.process" in child.cmdline()
        )
        self.lives += [
            Life(self.number, "server", self._process.pid),
            Life(self.number, "engine", engine.pid),
        ]
        self.is_up = True

    def stop(self) -> None:
        """Send SIGTERM and wait until what runs is served. Raises SystemExit unless the exit code is 0."""
        self.is_up = False
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise SystemExit(f"replica {self.number} did not stop within {STOP_SECONDS} s") from None
        self._process = None
        if code != 0:
            raise SystemExit(f"replica {self.number} ended with exit code {code}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def current(self) -> list[Life]:
        """The lives of the processes that run."""
        return self.lives[-2:] if self.is_up else []

    def sample(self, seconds: float) -> None:
        for life in self.current:
            with contextlib.suppress(psutil.NoSuchProcess):  # a restart has just begun
                process = psutil.Process(life.pid)
                memory = process.memory_full_info()
                descriptors = process.num_fds()
                life.seconds.append(seconds)
                life.rss.append(memory.rss)
                life.pss.append(memory.pss)
                life.descriptors.append(descriptors)

    def descriptors(self) -> dict[int, int]:
        """Return the number of open descriptors by process id."""
        return {life.pid: psutil.Process(life.pid).num_fds() for life in self.current}

    async def sample_metrics(self, seconds: float) -> None:
        """Note the sums of some metrics; nothing while the server is down."""
        with (
            contextlib.suppress(OSError),
            closing(await asyncio.open_connection(*self.address)) as (reader, writer),
        ):
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            text = (await reader.read()).partition(HEAD_END)[2].decode()
            for name, value in {"seconds": seconds, **sums(text)}.items():
                self.metrics[name].append(value)

    def log_lines(self) -> list[str]:
        """Return warnings and errors that the server and its engine logged."""
        lines = []
        for line in self._log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                lines.append(f"replica {self.number}: {entry['level']}: {entry['message']}")
                continue
            lines.append(f"replica {self.number}: {line}")
        return lines


def sums(text: str) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys((*GAUGES, *COUNTERS), 0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in found:
                found[sample.name] += int(sample.value)
    return found


@contextlib.contextmanager
def nginx(replicas: list[Replica], folder: Path) -> Iterator[Address]:
    """Run nginx with the shipped configuration before two replicas."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise SystemExit("nginx is not installed; --balancer none does without")
    folder.chmod(0o755)  # nginx's workers have a user of their own
    address: Address = ("127.0.0.1", free_port())
    replica_flags = [
        flag for replica in replicas for flag in ("--replica", f"127.0.0.1:{replica.address[1]}")
    ]
    listen = f"{address[0]}:{address[1]}"
    subprocess.run(
        [
            sys.executable,
            str(RENDER),
            "nginx",
            "--listen",
            listen,
            "--directory",
            str(folder),
            *replica_flags,
        ],
        check=True,
    )
    with (folder / "nginx.log").open("wb") as log:
        command = [program, "-c", str(folder / "nginx.conf"), "-g", "daemon off;"]
        process = subprocess.Popen(command, stderr=log)
    try:
        wait_until_listening(address, process)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def wait_until_listening(address: Address, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(address):
            return
        time.sleep(0.05)
    raise SystemExit("nginx does not listen")
