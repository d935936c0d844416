"""The server's handle on the engine process: start it, watch it, restart it, and stream from it. Never imports torch."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from logitengine.config import EngineConfig
from logitengine.errors import (
    EngineDeadError,
    EngineError,
    EngineNotReadyError,
    EngineOverloadedError,
    RequestRefusedError,
)
from logitengine.link.channel import AsyncChannel, TransportError
from logitengine.link.messages import (
    Abort,
    Consumed,
    EngineStats,
    Failed,
    FromEngine,
    Generate,
    GenerationRequest,
    Located,
    ModelInfo,
    Ready,
    Refused,
    Shutdown,
    StepOutput,
    StepOutputs,
)

logger = logging.getLogger(__name__)

STUCK_SECONDS = 30.0
"""An engine with work that says nothing for this long is not ready. It says something every second when it waits."""

ACKNOWLEDGED_SHARE = 1 / 8
"""Of a request's window, how much is read before the engine is told: each telling wakes a thread beside its kernels."""

OPENMP_SPINS = "1000"

RESTART_SECONDS = (0.1, 1.0, 5.0, 30.0)
"""Pauses before the restarts that follow deaths without a served request in between."""


def engine_environment() -> dict[str, str]:
    """Ours, with OpenMP told to sleep soon between parallel regions unless the user has told it anything.

    By default its threads spin for milliseconds on cores that the server process needs: with both cores of a small
    machine shared, a step then takes three times as long.
    """
    environment = dict(os.environ)
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = OPENMP_SPINS
    return environment


class _Stream:
    """The outputs of one request on their way from the socket to the one who asked."""

    def __init__(self, n: int, channel: AsyncChannel[FromEngine]) -> None:
        self.channel = channel
        self.open_choices = set(range(n))
        self.aborted_choices: set[int] = set()
        self.queue: asyncio.Queue[StepOutput | EngineError | None] = asyncio.Queue()

    def put(self, output: StepOutput) -> None:
        if output.index not in self.open_choices:
            return
        self.queue.put_nowait(output)
        if output.finish_reason is not None:
            self.close_choice(output.index)

    def close_choice(self, index: int) -> None:
        self.open_choices.discard(index)
        if not self.open_choices:
            self.queue.put_nowait(None)


