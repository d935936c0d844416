"""The end of the server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
import uvloop
from logitengine.link.messages import ModelInfo
from logitserve.config import ServerConfig
from logitserve.http.backlog import SO_ATTACH_FILTER
from logitserve.http.listener import ListenError, bind
from logitserve.http.uvicorn_server import run_app
from raw_http import SECONDS, Answer, RawClient, get
from scripted_engine import ScriptedEngine


@pytest.mark.anyio
async def test_a_lost_engine_ends_the_server_with_1_and_its_last_line_says_why(
    model_info: ModelInfo, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(model_info, lambda _: [])
    config = ServerConfig(port=0)
    running = asyncio.create_task(run_app(engine, config, bind(config), asyncio.Event()))
    engine.lost.set()
    assert await running == 1
    assert caplog.records[-1].levelname == "ERROR"
    assert caplog.records[-1].message == "the server ended: the engine died too often"


KEEP_ALL = (0x06, 0, 0, 0xFFFFFFFF)
"""The BPF program of one instruction that keeps every packet."""

SO_LOCK_FILTER = 44
"""Socket option that forbids further filters, as a sandbox may."""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connected(listener: socket.socket) -> RawClient:
    return RawClient(f"http://127.0.0.1:{listener.getsockname()[1]}")


def answer_of(client: RawClient) -> Answer:
    with client:
        return client.send(get("/health")).answer()


def late_answer_of(client: RawClient) -> Answer:
    client.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):  # the connection stays open
        client.socket.recv(1)
    client.socket.settimeout(SECONDS)
    return answer_of(client)


async def terminated(engine: ScriptedEngine, listener: socket.socket, config: ServerConfig) -> int:
    """Serve, send SIGTERM once a request was answered, and return the exit code."""
    running = asyncio.create_task(run_app(engine, config, [listener], asyncio.Event()))
    assert (await asyncio.to_thread(answer_of, connected(listener))).status == 200
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(SECONDS):
        return await running


@pytest.fixture
def end(model_info: ModelInfo, listener: socket.socket) -> Callable[..., int]:
    def end(**options: object) -> int:
        engine = ScriptedEngine(model_info, lambda _: [])
        config = ServerConfig.model_validate(options)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(terminated(engine, listener, config))

    return end


@pytest.fixture
def at_draining(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[Callable[[], None]], None]:
    """Return a function whose argument is called at the instant when draining is logged."""

    def at_draining(work: Callable[[], None]) -> None:
        def look(record: logging.LogRecord) -> bool:
            if record.msg == "draining":
                work()
            return True

        monkeypatch.setattr(logging.getLogger("logitserve.http.uvicorn_server"), "filters", [look])

    caplog.set_level(logging.INFO)
    return at_draining


def test_a_client_that_is_accepted_in_the_last_instant_is_answered(
    end: Callable[..., int],
    listener: socket.socket,
    at_draining: Callable[[Callable[[], None]], None],
) -> None:
    """Another process may listen too, so newcomers are not held back."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked: list[concurrent.futures.Future[Answer]] = []

        at_draining(lambda: asked.append(pool.submit(late_answer_of, connected(listener))))
        assert end(fd=listener.fileno()) == 0
        (answer,) = (each.result(SECONDS) for each in asked)
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_where_newcomers_cannot_be_held_back_the_server_ends_all_the_same(
    end: Callable[..., int], listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    program = ctypes.create_string_buffer(struct.pack("HBBI", *KEEP_ALL), 8)
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
    listener.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    assert end() == 0
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("newcomers cannot be held back while the server ends: ")


def test_the_server_ends_though_draining_fails(
    end: Callable[..., int], at_draining: Callable[[Callable[[], None]], None]
) -> None:
    def fail() -> None:
        raise OSError

    at_draining(fail)
    assert end() == 0


class SlowEngine(ScriptedEngine):
    """Engine whose model is loaded when ``loaded`` is set."""

    def __init__(self, info: ModelInfo) -> None:
        super().__init__(info, lambda _: [])
        self.loading = asyncio.Event()
        self.loaded = asyncio.Event()
        self.was_closed = False

    async def wait_ready(self) -> ModelInfo:
        self.loading.set()
        await self.loaded.wait()
        return await super().wait_ready()

    async def close(self) -> None:
        self.was_closed = True


def refused(listener: socket.socket) -> bool:
    try:
        connected(listener).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.anyio
async def test_with_listen_when_ready_clients_are_refused_until_the_first_can_be_served(
    model_info: ModelInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server announces that it is ready once it listens."""
    engine = SlowEngine(model_info)
    config = ServerConfig(port=0, listen_when_ready=True)
    (listener,) = bind(config)
    were_refused: list[bool] = []

    def look(record: logging.LogRecord) -> bool:
        if record.msg == "ready":
            were_refused.append(refused(listener))
        return True

    monkeypatch.setattr(logging.getLogger("logitserve.banner"), "filters", [look])
    caplog.set_level(logging.INFO)
    running = asyncio.create_task(run_app(engine, config, [listener], asyncio.Event()))
    await engine.loading.wait()
    assert refused(listener)
    engine.loaded.set()
    async with asyncio.timeout(SECONDS):
        while refused(listener):  # noqa: ASYNC110 - a port tells nobody that it is listened on
            await asyncio.sleep(0)
    client = connected(listener)
    answer = await asyncio.to_thread(lambda: client.send(get("/ready", "connection: close")).answer())
    client.close()
    assert answer.status == 200
    assert were_refused == [False]
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0


@pytest.mark.anyio
async def test_with_listen_when_ready_a_server_that_is_stopped_before_never_listens(
    model_info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SlowEngine(model_info)
    config = ServerConfig(port=0, listen_when_ready=True)
    listened: list[object] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "create_server", lambda *_, **options: listened.append(options))
    running = asyncio.create_task(run_app(engine, config, bind(config), asyncio.Event()))
    await engine.loading.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(SECONDS):
        assert await running == 0
    assert listened == []


@pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_with_listen_when_ready_a_port_that_another_server_took_meanwhile_is_named(
    model_info: ModelInfo, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def lose_the_port() -> None:
        engine = SlowEngine(model_info)
        config = ServerConfig(port=0, listen_when_ready=True)
        (listener,) = bind(config)
        port = listener.getsockname()[1]
        running = asyncio.create_task(run_app(engine, config, [listener], asyncio.Event()))
        await engine.loading.wait()
        with socket.create_server(("127.0.0.1", port)):
            engine.loaded.set()
            with pytest.raises(ListenError, match=f"port {port} of 127.0.0.1 is taken"):
                await running
        assert engine.was_closed

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(lose_the_port())
