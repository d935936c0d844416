"""Life of an engine process, with a scripted process in its place."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import psutil
import pytest
import scripted_process
from logitengine import EngineClient, EngineConfig, EngineDeadError, EngineNotReadyError, RequestFatalError
from logitengine.errors import CheckpointError, EngineError
from logitengine.link import supervisor, watch
from logitengine.link.messages import Failed, FromEngine, Ready
from msgspec.structs import replace
from support import Collected, greedy

pytestmark = pytest.mark.anyio

DEADLINE = 60.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_SECONDS", (0.0, 0.0, 0.0))


class Clock:
    """A clock that advances only when a test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(model: Path, clock: Clock | None = None, **options: float) -> AsyncIterator[EngineClient]:
    # The scripted process has no heartbeats, so it must not count as hung.
    config = EngineConfig.model_validate({"model": str(model), "engine_timeout": 0, **options})
    client = EngineClient(config, command=scripted_process.COMMAND, clock=clock or Clock())
    await client.start()
    try:
        async with asyncio.timeout(DEADLINE):
            await client.wait_ready()
            yield client
    finally:
        await client.close()


async def ask(client: EngineClient, name: str, grammar: str | None = None) -> Collected:
    collected = Collected()
    async with aclosing(client.generate(replace(greedy(name, [1], 5), grammar=grammar))) as outputs:
        async for output in outputs:
            collected.add(output)
    return collected


async def error_of(client: EngineClient, name: str) -> EngineError:
    with pytest.raises(EngineError) as caught:
        await ask(client, name)
    return caught.value


async def until_restarted(client: EngineClient) -> None:
    """Wait until a process has ended and the next one is not ready."""
    async with asyncio.timeout(DEADLINE):
        while "restarted" not in (client.not_ready_reason() or ""):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.001)


async def test_a_process_that_says_nothing_for_ten_seconds_does_not_answer(tmp_path: Path) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as client:
        clock.now += 9
        assert client.not_ready_reason() is None
        clock.now += 2
        assert "does not answer" in (client.not_ready_reason() or "")
        await ask(client, "answer 1")
        assert client.not_ready_reason() is None


@pytest.mark.parametrize(
    ("step", "longest", "stuck"),
    [
        ("None", "500", False),
        ("29", "0.01", False),
        ("31", "0.01", True),
        ("100", "20", False),
        ("201", "20", True),
    ],
)
async def test_a_step_is_stuck_when_it_takes_ten_times_the_longest_and_half_a_minute(
    tmp_path: Path, step: str, longest: str, *, stuck: bool
) -> None:
    """A long prefill sends no output and is not stuck."""
    async with running(tmp_path) as client:
        await ask(client, f"beat {step} {longest}")
        assert ("stuck" in (client.not_ready_reason() or "")) == stuck
        await ask(client, "beat None 20")
        assert client.not_ready_reason() is None


