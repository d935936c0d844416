"""Two servers of one model that can be stopped, killed and started again at their addresses."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import live_server
import psutil
from live_server import LiveServer, free_port

SERVER = Path(__file__).with_name("faulty_server.py")
OPTIONS = ("--dtype", "float32", "--num-threads", "1", "--listen-when-ready", "--drain-timeout", "60")


class Replica:
    """A server at a fixed address, whose engine obeys the files in ``faults`` (see faulty_process)."""

    def __init__(self, directory: Path, model: Path, *options: str) -> None:
        self.faults = directory / "faults"
        self.faults.mkdir(parents=True)
        self._log = directory / "server.log"
        self._arguments = (str(model), *OPTIONS, *options)
        self._port = free_port()
        self.server: LiveServer = self._start()

    @property
    def address(self) -> str:
        return urlsplit(self.server.url).netloc

    @property
    def url(self) -> str:
        return self.server.url

    def has_logged(self, request_id: str) -> bool:
        return f'"request_id":"{request_id}"' in self._log.read_text()

    @property
    def engine(self) -> psutil.Process:
        """Return the engine process that runs."""
        children = psutil.Process(self.server.process.pid).children()
        (engine,) = [child for child in children if "faulty_process" in " ".join(child.cmdline())]
        return engine

    def _start(self) -> LiveServer:
        return live_server.start(
            self._log,
            *self._arguments,
            program=(str(SERVER),),
            port=self._port,
            env={"LOGITSERVE_FAULTS": str(self.faults)},
        )

    def start(self) -> None:
        """Start it again and wait until it is ready."""
        self.server = self._start()
        self.wait_ready()

    def wait_ready(self) -> None:
        self.server.wait_ready(live_server.START_SECONDS)

    def stop(self) -> None:
        """Send SIGTERM and wait for the end, which must be a good one."""
        self.server.process.send_signal(signal.SIGTERM)
        assert self.server.process.wait(timeout=live_server.STOP_SECONDS) == 0, self.server.tail()

    def kill(self) -> None:
        """Kill the server. Its engine ends by itself."""
        self.server.process.kill()
        self.server.process.wait()

    def hold(self) -> None:
        """Let the engine compute nothing but the steps that `allow_step` allows."""
        (self.faults / "hold").touch()

    def allow_step(self) -> None:
        (self.faults / "allow").touch()

    def release(self) -> None:
        for name in ("allow", "hold"):
            (self.faults / name).unlink(missing_ok=True)

    def clean_up(self) -> None:
        """End what may still run, its stopped engine too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.server.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    os.kill(child.pid, signal.SIGKILL)
        self.kill()


@contextlib.contextmanager
def two_replicas(directory: Path, model: Path, *options: str) -> Iterator[tuple[Replica, Replica]]:
    """Run two replicas, which start at the same time and are ready when this is entered."""
    first = Replica(directory / "server-1", model, *options)
    second = Replica(directory / "server-2", model, *options)
    try:
        first.wait_ready()
        second.wait_ready()
        yield first, second
    finally:
        first.clean_up()
        second.clean_up()
