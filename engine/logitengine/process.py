"""The engine process. One thread steps the engine and sends, one receives, and one sends a heartbeat every second."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError, EngineError, EngineOverloadedError
from logitengine.link.channel import BlockingChannel, TransportError
from logitengine.link.messages import (
    Abort,
    Consumed,
    Failed,
    FromEngine,
    Generate,
    Heartbeat,
    Located,
    Ready,
    Refused,
    Shutdown,
    StepOutputs,
    ToEngine,
    Unservable,
)
from logitengine.logs import configure_logging, join_loggers, resolve_format

if TYPE_CHECKING:
    from logitengine.engine import Engine
    from logitengine.model.loader import LoadedModel
    from logitengine.run.pages import PageTaker

logger = logging.getLogger("logitengine.process")  # __name__ is __main__

HEARTBEAT_SECONDS = 1.0

EXIT_SECONDS = 5.0
"""Longest wait of an ending process until everything is sent, and again until the server has closed."""

PROGRESS_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
"""Variables that turn off progress bars of libraries, which would break the lines of JSON."""

IDLE_SECONDS = 1.0
"""Interval at which an idle engine sends its statistics."""


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description="The engine process; started by the server.")
    parser.add_argument("--socket", required=True, help="Unix socket on which the server listens")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--log-level", default="info", help="least severe line logged")
    parser.add_argument("--log-format", default="auto", help="text, json or auto")
    arguments = parser.parse_args()
    configure_logging(arguments.log_level, arguments.log_format)
    if resolve_format(arguments.log_format) == "json":
        for name in PROGRESS_BARS:
            os.environ.setdefault(name, "1")
    # A terminal or a supervisor sends these to the whole process group. The server decides when to end, and
    # then closes our socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(arguments.socket)
    channel: BlockingChannel[ToEngine] = BlockingChannel(connection, ToEngine)
    loop = EngineLoop(channel)
    status = loop.run(EngineConfig.model_validate_json(arguments.config))
    # All that the process has is the system's to take. Taking an interpreter apart with all that was imported lasts
    # two seconds, and a thread that still works for grammars, in foreign code, must not meet it.
    logging.shutdown()
    os._exit(status)


def _return_free_memory() -> None:
    """Return what loading has freed to the system. glibc keeps it otherwise: 50 MiB after a vocabulary of 262,144 tokens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Heart:
    """Sends how long the current step has run. It has its own thread, because the stepping thread may be stuck.

    A step's seconds are counted by its heartbeats: while the process or the machine is stopped, neither goes on.
    """

    def __init__(self, channel: BlockingChannel[ToEngine]) -> None:
        self._channel = channel
        self._step_started: float | None = None
        self._longest_step_seconds = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop; nothing is sent afterwards."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Mark the time in which a step runs."""
        started = self._step_started = time.monotonic()
        yield
        self._step_started = None
        self._longest_step_seconds = max(self._longest_step_seconds, time.monotonic() - started)

    def _run(self) -> None:
        num_beats, last_started = 0, None
        while not self._stopping.wait(HEARTBEAT_SECONDS):
            started = self._step_started
            num_beats, last_started = num_beats + 1 if started == last_started else 1, started
            seconds = (
                None if started is None else min(time.monotonic() - started, num_beats * HEARTBEAT_SECONDS)
            )
            try:
                self._channel.send(Heartbeat(seconds, self._longest_step_seconds))
            except OSError:
                return  # the receiving thread reports that the server is gone


class _Wake:
    """Ends the wait for a message: a step may have work."""


