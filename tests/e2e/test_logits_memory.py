"""The memory of 1.6 GB of rows: the engine holds a few steps' rows, and other requests lose nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from arrow_reader import open_logits, read_logits
from live_server import LiveServer, serving
from logitengine.config import EngineConfig
from logitengine.link.client import EngineClient
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from support import greedy

MIB = 1 << 20
CONTEXT = 8192
ROW_BYTES = 49152 * 4
WINDOW = 2 * MIB


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Save the tiny model with SmolLM2's context."""
    directory = tmp_path_factory.mktemp("long") / "llama"
    shutil.copytree(tiny_llama, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return directory


def peak_bytes(pid: int) -> int:
    """Return the most resident memory that the process has held, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


async def engine_peak(model: Path, logits: LogitsSpec | None) -> int:
    """Return the peak memory of a fresh engine that reads a full context while a neighbour decodes."""
    client = EngineClient(EngineConfig(model=str(model), dtype="float32", kv_cache_bytes=16 * MIB))
    await client.start()
    try:
        await client.wait_ready()
        long = GenerationRequest(
            request_id="long",
            prompt_token_ids=[3 + i % 40000 for i in range(CONTEXT)],
            sampling=SamplingParams(max_tokens=0),
            logits=logits,
        )
        rows = 0
        neighbour: asyncio.Task[int] | None = None
        async with contextlib.aclosing(client.generate(long)) as outputs:
            async for output in outputs:
                if output.prompt is not None and output.prompt.logits is not None:
                    rows += output.prompt.logits.values.shape[0]
                    neighbour = neighbour or asyncio.create_task(decode(client, 20))
                    if output.finish_reason is not None:
                        assert neighbour.done(), "the neighbour waited for the last row"
        assert rows == (CONTEXT if logits else 0)
        assert await (neighbour or decode(client, 20)) == 20
        assert client.pid is not None
        return peak_bytes(client.pid)
    finally:
        await client.close()


async def decode(client: EngineClient, count: int) -> int:
    tokens = 0
    async with contextlib.aclosing(client.generate(greedy("neighbour", [5, 6, 7], count))) as outputs:
        async for output in outputs:
            tokens += len(output.token_ids)
    return tokens


@pytest.mark.anyio
async def test_every_row_of_a_full_context_costs_the_engine_at_most_64_mib(long_llama: Path) -> None:
    without = await engine_peak(long_llama, None)
    with_rows = await engine_peak(long_llama, LogitsSpec(positions="prompt"))
    assert with_rows - without <= 64 * MIB, f"{(with_rows - without) / MIB:.0f} MiB"


@pytest.fixture(scope="module")
def server(long_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Serve with a cache for one long request and a few short ones, so that leaked blocks show at once."""
    options = ("--logits-window-bytes", str(WINDOW), "--num-blocks", "540", "--no-prefix-caching")
    log = tmp_path_factory.mktemp("long-server") / "server.log"
    with serving(log, str(long_llama), "--dtype", "float32", *options) as server:
        # The first request takes memory that later ones reuse, which the tests do not measure.
        read_logits(server.url, input=[5] * 500)
        yield server


def family(server: LiveServer) -> list[int]:
    """Return the process ids of the server and its engine."""
    process = psutil.Process(server.process.pid)
    return [process.pid, *(child.pid for child in process.children(recursive=True))]


def test_a_client_that_stops_reading_holds_up_nobody_and_nothing(server: LiveServer) -> None:
    prompt = [3 + i % 40000 for i in range(CONTEXT - 1)]

    def short(client: httpx.Client) -> Any:
        body = {"prompt": [5, 6, 7], "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        (choice,) = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
        return choice["text"]

    def read_prompt(client: httpx.Client) -> None:
        """Send a prompt that takes the whole cache, which succeeds only when every block is free."""
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
        client.post("/v1/completions", json=body).raise_for_status()

    with httpx.Client(base_url=server.url, timeout=120) as client:
        expected = short(client)
        read_prompt(client)
        before = {pid: peak_bytes(pid) for pid in family(server)}
        with open_logits(server.url, input=prompt) as reader:
            assert reader.read_next_batch().num_rows * ROW_BYTES <= WINDOW
            # These 320 steps could make more than 100 MB of rows, if nothing held them back.
            for _ in range(10):
                assert short(client) == expected
            grown = {pid: peak_bytes(pid) - peak for pid, peak in before.items()}
        assert len(grown) == 2
        # The bound allows for a window, a step's rows in each buffer, and the memory of any request.
        assert max(grown.values()) <= WINDOW + 14 * MIB, {
            pid: f"{n / MIB:.1f} MiB" for pid, n in grown.items()
        }
        read_prompt(client)
        assert short(client) == expected


def test_several_stalled_inputs_hold_a_window_each_and_no_more(server: LiveServer) -> None:
    inputs = [[3 + i for i in range(500 + j)] for j in range(12)]
    before = {pid: peak_bytes(pid) for pid in family(server)}
    with httpx.Client(base_url=server.url, timeout=120) as client:
        body = {"prompt": [5, 6, 7], "max_tokens": 64, "temperature": 0, "ignore_eos": True}
        with open_logits(server.url, input=inputs) as reader:
            reader.read_next_batch()
            client.post("/v1/completions", json=body).raise_for_status()
            grown = {pid: peak_bytes(pid) - peak for pid, peak in before.items()}
    assert max(grown.values()) <= 2 * WINDOW + 14 * MIB, grown


@pytest.mark.anyio
async def test_many_whole_answers_at_once_are_served_within_the_budget(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """24 answers of 200 full rows are 1.26 GB of base64."""
    body = {
        "prompt": [5 + i for i in range(200)],
        "max_tokens": 1,
        "return_logits": {"positions": "prompt"},
        "temperature": 0,
    }
    length = 200 * ROW_BYTES * 4 // 3

    async def answer(client: httpx.AsyncClient) -> int:
        """Return the status of an answer, whose body is read and not kept."""
        async with client.stream("POST", "/v1/completions", json=body) as response:
            received = 0
            async for piece in response.aiter_raw():
                received += len(piece)
        if response.status_code == 200:
            assert received > length
            assert received == int(response.headers["content-length"])
        return response.status_code

    with serving(tmp_path / "server.log", str(tiny_llama), "--dtype", "float32") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=250) as client:
            assert await answer(client) == 200
            before = peak_bytes(server.process.pid)
            statuses = await asyncio.gather(*(answer(client) for _ in range(24)))
        grown = peak_bytes(server.process.pid) - before
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 12
    assert grown < 1.2 * (1 << 30), f"{grown / MIB:.0f} MiB"