class EngineClient:
    """Spawns the engine in its own process and multiplexes requests over one local socket.

    When the process dies, every request under way ends with EngineDeadError and a fresh process is started.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self._streams: dict[str, _Stream] = {}
        self._channel: AsyncChannel[FromEngine] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._spawned = asyncio.Event()
        self._located = asyncio.Event()
        self._tokenizer_path: str | None = None
        self._loaded = asyncio.Event()
        self._load_error: str | None = None
        self._not_ready: str | None = "not started"
        self._last_heard = time.monotonic()

    # Life and death.

    async def start(self) -> None:
        """Spawn the engine; the model loads in the background. What was started already stays as it is."""
        if self._supervisor is not None:
            return
        self._not_ready = "loading the model"
        self._spawned.clear()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
        self._supervisor.add_done_callback(self._on_supervisor_done)
        spawning = asyncio.create_task(self._spawned.wait())
        await asyncio.wait({spawning, self._supervisor}, return_when=asyncio.FIRST_COMPLETED)
        spawning.cancel()

    async def wait_located(self) -> str:
        """Wait until the model's files are here; the directory of its tokenizer. Raises EngineDeadError if they cannot be."""
        await self._located.wait()
        if self._tokenizer_path is None:
            raise EngineDeadError(self._load_error or "the engine could not be started")
        return self._tokenizer_path

    async def wait_ready(self) -> ModelInfo:
        """Wait until requests can be served, also after a restart. Raises EngineDeadError if the model cannot be loaded."""
        await self._loaded.wait()
        if self.info is None or self._load_error is not None:
            raise EngineDeadError(self._load_error or "the engine could not be started")
        return self.info

    async def close(self) -> None:
        """Stop the engine process; requests under way end with EngineDeadError."""
        self._not_ready = "shut down"
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None

    @property
    def pid(self) -> int | None:
        """The engine's process id while there is one."""
        return self._process.pid if self._process is not None else None

    def not_ready_reason(self) -> str | None:
        """None when requests can be served, else why not: loading, dead and restarting, or stuck."""
        silence = time.monotonic() - self._last_heard
        if self._not_ready is None and self._streams and silence > STUCK_SECONDS:
            return f"the engine has work but has been silent for {silence:.0f} s"
        return self._not_ready

    async def _supervise(self) -> None:
        deaths = 0
        while True:
            generated_before = self.stats.num_generated_tokens
            try:
                await self._run_process()
            finally:
                self._not_ready = "the engine died and is being restarted" if self.info else "the engine died"
                self._loaded.clear()
                self._fail_streams()
            if self.info is None:
                # It never loaded. Trying again would fail again, so whoever waits for it is told.
                self._not_ready = self._load_error or "the engine died while it was loading"
                self._load_error = self._not_ready
                self._located.set()
                self._loaded.set()
                return
            deaths = 0 if self.stats.num_generated_tokens != generated_before else deaths + 1
            self.stats = EngineStats()
            pause = RESTART_SECONDS[min(deaths, len(RESTART_SECONDS) - 1)]
            logger.error("the engine process died; starting another in %.1f s", pause)
            await asyncio.sleep(pause)

    def _on_supervisor_done(self, task: asyncio.Task[None]) -> None:
        """A fault of the supervisor's own must not look like an engine that is loading for ever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("supervising the engine failed", exc_info=error)
            self._not_ready = self._load_error = f"supervising the engine failed: {error}"
            self._located.set()
            self._loaded.set()

    async def _run_process(self) -> None:
        """One life of the engine: spawn, connect, pass messages until its socket closes, reap."""
        directory = Path(tempfile.mkdtemp(prefix="logitserve-"))  # mode 0700: nobody else can connect
        path = directory / "engine.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            listener.listen(1)
            listener.setblocking(False)
            arguments = ["--socket", str(path), "--config", self._config.model_dump_json()]
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "logitengine.process", *arguments, env=engine_environment()
            )
            self._spawned.set()
            connection = await self._accept(listener, self._process)
            if connection is not None:
                self._channel = await AsyncChannel.over(connection, FromEngine, self._handle)
                try:
                    await self._channel.wait_closed()
                except TransportError:
                    logger.exception("the engine sent what is no message")
        finally:
            listener.close()
            shutil.rmtree(directory, ignore_errors=True)
            await self._reap()

    async def _accept(
        self, listener: socket.socket, process: asyncio.subprocess.Process
    ) -> socket.socket | None:
        accepting = asyncio.create_task(asyncio.get_running_loop().sock_accept(listener))
        dying = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({accepting, dying}, return_when=asyncio.FIRST_COMPLETED)
            return accepting.result()[0] if accepting.done() else None
        finally:
            accepting.cancel()
            dying.cancel()

    async def _reap(self) -> None:
        """Let the process exit by itself (its socket is closed), then make sure of it."""
        process, channel, self._process, self._channel = self._process, self._channel, None, None
        if channel is not None:
            channel.send(Shutdown())
            channel.close()
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), timeout=5)
        except TimeoutError:
            process.kill()
            await process.wait()

    # Messages.

    def _handle(self, message: FromEngine) -> None:
        self._last_heard = time.monotonic()
        match message:
            case StepOutputs(outputs, stats):
                self.stats = stats
                for output in outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None:
                        stream.put(output)
            case Located(tokenizer_path):
                self._tokenizer_path = tokenizer_path
                self._located.set()
            case Ready(info):
                self.info, self._not_ready, self._load_error = info, None, None
                self._loaded.set()
                logger.info("engine ready: %s, %s, %s kernels", info.architecture, info.dtype, info.kernels)
            case Refused(request_id, reason, overloaded):
                stream = self._streams.get(request_id)
                if stream is not None:
                    refusal = EngineOverloadedError if overloaded else RequestRefusedError
                    stream.queue.put_nowait(refusal(reason))
            case Failed(reason):
                self._load_error = reason
                logger.error("the engine failed: %s", reason)

    def _fail_streams(self) -> None:
        for stream in self._streams.values():
            stream.queue.put_nowait(EngineDeadError("the engine died while it was working on this request"))

    # Requests.

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Stream the outputs of all ``n`` choices, interleaved, until each has a finish reason.

        Closing the generator early (``aclose``, cancellation) aborts the request and frees its blocks. An output's
        arrays count against the request's window until the next one is asked for.

        Raises EngineNotReadyError, EngineOverloadedError or RequestRefusedError before the first output;
        EngineDeadError at any time.
        """
        if self._not_ready is not None:
            raise EngineNotReadyError(self._not_ready)
        if not self._streams:
            self._last_heard = time.monotonic()
        if request.request_id in self._streams:
            raise RequestRefusedError(f"request id {request.request_id!r} is in use")
        channel = self._channel
        assert channel is not None  # noqa: S101 - it is what said that the engine is ready
        stream = self._streams[request.request_id] = _Stream(request.n, channel)
        channel.send(Generate(request))
        consumed = 0
        try:
            while (output := await stream.queue.get()) is not None:
                if isinstance(output, EngineError):
                    stream.open_choices.clear()
                    raise output
                if output.index not in stream.aborted_choices:
                    yield output
                consumed += output.nbytes
                if consumed >= self._config.logits_window_bytes * ACKNOWLEDGED_SHARE:
                    channel.send(Consumed(request.request_id, consumed))
                    consumed = 0
        finally:
            del self._streams[request.request_id]
            if stream.open_choices:
                channel.send(Abort(request.request_id))

    def abort_choice(self, request_id: str, index: int) -> None:
        """Stop one choice (a stop string was found, say). ``generate`` yields nothing more for it."""
        stream = self._streams.get(request_id)
        if stream is not None and index in stream.open_choices:
            stream.channel.send(Abort(request_id, index))
            stream.aborted_choices.add(index)
            stream.close_choice(index)
