"""Life of the engine process: it is spawned, watched, and restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError, EngineDeadError
from logitengine.link.channel import AsyncChannel, TransportError
from logitengine.link.messages import (
    EngineStats,
    Failed,
    FromEngine,
    Heartbeat,
    Located,
    ModelInfo,
    Ready,
    Refused,
    Shutdown,
    StepOutputs,
    Unservable,
)
from logitengine.link.streams import Streams
from logitengine.link.watch import TICK_SECONDS, Watch

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "logitengine.process")
"""Command of the engine process; it takes ``--socket`` and ``--config``."""

SILENT_SECONDS = 10.0
"""Silence after which /ready is 503. A process sends a message every second, also in a step."""

STUCK_SECONDS = 30.0
STUCK_FACTOR = 10
"""/ready is 503 while a step takes longer than this many seconds and this many times the longest step before it."""

QUICK_SECONDS = 30.0
"""Time after ready within which a process that ended has died quickly, if it has answered no request.

One that was killed because it hung died when it began to hang.
"""

RESTART_SECONDS = (0.1, 1.0, 5.0)
"""Pauses before a restart, by the number of quick deaths in a row.

After one more death no process is started.
"""

EXIT_SECONDS = 5.0
"""Time for a process to exit by itself once its socket is closed, and then for one that was killed."""

OPENMP_SPINS = "1000"


def engine_environment() -> dict[str, str]:
    """Return this process's environment, with OpenMP set to sleep soon between parallel regions unless the user chose.

    By default OpenMP's threads spin for milliseconds on cores that the server process needs. With both cores
    of a small machine shared, a step then takes three times as long.
    """
    environment = dict(os.environ)
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = OPENMP_SPINS
    return environment


class Supervisor:
    """Keeps an engine process alive and connects ``streams`` to it.

    Args:
        streams: is notified when a process is ready or gone, and gets its messages about requests.
        command: the process to run.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: EngineConfig,
        streams: Streams,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._streams = streams
        self._command = command
        self._clock = clock
        self.info: ModelInfo | None = None
        self.stats = EngineStats()  # of the process that runs
        self.ended_stats = EngineStats()  # of all that ran before it
        self.num_restarts = 0
        self._channel: AsyncChannel[FromEngine] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._spawned = asyncio.Event()
        self._located = asyncio.Event()
        self._tokenizer_path: str | None = None
        self._loaded = asyncio.Event()
        self._lost = asyncio.Event()
        self._load_error: str | None = None
        self._is_unservable = False
        self._unavailable: str | None = "not started"
        self._last_heard = clock()
        self._heartbeat = Heartbeat(None, 0.0)
        self._watch = Watch(config)
        # State of the process that runs or ran last.
        self._has_answered = False
        self._has_failed = False
        self._ended_by = "never started"
        self._is_immortal = False
        self._misfit: str | None = None  # why no other process can take its place
        self._ready_at: float | None = None

    async def start(self) -> None:
        """Spawn the engine; the model loads in the background. Does nothing if it was already started."""
        if self._task is not None:
            return
        self._closing = False
        self._turn_away("loading the model")
        self._spawned.clear()
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")
        self._task.add_done_callback(self._on_task_done)
        spawning = asyncio.create_task(self._spawned.wait())
        await asyncio.wait({spawning, self._task}, return_when=asyncio.FIRST_COMPLETED)
        spawning.cancel()

    async def wait_located(self) -> str:
        """Implement `EngineProtocol.wait_located`."""
        await self._located.wait()
        if self._tokenizer_path is None:
            raise self._why_not_loaded()
        return self._tokenizer_path

    async def wait_ready(self) -> ModelInfo:
        """Implement `EngineProtocol.wait_ready`."""
        await self._loaded.wait()
        if self.info is None or self._load_error is not None:
            raise self._why_not_loaded()
        return self.info

    async def wait_lost(self) -> str:
        """Implement `EngineProtocol.wait_lost`."""
        await self._lost.wait()
        return self._load_error or "the engine ended"

    async def close(self) -> None:
        """Stop the engine process."""
        self._closing = True
        self._turn_away("the server is shutting down")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def pid(self) -> int | None:
        """Id of the engine process, or None when there is none."""
        return self._process.pid if self._process is not None else None

    def not_ready_reason(self) -> str | None:
        """Return None when requests can be served, else the reason: loading, dead and restarting, silent, or stuck."""
        if self._unavailable is not None:
            return self._unavailable
        silence = self._clock() - self._last_heard
        if silence > SILENT_SECONDS:
            return f"the engine process does not answer; it has been silent for {silence:.0f} s"
        step, longest = self._heartbeat.step_seconds, self._heartbeat.longest_step_seconds
        if step is not None and step > max(STUCK_SECONDS, STUCK_FACTOR * longest):
            return f"the engine is stuck: a step has run for {step:.0f} s, the longest before it took {longest:.1f} s"
        return None

    async def _supervise(self) -> None:
        quick_deaths = 0
        while True:
            self._has_answered = self._has_failed = False
            self._ready_at = None
            await self._run_process()
            if self._is_immortal:
                # It may hold a device's memory, and whoever starts the server again can see to that.
                self._give_up("the engine process cannot be killed; no other is started beside it")
                return
            if self._misfit is not None:
                self._give_up(self._misfit)
                return
            if self.info is None:
                # The engine never loaded, and another try would fail too, so every waiter gets the failure.
                self._give_up(self._load_error or "the engine died while it was loading")
                return
            quick_deaths = quick_deaths + 1 if self._died_quickly() else 0
            if quick_deaths == len(RESTART_SECONDS):
                self._give_up(
                    f"the engine died {quick_deaths} times in a row, each time at most {QUICK_SECONDS:g} s after it was "
                    "ready and before it had answered a request; no other is started"
                )
                return
            self.ended_stats = self.stats.after(self.ended_stats)
            self.stats = EngineStats()
            self.num_restarts += 1
            pause = RESTART_SECONDS[quick_deaths]
            logger.error("the engine process died (%s); starting another in %.1f s", self._ended_by, pause)
            await asyncio.sleep(pause)

    def _died_quickly(self) -> bool:
        """Return whether the last process died quickly. Its messages came every second while it lived."""
        if self._ready_at is None:
            return True
        lived = self._last_heard - self._ready_at - (self._heartbeat.step_seconds or 0.0)
        return not self._has_answered and lived <= QUICK_SECONDS

    def _why_not_loaded(self) -> CheckpointError | EngineDeadError:
        reason = self._load_error or "the engine could not be started"
        return CheckpointError(reason) if self._is_unservable else EngineDeadError(reason)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        """Give up after a fault of the supervisor itself.

        Otherwise the engine would seem to load endlessly.
        """
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("supervising the engine failed", exc_info=error)
            self._give_up(f"supervising the engine failed: {error}")

    def _give_up(self, reason: str) -> None:
        self._load_error = reason
        self._turn_away(reason)
        self._located.set()
        self._loaded.set()
        self._lost.set()

    def _turn_away(self, reason: str) -> None:
        """Reject requests for this reason, those in progress too."""
        self._unavailable = reason
        self._loaded.clear()
        self._streams.end(reason)

    def _on_loss(self, reason: str, begun: Collection[str] = ()) -> None:
        """Have requests wait for the next process; ``begun`` is that of `Streams.disconnect`.

        There is no next process if the model was never loaded.
        """
        if self._closing:
            return  # requests have been turned away, and for that reason
        if self.info is None:
            self._turn_away(self._load_error or "the engine died")
            return
        self._unavailable = reason
        self._loaded.clear()
        self._streams.disconnect(begun)

    async def _run_process(self) -> None:
        """Run one life of the engine: spawn, connect, pass messages until its socket closes, reap."""
        directory = Path(tempfile.mkdtemp(prefix="logitserve-"))  # mode 0700: no other user can connect
        path = directory / "engine.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        watching: asyncio.Task[None] | None = None
        try:
            listener.bind(str(path))
            listener.listen(1)
            listener.setblocking(False)
            arguments = ["--socket", str(path), "--config", self._config.model_dump_json()]
            self._process = await asyncio.create_subprocess_exec(
                *self._command, *arguments, env=engine_environment()
            )
            self._spawned.set()
            watching = asyncio.create_task(self._watch_over(self._process), name="engine-watch")
            connection = await self._accept(listener, self._process)
            if connection is not None:
                await self._converse(connection)
        finally:
            if watching is not None:
                watching.cancel()
            # Comes before the reaping, which takes seconds if the process does not exit by itself.
            if not self._has_failed:
                self._on_loss("the engine died and is being restarted")
            listener.close()
            shutil.rmtree(directory, ignore_errors=True)
            await self._reap()

    async def _watch_over(self, process: asyncio.subprocess.Process) -> None:
        """Kill the process when it hangs. Its socket closes then, as at any other death."""
        self._watch = Watch(self._config)
        fault = None
        while fault is None:
            await asyncio.sleep(TICK_SECONDS)
            fault = self._watch.tick()
        logger.error("the engine hangs and is killed: %s", fault)
        if self.info is None:
            self._load_error = f"the engine hung while it was loading: {fault}"
        self._on_fault("the engine hung and is being restarted")
        with contextlib.suppress(ProcessLookupError):
            process.kill()

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

    async def _converse(self, connection: socket.socket) -> None:
        """Pass messages until one side closes."""
        channel = self._channel = AsyncChannel[FromEngine](FromEngine, self._handle)
        await channel.open(connection)
        try:
            await channel.wait_closed()
        except TransportError:
            logger.exception("the engine sent what is no message")

    async def _reap(self) -> None:
        """Let the process exit by itself, since its socket is closed.

        Kill it if it does not, or when cancelled.
        """
        process, channel, self._process, self._channel = self._process, self._channel, None, None
        if channel is not None:
            channel.send(Shutdown())
            channel.close()
        if process is None:
            return
        try:
            await asyncio.wait_for(process.wait(), EXIT_SECONDS)
        except TimeoutError:
            logger.warning("the engine process did not exit within %.0f s and is killed", EXIT_SECONDS)
        finally:
            if process.returncode is None:
                await self._kill(process)
            self._ended_by = _describe_end(process.returncode)

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        """Kill the process and wait until it is gone, which one that the kernel holds in a call never is."""
        process.kill()
        try:
            await asyncio.wait_for(process.wait(), EXIT_SECONDS)
        except TimeoutError:
            logger.error("the engine process %d does not end although it was killed", process.pid)  # noqa: TRY400
            self._is_immortal = True

    def _handle(self, message: FromEngine) -> None:
        self._last_heard = self._clock()
        self._watch.hear(message)
        match message:
            case StepOutputs(outputs, stats):
                self.stats = stats
                self._has_answered = self._has_answered or any(output.finish_reason for output in outputs)
                self._streams.receive(message)
            case Refused():
                self._streams.receive(message)
            case Located(tokenizer_path):
                self._tokenizer_path = tokenizer_path
                self._located.set()
            case Ready(info):
                self._on_ready(info)
            case Heartbeat():
                self._heartbeat = message
            case Failed(reason, begun):
                self._on_failed(reason, begun)
            case Unservable(reason):
                self._is_unservable = self.info is None
                if self.info is not None:
                    self._misfit = f"the model cannot be served any more: {reason}"
                self._on_failed(reason, [])

    def _on_failed(self, reason: str, begun: list[str]) -> None:
        if self.info is not None:  # wait_ready reports a failed first load
            logger.error("the engine failed: %s", reason)
        else:
            self._load_error = reason
        self._on_fault("the engine failed and is being restarted", begun)

    def _on_fault(self, reason: str, begun: Collection[str] = ()) -> None:
        """End with a process that failed or hangs, before it has closed its socket."""
        self._has_failed = True
        self._on_loss(reason, begun)
        if self._channel is not None:
            self._channel.close()  # otherwise a process that hangs at its exit would delay the next one

    def _on_ready(self, info: ModelInfo) -> None:
        channel = self._channel
        if channel is None or self._closing:
            return  # the process is being reaped, or will be
        if self.info is not None and info.fingerprint != self.info.fingerprint:
            # The server has read the old files' tokenizer, and has told clients of the old fingerprint.
            self._misfit = (
                "the model is not the one that the server started with: its files, the packages or the CPUs have "
                "changed; start the server again"
            )
            self._on_failed(self._misfit, [])
            return
        if self.info is not None:
            logger.info("the engine is ready again")
        self.info, self._unavailable, self._ready_at = info, None, self._clock()
        self._heartbeat = Heartbeat(None, 0.0)
        self._streams.connect(channel)
        self._loaded.set()


def _describe_end(returncode: int | None) -> str:
    """Return how a process ended, in words."""
    if returncode is None:
        return "still there"
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"signal {-returncode}"