class EngineLoop:
    """Moves messages between the channel and the engine."""

    def __init__(self, channel: BlockingChannel[ToEngine]) -> None:
        self._channel = channel
        self._heart = Heart(channel)
        self._engine: Engine | None = None
        self._inbox: queue.SimpleQueue[ToEngine | _Wake | None] = queue.SimpleQueue()

    def run(self, config: EngineConfig) -> int:
        """Load, then serve until the server closes the socket. Returns the process's exit status."""
        receiving = threading.Thread(target=self._receive, name="receive", daemon=True)
        receiving.start()
        self._heart.start()  # also while the model loads, which may hang too
        try:
            self._serve(config)
            status = 0
        except CheckpointError as error:
            self._send(Unservable(str(error)))  # foreseen, so the server reports it
            status = 2
        except Exception as error:
            logger.exception("the engine cannot go on")
            begun = [] if self._engine is None else sorted(self._engine.begun_request_ids)
            self._send(Failed(f"{type(error).__name__}: {error}", begun))
            status = 1
        self._heart.stop()
        self._channel.flush(EXIT_SECONDS)
        # Wait until the server has closed. After an earlier exit its next write would fail, and it would lose
        # all that it has not read.
        receiving.join(EXIT_SECONDS)
        return status

    def _serve(self, config: EngineConfig) -> None:
        # Nearly all objects made while loading stay. Searching them for garbage takes a sixth of the loading
        # time.
        gc.disable()
        loaded = self._load(config)
        from logitengine.engine import Engine
        from logitengine.run.pages import PageTaker

        loaded.kernels.pin_threads()
        engine = self._engine = Engine(config, loaded, self._wake)
        missing = engine.prepare_grammars() if engine.info.can_generate else None
        if missing is not None:
            logger.info("%s", missing)
        pages = PageTaker(loaded.runner.kv_cache.blocks)
        _return_free_memory()
        gc.freeze()
        gc.enable()
        self._send(Ready(engine.info))
        computed = False
        while self._take_messages(engine, pages, wait=not computed):
            steps_before = engine.num_steps
            with self._heart.step():
                outputs = engine.step()
            computed = engine.num_steps > steps_before or engine.is_computing
            if outputs or not computed:
                self._send(StepOutputs(outputs, engine.stats))

    def _load(self, config: EngineConfig) -> LoadedModel:
        # Imported late: the threads already run, so a long load does not look like silence to the server.
        from logitengine.model.checkpoint.resolve import resolve_checkpoint

        join_loggers()
        checkpoint = resolve_checkpoint(config.model, config.prepared)
        self._send(Located(str(checkpoint.tokenizer_path)))
        from logitengine.model.loader import load

        join_loggers()
        logger.info("loading %s", config.model)
        return load(config, checkpoint=checkpoint)

    def _take_messages(self, engine: Engine, pages: PageTaker, *, wait: bool) -> bool:
        """Handle every message that has come; with ``wait``, wait a moment for the first. False: the server is done."""
        until = time.monotonic() + IDLE_SECONDS
        while wait and self._inbox.empty() and pages.take(engine.num_blocks_reached):
            wait = time.monotonic() < until
        try:
            while True:
                message = self._inbox.get(block=wait, timeout=IDLE_SECONDS)
                if message is None or isinstance(message, Shutdown):
                    return False
                if not isinstance(message, _Wake):
                    self._handle(engine, message)
                wait = False
        except queue.Empty:
            return True

    def _handle(self, engine: Engine, message: ToEngine) -> None:
        match message:
            case Generate(request):
                try:
                    engine.add(request)
                except EngineError as error:
                    overloaded = isinstance(error, EngineOverloadedError)
                    self._send(Refused(request.request_id, str(error), overloaded))
            case Abort(request_id, index):
                engine.abort(request_id, index)
            case Consumed(request_id, nbytes):
                engine.consumed(request_id, nbytes)

    def _receive(self) -> None:
        message: ToEngine | None
        try:
            while (message := self._channel.receive()) is not None:
                self._inbox.put(message)
        except ConnectionResetError:
            pass  # the server has gone before it took the connection
        except (OSError, TransportError):
            logger.exception("nothing more can be received from the server")
        self._inbox.put(None)

    def _wake(self) -> None:
        self._inbox.put(_Wake())

    def _send(self, message: FromEngine) -> None:
        try:
            self._channel.send(message)
        except OSError:
            self._inbox.put(None)


if __name__ == "__main__":
    main()
