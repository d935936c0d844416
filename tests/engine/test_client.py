"""The engine in its own process, through the client that the server uses."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import faulty_process
import psutil
import pytest
from logitengine import (
    EngineClient,
    EngineConfig,
    EngineDeadError,
    EngineOverloadedError,
    GenerationRequest,
    LogitsSpec,
    RequestRefusedError,
    SamplingParams,
    StepOutput,
)
from logitengine.errors import CheckpointError
from logitengine.link.supervisor import ENGINE_COMMAND
from support import Collected, greedy

pytestmark = pytest.mark.anyio

DEADLINE = 60.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def running_client(
    model: Path | str,
    *,
    command: Sequence[str] = ENGINE_COMMAND,
    clock: Callable[[], float] = time.monotonic,
    **options: object,
) -> AsyncIterator[EngineClient]:
    config = EngineConfig.model_validate(
        {"model": str(model), "dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1, **options}
    )
    client = EngineClient(config, command=command, clock=clock)
    await client.start()
    try:
        async with asyncio.timeout(DEADLINE):
            located, info = await asyncio.gather(client.wait_located(), client.wait_ready())
        assert located == info.tokenizer_path
        yield client
    finally:
        pid = client.pid
        await client.close()
        assert pid is None or not psutil.pid_exists(pid), "closing ends the process"


ROW_BYTES = 4 * 49152


@pytest.fixture(scope="module")
async def client(tiny_llama: Path) -> AsyncIterator[EngineClient]:
    """Return a client of one process for the tests that leave it as it was. Four unread rows fill a request's window."""
    async with running_client(tiny_llama, logits_window_bytes=4 * ROW_BYTES) as shared:
        yield shared


async def collect(client: EngineClient, request: GenerationRequest) -> Collected:
    collected = Collected()
    async with aclosing(client.generate(request)) as outputs:
        async for output in outputs:
            collected.add(output)
    return collected


async def until(condition: object, client: EngineClient) -> None:
    """Wait for ``condition(client.stats)``; the engine sends its stats at least once a second."""
    assert callable(condition)
    async with asyncio.timeout(DEADLINE):
        while not condition(client.stats):  # noqa: ASYNC110 - the stats are a value, nothing announces them
            await asyncio.sleep(0.01)


def endless(request_id: str, logits: LogitsSpec | None = None) -> GenerationRequest:
    return greedy(request_id, [1, 2, 3], 400, logits)


async def test_a_request_streams_its_tokens_and_rows(client: EngineClient) -> None:
    answer = await collect(client, greedy("a", [1, 2, 3], 5, LogitsSpec()))
    assert len(answer.token_ids) == 5
    assert answer.rows.argmax(-1).tolist() == answer.token_ids
    assert answer.finish_reason == "length"


async def test_requests_run_together(client: EngineClient) -> None:
    alone = await collect(client, greedy("alone", [5, 6, 7], 20))
    before = client.stats.num_steps
    together = await asyncio.gather(*(collect(client, greedy(f"r{i}", [5, 6, 7], 20)) for i in range(8)))
    assert all(answer.token_ids == alone.token_ids for answer in together)
    assert client.stats.num_steps - before < 8 * 20


async def test_closing_the_stream_early_frees_the_blocks(client: EngineClient) -> None:
    before = client.stats.num_generated_tokens
    async with aclosing(client.generate(endless("a"))) as outputs:
        await anext(outputs)
    await until(lambda stats: stats.num_running == 0 and stats.num_used_blocks == 0, client)
    assert client.stats.num_generated_tokens - before < 400


async def test_aborting_a_choice_leaves_the_others(client: EngineClient) -> None:
    request = GenerationRequest(
        request_id="a",
        prompt_token_ids=[1, 2, 3],
        n=3,
        sampling=SamplingParams(max_tokens=30, temperature=1.0, seed=7, ignore_eos=True),
    )
    seen: dict[int, int] = {}
    async with aclosing(client.generate(request)) as outputs:
        async for output in outputs:
            seen[output.index] = seen.get(output.index, 0) + len(output.token_ids)
            if seen.get(1) == 2:
                client.abort_choice("a", 1)
    assert seen == {0: 30, 1: 2, 2: 30}