async def test_newcomers_wait_while_a_dead_process_is_reaped(tmp_path: Path) -> None:
    """The dead process has closed its socket and takes its time to exit."""
    async with running(tmp_path) as client:
        pid = client.pid
        assert pid is not None
        asked = asyncio.create_task(error_of(client, "begin, then hang up"))
        await until_restarted(client)
        os.kill(pid, 0)  # the process still exists
        newcomers = [asyncio.create_task(ask(client, f"answer {number}")) for number in range(3)]
        assert isinstance(await asked, EngineDeadError)
        for newcomer in newcomers:
            assert (await newcomer).token_ids == [7]
        assert client.not_ready_reason() is None
        assert client.pid != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_failing_step_fails_what_it_had_begun_and_the_rest_is_queued_again(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        told = client.generate(greedy("begin", [1], 5))
        await anext(told)
        untold = asyncio.create_task(error_of(client, "untold"))
        waiting = [asyncio.create_task(ask(client, f"later {number}")) for number in range(3)]
        failed = await error_of(client, "fail untold")
        assert isinstance(failed, EngineDeadError)
        assert isinstance(await untold, EngineDeadError)
        with pytest.raises(EngineDeadError):
            await anext(told)
        assert "restarted" in (client.not_ready_reason() or "")
        assert (await ask(client, "answer early")).token_ids == [7]
        for answer in waiting:
            assert (await answer).token_ids == [7]
        assert client.not_ready_reason() is None
        assert (await ask(client, "answer late")).token_ids == [7]


async def test_a_silent_death_fails_what_was_answered_in_part_and_the_rest_is_queued_again(
    tmp_path: Path,
) -> None:
    """Nothing of the others has reached a client, so another process can serve them."""
    async with running(tmp_path) as client:
        told = client.generate(greedy("begin", [1], 5))
        await anext(told)
        waiting = [asyncio.create_task(ask(client, f"later {number}")) for number in range(3)]
        constrained = asyncio.create_task(ask(client, "later with a grammar", "five!"))
        assert isinstance(await error_of(client, "begin, then exit"), EngineDeadError)
        with pytest.raises(EngineDeadError, match="working on this request"):
            await anext(told)
        for answer in waiting:
            assert (await answer).token_ids == [7]
        assert (await constrained).token_ids == [len("five!")], "with its grammar"


@pytest.mark.usefixtures("without_pauses")
async def test_a_request_that_ends_every_process_ends_two(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        lost = asyncio.create_task(client.wait_lost())
        assert isinstance(await error_of(client, "exit"), RequestFatalError)
        assert (await ask(client, "answer")).token_ids == [7]
        assert not lost.done()
        lost.cancel()
    assert len((tmp_path / "lived").read_text().split()) == 3


async def test_a_request_is_queued_again_once(tmp_path: Path) -> None:
    """A request that ends every process before it has begun must not be queued again endlessly."""
    async with running(tmp_path) as client:
        survivor = asyncio.create_task(error_of(client, "survivor"))
        await ask(client, "answer 1")
        await error_of(client, "fail 1")
        await client.wait_ready()
        assert not survivor.done()
        await error_of(client, "fail 1")
        assert type(await survivor) is EngineDeadError  # not because of it


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize(
    ("ending", "reason"), [("close", "the server is shutting down"), ("broken", "died 3 times in a row")]
)
async def test_what_waits_for_another_process_fails_with_the_reason_when_none_comes(
    tmp_path: Path, ending: str, reason: str
) -> None:
    async with running(tmp_path) as client:
        waiting = [asyncio.create_task(error_of(client, "later"))]
        await ask(client, "answer 1")
        (tmp_path / ("hangs" if ending == "close" else "broken")).touch()
        await error_of(client, "fail 1")
        waiting.append(asyncio.create_task(error_of(client, "newcomer")))
        await asyncio.sleep(0)
        if ending == "close":
            await client.close()
        for error in [await task for task in waiting]:
            assert isinstance(error, EngineDeadError)
            assert reason in str(error)
        late = await error_of(client, "late")
        assert isinstance(late, EngineNotReadyError)
        assert reason in str(late)


async def test_a_model_that_cannot_be_served_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "unservable").touch()
    with pytest.raises(CheckpointError, match="its files are damaged"):
        async with running(tmp_path):
            pass
    client = EngineClient(EngineConfig(model=str(tmp_path)), command=scripted_process.COMMAND)
    await client.start()
    try:
        with pytest.raises(CheckpointError, match="its files are damaged"):
            await client.wait_located()
        assert client.not_ready_reason() == "its files are damaged"
    finally:
        await client.close()


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("unservable", "the model cannot be served any more: its files are damaged"),
        ("replaced", "the model is not the one that the server started with"),
    ],
)
async def test_a_model_whose_files_were_damaged_or_replaced_meanwhile_is_not_served_again(
    tmp_path: Path, file: str, reason: str
) -> None:
    """Replaced ones would be served with the tokenizer of the old ones. One process tells."""
    async with running(tmp_path) as client:
        (tmp_path / file).touch()
        await error_of(client, "begin, then exit")
        assert reason in await client.wait_lost()
        late = await error_of(client, "late")
        assert isinstance(late, EngineNotReadyError)
        assert reason in str(late)
    assert len((tmp_path / "lived").read_text().split()) == 2


