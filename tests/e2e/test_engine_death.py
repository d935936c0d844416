"""The death of the engine process in the middle of eight streams, which the server survives."""

from __future__ import annotations

import asyncio
import json
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
        tmp_path_factory.mktemp("mortal") / "server.log", str(tiny_llama), "--dtype=float32"
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


@pytest.mark.anyio
async def test_the_server_survives_its_engine(mortal: LiveServer) -> None:
    url = mortal.url
    async with httpx.AsyncClient(timeout=60) as client:
        before = (await client.post(f"{url}/v1/completions", json=body(8, stream=False))).json()["choices"][0]
        started = asyncio.Barrier(STREAMS + 1)
        streams = [asyncio.create_task(read_until_it_ends(client, url, started)) for _ in range(STREAMS)]
        await started.wait()
        engine_of(mortal).kill()
        async with asyncio.timeout(5):
            endings = await asyncio.gather(*streams)
        for lines in endings:
            assert json.loads(lines[-1])["error"]["type"] == "server_error"
            assert "[DONE]" not in lines
        ready = await client.get(f"{url}/ready")
        assert ready.status_code == 503
        assert (await client.get(f"{url}/health")).status_code == 200
        refused = await client.post(f"{url}/v1/completions", json=body(8, stream=False))
        assert refused.status_code == 503
        assert refused.json()["error"]["message"]
        await asyncio.to_thread(mortal.wait_ready, 60)
        after = (await client.post(f"{url}/v1/completions", json=body(8, stream=False))).json()["choices"][0]
    assert (after["text"], after["logits"]) == (before["text"], before["logits"])
