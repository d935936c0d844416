"""A private server of an extraction: a child process that ends with the extraction, even a killed one."""

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
from logitserve.extract.errors import ExtractError, UsageError

STOP_SECONDS = 20
POLL_SECONDS = 0.1
ENDLESS = 1 << 62
"""No bound: the only client writes every row to its disk, so the disk is the bound."""


@dataclass(frozen=True)
class LocalServer:
    """A child process that serves, with its address and its key."""

    url: str
    api_key: str
    process: asyncio.subprocess.Process
    log: Path

    async def watch(self) -> None:
        """Wait for the child's end, and then raise ExtractError, because work was left."""
        await self.process.wait()
        raise self._ended()

    async def wait_ready(self) -> None:
        """Wait until the model is loaded. Raises ExtractError where it cannot be loaded, UsageError for its files."""
        async with httpx.AsyncClient(trust_env=False) as client:
            while self.process.returncode is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{self.url}/ready")).is_success:
                        return
                await asyncio.sleep(POLL_SECONDS)
        raise self._ended()

    async def stop(self) -> None:
        """Stop the child by SIGTERM, or by SIGKILL after STOP_SECONDS."""
        if self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()

    def _ended(self) -> ExtractError:
        status = self.process.returncode
        told = _last_error(self.log)
        if status == UsageError.exit_code:
            return UsageError(told.partition(": error: ")[2] or told)
        return ExtractError(f"the server ended with {status}: {told}")


@contextlib.asynccontextmanager
async def local_server(engine_config: EngineConfig, log: Path) -> AsyncIterator[LocalServer]:
    """Yield a ready server on a loopback port, with a key of its own. Raises ExtractError, or UsageError for the model."""
    with socket.socket() as listener:
        # Bound here while prompts are sent, so that no other process can take the port before the child, or
        # after it.
        listener.bind(("127.0.0.1", 0))
        server = await _start(engine_config, listener, log)
        try:
            await server.wait_ready()
            yield server
        finally:
            await server.stop()


async def _start(engine_config: EngineConfig, listener: socket.socket, log: Path) -> LocalServer:
    """Start the child, which alone listens on ``listener``."""
    api_key = secrets.token_urlsafe(32)
    options: dict[str, object] = {
        **engine_config.model_dump(mode="json", exclude_unset=True, exclude={"model"}),
        "api_key": api_key,
        "fd": listener.fileno(),
        "drain_timeout": 0,
        "log_level": "warning",
        "log_format": "json",
        "max_answer_bytes": ENDLESS,
        "max_stream_bytes": ENDLESS,
        "max_body_values": ENDLESS,
        "max_queued_requests": ENDLESS,
        "max_queued_tokens": ENDLESS,
        "queue_timeout": 0,
        "held_timeout": 0,
    }
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "logitserve.extract.guarded_serve",
            engine_config.model,
            # Nothing is written here. The pipe closes when this process ends, and then the child ends too.
            stdin=asyncio.subprocess.PIPE,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env=_environment(options),
            pass_fds=[listener.fileno()],
            # Ctrl-C reaches the parent only, which then stops the child.
            start_new_session=True,
        )
    return LocalServer(f"http://127.0.0.1:{listener.getsockname()[1]}", api_key, process, log)


def _last_error(log: Path) -> str:
    """Return the message of a log's last error, or its last line if it has none."""
    lines = log.read_text(errors="replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(orjson.JSONDecodeError):
            entry = orjson.loads(line)
            if isinstance(entry, dict) and entry.get("level") == "error":
                return str(entry["message"])
    return lines[-1] if lines else "it said nothing"


def _environment(options: Mapping[str, object]) -> dict[str, str]:
    """Return the environment with these options in place of the user's own ``LOGITSERVE_`` variables.

    One of them holds the key, which a command line would show to every user.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    variables = {
        f"{ENV_PREFIX}{name.upper()}": value if isinstance(value, str) else orjson.dumps(value).decode()
        for name, value in options.items()
    }
    return {**inherited, **variables}
