"""What an engine process says of itself every second, on a machine that is suspended again and again."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from logitengine import process
from logitengine.link.channel import BlockingChannel
from logitengine.link.messages import FromEngine, Heartbeat, ToEngine
from logitengine.process import Heart

BEAT = 0.02


@pytest.fixture(autouse=True)
def suspended_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an hour pass between any two looks at the clock, without a heartbeat."""
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: float(next(hours))))
    monkeypatch.setattr(process, "HEARTBEAT_SECONDS", BEAT)


@contextmanager
def beating() -> Iterator[tuple[Heart, BlockingChannel[FromEngine]]]:
    left, right = socket.socketpair()
    engine: BlockingChannel[ToEngine] = BlockingChannel(left, ToEngine)
    server: BlockingChannel[FromEngine] = BlockingChannel(right, FromEngine)
    heart = Heart(engine)
    heart.start()
    try:
        yield heart, server
    finally:
        heart.stop()
        for channel in (engine, server):
            channel.flush(timeout=10)
            channel.close()


def next_beat(server: BlockingChannel[FromEngine], *, in_step: bool = True) -> Heartbeat:
    while True:
        message = server.receive()
        assert isinstance(message, Heartbeat)
        if (message.step_seconds is not None) == in_step:
            return message


def test_a_pause_of_the_machine_does_not_count_as_time_of_the_step() -> None:
    with beating() as (heart, server), heart.step():
        seconds = [next_beat(server).step_seconds for _ in range(4)]
    assert seconds == pytest.approx([BEAT * beat for beat in range(1, 5)])


def test_a_step_is_counted_from_its_own_beginning() -> None:
    with beating() as (heart, server):
        for _ in range(2):
            with heart.step():
                assert next_beat(server).step_seconds == pytest.approx(BEAT)
                next_beat(server)
            assert next_beat(server, in_step=False).longest_step_seconds >= 3600
