"""The `serve` command. It starts the engine's process first, which takes longest, and then imports the rest."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path

from logitengine.config import EngineConfig
from logitengine.link.client import EngineClient
from logitengine.link.engine_protocol import EngineProtocol
from logitengine.link.supervisor import ENGINE_COMMAND
from logitengine.logs import configure_logging, resolve_format
from logitengine.model.checkpoint.files import absolute, check_model
from uvloop import new_event_loop

from logitserve.config import ServerConfig
from logitserve.http.listener import bind
from logitserve.telemetry.otlp import check_packages

logger = logging.getLogger(__name__)


def serve(server_config: ServerConfig, engine_config: EngineConfig) -> int:
    """Serve until a signal. Returns the exit code: 0, or 1 when the engine failed.

    Raises CheckpointError for a model that cannot be served, before anything is started where its files show it.
    Raises ListenError for an address that cannot be listened on, and MissingPackageError for an option whose
    packages are not installed.
    """
    configure_logging(server_config.log_level, server_config.log_format)
    if server_config.otlp_endpoint is not None:
        check_packages()
    check_model(engine_config)
    engine_config = engine_config.model_copy(update={"model": absolute(engine_config.model)})
    listeners = bind(server_config)
    names = server_config.served_model_name or [display_name(engine_config.model)]
    config = server_config.model_copy(update={"served_model_name": names})
    logger.info("starting the engine", extra={"model": engine_config.model})
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(EngineClient(engine_config, command=_command(config)), config, listeners))


def _command(config: ServerConfig) -> list[str]:
    """Return the engine process's command. It logs as this process does."""
    log_format = resolve_format(config.log_format)
    return [*ENGINE_COMMAND, "--log-level", config.log_level, "--log-format", log_format]


async def _serve(engine: EngineProtocol, config: ServerConfig, listeners: list[socket.socket]) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())  # until uvicorn takes them
    if config.api_key_file is not None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the keys have been read once
    await engine.start()
    try:
        # These imports take half a second, and no request needs the event loop yet.
        from logitserve.http.uvicorn_server import run_app

        return await run_app(engine, config, listeners, stopped)
    finally:
        await engine.close()


def display_name(model: str) -> str:
    """Return the name that requests call the model by: a hub name as it is, a directory or file by its own name.

    ``model`` is absolute if it is a path.
    """
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name if path.is_absolute() else model
