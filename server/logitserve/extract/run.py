"""A run of ``logitserve extract``: find the missing parts, collect them from a server, and join all parts."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.logs import configure_logging
from logitengine.model.checkpoint.files import check_model

from logitserve.extract.atomic_files import write_atomically
from logitserve.extract.collector import Collector
from logitserve.extract.config import ExtractConfig
from logitserve.extract.errors import ExtractError, UsageError
from logitserve.extract.local_server import LocalServer, local_server
from logitserve.extract.parquet import schema_of, write_parquet
from logitserve.extract.parts import PartsFolder
from logitserve.extract.progress import Progress, say
from logitserve.extract.prompts import PromptFile
from logitserve.extract.safetensors import check_ids, write_safetensors
from logitserve.extract.source import LogitsSource, open_connections

PARQUET, SAFETENSORS = ".parquet", ".safetensors"
SIGNALLED = 128
"""Added to a signal's number, this is a shell's exit code for a process that the signal ended."""


def extract(prompts: Path, out: Path, config: ExtractConfig, engine_config: EngineConfig) -> int:
    """Run ``logitserve extract``. Returns the exit code."""
    configure_logging("warning" if sys.stderr.isatty() else "info")
    try:
        Extraction(prompts, out, config, engine_config).run()
    except ExtractError as error:
        return _ended(f"error: {error}", error.exit_code)
    except CheckpointError as error:
        return _ended(f"error: {error}", UsageError.exit_code)
    except OSError as error:
        return _ended(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _ended("stopped; the same command goes on from here", SIGNALLED + signal.SIGINT)
    except asyncio.CancelledError:
        return _ended("stopped; the same command goes on from here", SIGNALLED + signal.SIGTERM)
    return 0


def _ended(message: str, exit_code: int) -> int:
    sys.stderr.write(f"logitserve extract: {' '.join(message.split())}\n")
    return exit_code


class Extraction:
    """One output, with its input and its options."""

    def __init__(self, prompts: Path, out: Path, config: ExtractConfig, engine_config: EngineConfig) -> None:
        """Check the input and the output. Raises UsageError."""
        if out.suffix not in (PARQUET, SAFETENSORS):
            msg = f"{out} ends neither in {PARQUET} nor in {SAFETENSORS}"
            raise UsageError(msg)
        if not out.parent.is_dir():
            msg = f"{out.parent} is no folder"
            raise UsageError(msg)
        self._out = out
        self._config = config
        self._engine_config = engine_config
        self._prompts = PromptFile(prompts)
        self._ids: list[str] = []
        if out.suffix == SAFETENSORS:
            self._ids = self._prompts.ids()
            check_ids(self._ids)
        self._folder = PartsFolder(out, len(self._prompts), config.prompts_per_part)
        self._manifest: dict[str, Any] = {
            "input": {"sha256": self._prompts.sha256, "prompts": len(self._prompts)},
            "options": {**config.content(), "format": out.suffix},
        }

    def run(self) -> None:
        """Compute the missing parts, and join all. Raises ExtractError, or CheckpointError for the model."""
        if self._out.exists() and not self._folder.path.exists():
            msg = f"{self._out} exists: remove it, or choose another name"
            raise UsageError(msg)
        with self._folder.locked():
            try:
                self._folder.check(self._manifest)
                # An output beside its folder is whole: its run was killed while it cleaned up.
                if not self._out.exists():
                    self._make()
            except BaseException:
                if not self._folder.is_begun:
                    self._folder.remove()
                raise
            self._folder.remove()

    def _make(self) -> None:
        self._folder.sweep()
        missing = self._folder.missing()
        if missing:
            if self._config.url is None:
                check_model(self._engine_config)
            _run(self._collect(missing))
        say("joining the parts")
        self._join()

    async def _collect(self, missing: list[int]) -> None:
        server: LocalServer | None = None
        async with AsyncExitStack() as stack:
            if self._config.url is None:
                say(f"loading {self._engine_config.model}")
                log = self._folder.path / "server.log"
                server = await stack.enter_async_context(local_server(self._engine_config, log))
                url, api_key = server.url, server.api_key
            else:
                url, given = self._config.url, self._config.api_key
                api_key = "" if given is None else given.get_secret_value()
            connections = await stack.enter_async_context(open_connections(self._config, url, api_key))
            source = LogitsSource(connections, self._config)
            manifest = {**self._manifest, "model": await source.model()}
            self._folder.check(manifest)
            self._folder.begin(manifest)
            num_missing = sum(len(self._folder.indices(number)) for number in missing)
            # Its clock starts here, so that loading does not count in the rate.
            progress = stack.enter_context(Progress(len(self._prompts), len(self._prompts) - num_missing))
            collector = Collector(source, self._prompts, self._folder, self._config, progress)
            async with asyncio.TaskGroup() as group:
                watch = None if server is None else group.create_task(server.watch())
                await collector.collect(missing)
                if watch is not None:
                    watch.cancel()

    def _join(self) -> None:
        """Write the parts as one file, and the refused prompts beside it."""
        refused = self._out.with_name(f"{self._out.name}.refused.jsonl")
        numbers = range(self._folder.num_parts)
        notes = [path for path in map(self._folder.refused, numbers) if path.exists()]
        if notes:
            with write_atomically(refused) as unfinished, unfinished.open("wb") as file:
                file.writelines(map(Path.read_bytes, notes))
        else:
            refused.unlink(missing_ok=True)
        parts = [self._folder.part(number) for number in numbers]
        schema = schema_of(parts)
        if schema is None:
            msg = f"the server refused every prompt: {refused} says why"
            raise ExtractError(msg)
        filled = [part for part in parts if schema_of([part]) is not None]
        with write_atomically(self._out) as unfinished:
            if self._out.suffix == PARQUET:
                write_parquet(filled, schema, unfinished)
            else:
                write_safetensors(filled, schema, self._ids, unfinished)


def _run(work: Any) -> None:
    """Run a coroutine, which SIGINT and SIGTERM cancel. Raises only the first error of a group."""

    async def cancellable() -> None:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await work

    try:
        asyncio.run(cancellable())
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