async def test_a_dead_engine_fails_its_requests_and_comes_back(tiny_llama: Path) -> None:
    async with running_client(tiny_llama) as client:
        before = await collect(client, greedy("before", [1, 2, 3], 10))
        streams = [client.generate(endless(f"r{i}")) for i in range(8)]
        for stream in streams:
            await anext(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            for stream in streams:
                with pytest.raises(EngineDeadError):
                    async for _ in stream:
                        pass
        reason = client.not_ready_reason()
        assert reason is not None
        assert "restarted" in reason
        async with asyncio.timeout(DEADLINE):
            early = await collect(client, greedy("early", [1, 2, 3], 10))
        assert early.token_ids == before.token_ids
        assert client.not_ready_reason() is None
        after = await collect(client, greedy("after", [1, 2, 3], 10))
        assert after.token_ids == before.token_ids


async def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    client = EngineClient(EngineConfig(model=str(tmp_path)))
    await client.start()
    try:
        async with asyncio.timeout(DEADLINE):
            with pytest.raises(CheckpointError, match=r"config\.json"):
                await client.wait_ready()
            with pytest.raises(CheckpointError, match=r"config\.json"):
                await client.wait_located()
        assert "config.json" in (client.not_ready_reason() or "")
    finally:
        await client.close()


async def test_requests_that_cannot_be_served_are_refused_with_the_reason(client: EngineClient) -> None:
    for request, reason in [
        (greedy("long", [1] * 600, 1), "context of 512"),
        (greedy("empty", [], 1), "no tokens"),
        (greedy("outside", [49152], 1), "vocabulary"),
    ]:
        with pytest.raises(RequestRefusedError, match=reason):
            await collect(client, request)
    assert (await collect(client, greedy("fine", [1], 1))).finish_reason == "length"


async def test_a_full_queue_refuses_more(tiny_llama: Path) -> None:
    async with running_client(tiny_llama, max_num_seqs=1, max_waiting=1) as client:
        async with aclosing(client.generate(endless("running"))) as running:
            await anext(running)
            waiting = asyncio.create_task(collect(client, endless("waiting")))
            await until(lambda stats: stats.num_waiting == 1, client)
            with pytest.raises(EngineOverloadedError):
                await collect(client, endless("too many"))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_reader_that_stops_holds_up_its_own_request_only(client: EngineClient) -> None:
    await until(lambda stats: stats.num_running == 0 and stats.num_used_blocks == 0, client)
    before = client.stats.num_generated_tokens
    slow: AsyncGenerator[StepOutput, None] = client.generate(endless("slow", LogitsSpec()))
    async with aclosing(slow):
        await anext(slow)
        neighbour = await collect(client, endless("neighbour"))
        assert len(neighbour.token_ids) == 400
        # The neighbour's 400 tokens, at most four unread rows of the slow one, and what came after the statistics before.
        assert client.stats.num_generated_tokens - before < 400 + 50
        rest = [output async for output in slow]
        assert len(rest) == 399


async def ready(client: EngineClient) -> None:
    async with asyncio.timeout(DEADLINE):
        while client.not_ready_reason() is not None:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


async def test_a_process_answers_while_it_computes_and_not_while_it_is_stopped(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITSERVE_FAULTS", str(tmp_path))
    now = 1000.0
    async with running_client(tiny_llama, command=faulty_process.COMMAND, clock=lambda: now) as client:
        (tmp_path / "hold").touch()
        asked = asyncio.create_task(collect(client, greedy("long", [1, 2, 3], 5)))
        while not (tmp_path / "held").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for _ in range(2):
            now += 11
            assert "does not answer" in (client.not_ready_reason() or "")
            await ready(client)
        assert not asked.done()
        assert client.pid is not None
        process = psutil.Process(client.pid)
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        now += 11
        assert "does not answer" in (client.not_ready_reason() or "")
        (tmp_path / "hold").unlink()
        process.resume()
        await ready(client)
        assert len((await asked).token_ids) == 5


async def test_a_step_that_raises_fails_what_ran_and_what_waited_is_served_by_the_next_process(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITSERVE_FAULTS", str(tmp_path))
    async with running_client(tiny_llama, command=faulty_process.COMMAND, max_num_seqs=1) as client:
        running = client.generate(endless("running"))
        await anext(running)
        waiting = asyncio.create_task(collect(client, greedy("waiting", [1, 2, 3], 5)))
        await until(lambda stats: stats.num_waiting == 1, client)
        (tmp_path / "fault").touch()
        with pytest.raises(EngineDeadError):
            async for _ in running:
                pass
        assert "restarted" in (client.not_ready_reason() or "")
        async with asyncio.timeout(DEADLINE):
            assert len((await collect(client, greedy("early", [1, 2, 3], 5))).token_ids) == 5
            assert len((await waiting).token_ids) == 5
        assert client.not_ready_reason() is None
