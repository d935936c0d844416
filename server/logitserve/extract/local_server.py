"""``logitserve serve`` as a child: started for one extraction, and gone with it however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
from logitengine.config import EngineConfig

from logitserve.config import ENV_PREFIX
from logitserve.extract.errors import ExtractError

STOP_SECONDS = 20
POLL_SECONDS = 0.1
ENDLESS = 1 << 62
"""The child's one client writes what it reads: how much it asks for in all is bounded by its disk."""


@dataclass(frozen=True)
class LocalServer:
    """A child that was ready once."""

    url: str
    api_key: str
    process: asyncio.subprocess.Process
    log: Path

    async def watch(self) -> None:
        """Wait for the child's end, which is an error while work is left. Raises ExtractError."""
        await self.process.wait()
        raise self._ended()

    async def wait_ready(self) -> None:
        """Raises ExtractError where the model cannot be loaded."""
        async with httpx.AsyncClient(trust_env=False) as client:
            while self.process.returncode is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{self.url}/ready")).is_success:
                        return
                await asyncio.sleep(POLL_SECONDS)
        raise self._ended()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not help."""
        if self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    def _ended(self) -> ExtractError:
        lines = self.log.read_text(errors="replace").splitlines()[-5:]
        return ExtractError("\n".join([f"the server ended with {self.process.returncode}:", *lines]))


@contextlib.asynccontextmanager
async def local_server(engine_config: EngineConfig, log: Path) -> AsyncIterator[LocalServer]:
    """A ready server on a free loopback port, with a key of its own. Raises ExtractError."""
    port, api_key = _free_port(), secrets.token_urlsafe(32)
    options: dict[str, object] = {
        **engine_config.model_dump(mode="json", exclude_unset=True, exclude={"model"}),
        "api_key": api_key,
        "host": "127.0.0.1",
        "port": port,
        "drain_timeout": 0,
        "log_level": "warning",
        "max_answer_bytes": ENDLESS,
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "logitserve.extract.guarded_serve",
            engine_config.model,
            # Never written to: its end tells the child that this process has ended, killed or not.
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env=_environment(options),
            # Ctrl-C is for the parent, which then stops the child.
            start_new_session=True,
        )
    server = LocalServer(f"http://127.0.0.1:{port}", api_key, process, log)
    try:
        await server.wait_ready()
        yield server
    finally:
        await server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(options: Mapping[str, object]) -> dict[str, str]:
    """Options as the variables that ``logitserve serve`` reads. Everyone may read a command line; the key is not there."""
    variables = {
        f"{ENV_PREFIX}{name.upper()}": value if isinstance(value, str) else orjson.dumps(value).decode()
        for name, value in options.items()
    }
    return {**os.environ, **variables}
