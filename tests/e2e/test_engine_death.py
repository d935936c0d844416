"""The engine process dies, hangs or is paused in the middle of eight streams, and the server survives it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from live_server import LiveServer, serving

STREAMS = 8


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[LiveServer]:
    with serving(
        tmp_path_factory.mktemp("mortal") / "server.log",
        str(tiny_llama),
        "--dtype=float32",
        "--num-threads=1",
        "--engine-timeout=5",
    ) as server:
        yield server


def engine_of(server: LiveServer) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    (engine,) = [child for child in children if "logitengine.process" in " ".join(child.cmdline())]
    return engine


def body(max_tokens: int, *, stream: bool) -> dict[str, object]:
    return {
        "prompt": [1, 2, 3],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "return_logits": {"top_k": 1},
    }


async def read_until_it_ends(client: httpx.AsyncClient, url: str, started: asyncio.Barrier) -> list[str]:
    """Return the data lines of one stream. Wait at the barrier when the first line has come."""
    lines: list[str] = []
    async with client.stream("POST", f"{url}/v1/completions", json=body(450, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                if len(lines) == 1:
                    await started.wait()
    return lines


async def begun_streams(client: httpx.AsyncClient, url: str) -> list[asyncio.Task[list[str]]]:
    """Return streams of which each has brought something, and none has ended."""
    started = asyncio.Barrier(STREAMS + 1)
    streams = [asyncio.create_task(read_until_it_ends(client, url, started)) for _ in range(STREAMS)]
    await started.wait()
    return streams


async def answers(client: httpx.AsyncClient, url: str, count: int) -> list[dict[str, object]]:
    """Return the choices of as many short requests, sent at once; each must be answered."""
    sent = [client.post(f"{url}/v1/completions", json=body(8, stream=False)) for _ in range(count)]
    replies = await asyncio.gather(*sent)
    assert [reply.status_code for reply in replies] == [200] * count
    return [{name: reply.json()["choices"][0][name] for name in ("text", "logits")} for reply in replies]


def assert_ended_with_an_error(lines: list[str]) -> None:
    assert json.loads(lines[-1])["error"]["code"] == "engine_dead"
    assert "[DONE]" not in lines


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["kill", "stop"])
async def test_the_server_survives_its_engine(mortal: LiveServer, end: str) -> None:
    """What had begun ends with an error, and no later request sees one: it waits for the next process."""
    url = mortal.url
    async with httpx.AsyncClient(timeout=180) as client:
        (before,) = await answers(client, url, 1)
        streams = await begun_streams(client, url)
        engine = engine_of(mortal)
        engine.kill() if end == "kill" else engine.suspend()
        later = asyncio.create_task(answers(client, url, 4))
        for lines in await asyncio.gather(*streams):
            assert_ended_with_an_error(lines)
        assert (await client.get(f"{url}/health")).status_code == 200
        ready = await client.get(f"{url}/ready")
        assert ready.status_code == 503
        assert "restarted" in ready.json()["error"]["message"]
        latest = await answers(client, url, 4)
        assert [*await later, *latest] == [before] * 8
        assert (await client.get(f"{url}/ready")).status_code == 200
    assert not engine.is_running()


@pytest.mark.anyio
async def test_a_pause_of_the_whole_server_costs_no_stream(mortal: LiveServer) -> None:
    """A machine that is suspended looks so: the engine says nothing, and the server hears nothing."""
    server, engine = psutil.Process(mortal.process.pid), engine_of(mortal)
    async with httpx.AsyncClient(timeout=180) as client:
        streams = await begun_streams(client, mortal.url)
        server.suspend()
        engine.suspend()
        await asyncio.to_thread(time.sleep, 8)  # longer than --engine-timeout
        engine.resume()
        server.resume()
        assert [lines[-1] for lines in await asyncio.gather(*streams)] == ["[DONE]"] * STREAMS
    assert engine_of(mortal) == engine