async def test_the_model_is_described_by_the_process_that_serves(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        for _ in range(2):
            info = await client.wait_ready()
            assert client.info == info
            assert info.num_blocks == client.pid
            await error_of(client, "begin, then exit")


async def test_a_process_that_scored_a_prompt_has_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After such a death the next process is started soon."""
    async with running(tmp_path) as client:
        for _ in range(2):
            await client.wait_ready()
            await ask(client, "score")
            await error_of(client, "begin, then exit")
        await client.wait_ready()
    deaths = [record.args for record in caplog.records if "starting another" in record.msg]
    assert deaths == [("exit code 0", 0.1), ("exit code 0", 0.1)]


@pytest.mark.usefixtures("without_pauses")
async def test_an_engine_that_dies_quickly_three_times_in_a_row_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        lost = asyncio.create_task(client.wait_lost())
        for _ in range(3):
            await client.wait_ready()
            assert not lost.done()
            await error_of(client, "begin, then exit")
        assert "died 3 times" in await lost
        assert client.not_ready_reason() == lost.result()
        with pytest.raises(EngineDeadError):
            await client.wait_ready()


@pytest.mark.usefixtures("without_pauses")
async def test_an_engine_that_cannot_be_started_again_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        (tmp_path / "broken").touch()
        await error_of(client, "begin, then exit")
        assert "died 3 times" in await client.wait_lost()


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize("life", ["it answered", "it lived for long"])
async def test_a_death_after_work_or_after_a_long_life_is_not_quick(tmp_path: Path, life: str) -> None:
    clock = Clock()
    async with running(tmp_path, clock) as client:
        lost = asyncio.create_task(client.wait_lost())
        for number in range(7):
            await client.wait_ready()
            if number % 3 == 2 and life == "it answered":
                await ask(client, "answer")
            elif number % 3 == 2:
                clock.now += supervisor.QUICK_SECONDS + 1
                async with aclosing(client.generate(greedy("begin", [1], 5))) as outputs:
                    await anext(outputs)
            await error_of(client, "begin, then exit")
        await client.wait_ready()
        assert not lost.done()
        lost.cancel()


@pytest.mark.usefixtures("without_pauses")
async def test_counters_go_on_where_those_of_the_last_process_ended(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        await ask(client, "answer")
        assert (client.stats.num_generated_tokens, client.num_restarts) == (1, 0)
        for number in (1, 2):
            await error_of(client, "begin, then exit")
            await client.wait_ready()
            assert (client.stats.num_generated_tokens, client.num_restarts) == (number, number)
            await ask(client, "answer")
            assert client.stats.num_generated_tokens == number + 1


async def test_a_silent_process_is_replaced_and_the_next_one_serves_what_waited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, engine_timeout=3) as client:
        told = client.generate(greedy("begin", [1], 5))
        await anext(told)
        untold = asyncio.create_task(ask(client, "later"))
        with pytest.raises(EngineDeadError):
            await anext(told)
        assert client.not_ready_reason() == "the engine hung and is being restarted"
        assert (await ask(client, "answer")).token_ids == [7]
        assert (await untold).token_ids == [7]
    assert "the engine hangs and is killed: it has said nothing for 4 s (--engine-timeout)" in caplog.messages


@pytest.mark.parametrize("served", [False, True], ids=["at once", "after an hour"])
@pytest.mark.usefixtures("without_pauses")
async def test_a_process_with_an_endless_step_is_replaced(tmp_path: Path, *, served: bool) -> None:
    """It died when the step began: engines that hang at each first request must not be started for ever."""
    clock = Clock()
    async with running(tmp_path, clock, step_timeout=600) as client:
        lost = asyncio.create_task(client.wait_lost())
        for number in range(2):
            await client.wait_ready()
            if served:
                clock.now += 3600
            # Both the first process and the one after it hang at the request.
            assert isinstance(await error_of(client, f"stuck 70{number}"), EngineDeadError)
        if served:
            assert (await ask(client, "answer")).token_ids == [7]
            assert not lost.done()
            lost.cancel()
        else:
            assert "died 3 times" in await lost


async def test_a_first_load_that_hangs_ends_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOADING_FACTOR", 1)
    (tmp_path / "hangs").touch()
    with pytest.raises(EngineDeadError, match="hung while it was loading: it has said nothing for 4 s"):
        async with running(tmp_path, engine_timeout=3):
            pass


async def reaped(pid: int) -> None:
    """Wait until asyncio has noticed the end of a process, or its transport would be left open."""
    while psutil.pid_exists(pid):  # noqa: ASYNC110 - nothing announces it
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)


async def test_an_engine_whose_process_cannot_be_killed_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that the kernel holds in a call stays, whatever it is sent."""
    monkeypatch.setattr(supervisor, "EXIT_SECONDS", 0.05)
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda _: None)
    async with running(tmp_path) as client:
        pid = client.pid
        assert pid is not None
        try:
            waiting = asyncio.create_task(error_of(client, "later"))
            await error_of(client, "begin, then hang up")
            assert "cannot be killed" in await client.wait_lost()
            assert "cannot be killed" in str(await waiting)
            assert client.not_ready_reason() == await client.wait_lost()
        finally:
            os.kill(pid, signal.SIGKILL)
            await reaped(pid)
    assert f"the engine process {pid} does not end although it was killed" in caplog.messages
    assert (tmp_path / "lived").read_text().split() == [str(pid)]


async def test_a_server_that_ends_beside_a_process_that_cannot_be_killed_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "EXIT_SECONDS", 0.05)
    monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda _: None)
    async with running(tmp_path) as client:
        pid = client.pid
        assert pid is not None
        await error_of(client, "begin, then hang up")
        try:
            await client.close()
            assert client.not_ready_reason() == "the server is shutting down"
        finally:
            os.kill(pid, signal.SIGKILL)
            await reaped(pid)


@pytest.mark.parametrize("message", [Failed("a late fault", []), Ready(scripted_process.model_info())])
async def test_what_a_process_says_after_the_end_began_changes_nothing(
    tmp_path: Path, message: FromEngine
) -> None:
    async with running(tmp_path) as client:
        ended = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        client._supervisor._handle(message)
        assert client.not_ready_reason() == "the server is shutting down"
        with pytest.raises(EngineNotReadyError, match="shutting down"):
            await anext(client.generate(greedy("late", [1], 5)))
        await ended


@pytest.mark.usefixtures("without_pauses")
@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (40, "40")])
async def test_the_log_tells_which_signal_ended_the_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int, name: str
) -> None:
    """Most real-time signals have no name."""
    async with running(tmp_path) as client:
        told = client.generate(greedy("begin", [1], 5))
        await anext(told)
        assert client.pid is not None
        os.kill(client.pid, number)
        with pytest.raises(EngineDeadError):
            await anext(told)
        await client.wait_ready()
    assert f"the engine process died (signal {name}); starting another" in caplog.text
