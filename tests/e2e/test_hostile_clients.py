"""Clients that attack a server, while eight well-behaved streams read the same as they would alone.

After each attack nothing is left over: no sequence, no KV block and no file descriptor.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import random
import resource
import select
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from live_server import LiveServer, serving

pytestmark = [pytest.mark.anyio, pytest.mark.attacks]

COMPLETIONS = "/v1/completions"
NUM_STREAMS = 8
OBSERVED = Path(__file__).parent.parent / "helpers" / "observed_server.py"
TIMES = ("--head-timeout", "2", "--body-timeout", "2", "--write-timeout", "2", "--keep-alive", "2")
SIZES = ("--dtype", "float32", "--num-threads", "1", "--no-prefix-caching", "--max-connections", "12000")
SETTLE_SECONDS = 60
"""Time for an attack's leftovers to end. Those that a timeout of the server ends are gone after 2 s."""


@dataclass(frozen=True)
class Server:
    """A server whose engine's statistics and file descriptors can be read."""

    live: LiveServer
    stats_file: Path

    @property
    def url(self) -> str:
        return self.live.url

    @property
    def address(self) -> tuple[str, int]:
        address = urlsplit(self.live.url)
        return str(address.hostname), int(address.port or 0)

    def stats(self) -> dict[str, int]:
        """Return the engine's statistics of this moment."""
        self.stats_file.unlink(missing_ok=True)
        self.live.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                found: dict[str, int] = json.loads(self.stats_file.read_bytes())
                return found
            time.sleep(0.01)
        pytest.fail("the server wrote no statistics")

    def num_descriptors(self) -> list[int]:
        """Return the number of open files of the server and of its engine."""
        server = psutil.Process(self.live.process.pid)
        return [process.num_fds() for process in (server, *server.children())]

    def leftovers(self, descriptors: list[int]) -> dict[str, Any]:
        """Return an attack's leftovers; an empty dictionary if there are none."""
        stats = self.stats()
        held = ("num_running", "num_waiting", "num_parked", "num_used_blocks")
        left: dict[str, Any] = {name: stats[name] for name in held if stats[name]}
        if any(now > before for now, before in zip(self.num_descriptors(), descriptors, strict=True)):
            left["descriptors"] = (descriptors, self.num_descriptors())
        return left

    async def wait_clean(self, descriptors: list[int]) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while left := await asyncio.to_thread(self.leftovers, descriptors):
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def server(
    tiny_llama: Path, value_heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("hostile")
    stats_file = directory / "stats.json"
    head = ("--value-head", f"helpful={value_heads['helpful']}")
    program = [str(OBSERVED), str(stats_file)]
    with serving(directory / "server.log", str(tiny_llama), *TIMES, *SIZES, *head, program=program) as live:
        yield Server(live, stats_file)


# The eight streams.


def stream_body(index: int) -> dict[str, Any]:
    return {
        "prompt": list(range(5 + index, 45 + 3 * index)),
        "max_tokens": 24,
        "temperature": 1.0,
        "seed": index,
        "ignore_eos": True,
        "stream": True,
        "return_logits": {"positions": "all", "top_k": 64, "encoding": "base64"},
    }


async def read_stream(client: httpx.AsyncClient, index: int) -> list[Any]:
    """Return the choice as its chunks join to it, since its division into events may differ."""
    members: dict[str, list[str]] = {}
    ids: list[int] = []
    async with client.stream("POST", COMPLETIONS, json=stream_body(index)) as response:
        assert response.status_code == 200, await response.aread()
        is_done = False
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                continue
            choice = json.loads(line[6:])["choices"][0]
            ids += choice.get("token_ids") or []
            for kind, block in choice.get("logits", {}).items():
                if isinstance(block, dict):
                    members.setdefault(kind, []).append(block["token_ids"] + "|" + block["values"])
    assert is_done
    return [ids, members["generated"], members["prompt"]]


@pytest.fixture(scope="module")
def expected(server: Server) -> list[list[Any]]:
    """Return each stream's choice as it is without attacks."""

    async def read_each() -> list[list[Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            return [await read_stream(client, index) for index in range(NUM_STREAMS)]

    return asyncio.run(read_each())


@contextlib.asynccontextmanager
async def streams_are_unharmed(server: Server, expected: list[list[Any]]) -> AsyncIterator[None]:
    """Repeat eight streams while the block runs.

    Each must get its own ids and rows every time, and at least once.
    """
    over = asyncio.Event()

    async def repeat(index: int) -> int:
        num_read = 0
        # Without kept connections: the attack runs in this process and may delay a client by more than --keep-alive.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            while not over.is_set() or num_read == 0:
                ids, generated, prompt = await read_stream(client, index)
                assert ids == expected[index][0]
                assert (rows(generated), rows(prompt)) == (rows(expected[index][1]), rows(expected[index][2]))
                num_read += 1
        return num_read

    descriptors = server.num_descriptors()
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(repeat(index)) for index in range(NUM_STREAMS)]
        yield
        over.set()
    assert all(reader.result() for reader in readers)
    await server.wait_clean(descriptors)


def rows(blocks: list[str]) -> bytes:
    """Return the numbers of several blocks as one run of bytes."""
    columns = [block.split("|") for block in blocks]
    return b"".join(base64.b64decode(ids) for ids, _ in columns) + b"".join(
        base64.b64decode(values) for _, values in columns
    )


# The attacks.

Attack = Callable[[Server], Awaitable[None]]


def head(path: str = COMPLETIONS, *lines: str) -> bytes:
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", *lines, "", ""]
    ).encode()


async def exchange(server: Server, content: bytes) -> bytes:
    """Send bytes and return everything that comes back until the server closes."""
    reader, writer = await asyncio.open_connection(*server.address)
    with contextlib.closing(writer):
        writer.write(content)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            return await reader.read()
    return b""


async def trickle(server: Server, first: bytes, rest: bytes) -> bytes:
    """Send ``rest`` a byte at a time until the server answers or closes, and return its answer."""
    reader, writer = await asyncio.open_connection(*server.address)
    with contextlib.closing(writer):
        writer.write(first)
        answer = asyncio.create_task(reader.read())
        for byte in rest:
            if answer.done():
                break
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                writer.write(bytes([byte]))
                await writer.drain()
            await asyncio.wait([answer], timeout=0.1)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            return await answer
    return b""


async def slow_heads(server: Server) -> None:
    answers = await asyncio.gather(*(trickle(server, b"", head() * 100) for _ in range(100)))
    assert all(not answer or answer.startswith(b"HTTP/1.1 408") for answer in answers)


async def slow_bodies(server: Server) -> None:
    first = head(COMPLETIONS, "content-length: 100000")
    answers = await asyncio.gather(*(trickle(server, first, b" " * 100_000) for _ in range(100)))
    assert all(not answer or answer.startswith(b"HTTP/1.1 408") for answer in answers)


async def silent_connections(server: Server) -> None:
    """Open 10,000 connections that say nothing, or as many as this process may open, and wait until all are closed."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    writers: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    for start in range(0, count := min(10_000, soft - 500), 200):
        opening = (asyncio.open_connection(*server.address) for _ in range(min(200, count - start)))
        writers += await asyncio.gather(*opening)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        answer = await client.post(COMPLETIONS, json={"prompt": [5], "max_tokens": 1})
        assert answer.status_code == 200
    for reader, writer in writers:
        with contextlib.suppress(ConnectionResetError):
            assert not await reader.read()
        writer.close()


async def huge_heads(server: Server) -> None:
    padding = "a" * (1 << 20)
    answers = await asyncio.gather(
        *(exchange(server, head(COMPLETIONS, f"x-a: {padding}")) for _ in range(20))
    )
    answers += [await exchange(server, head(COMPLETIONS, *(f"x-{i}: a" for i in range(2000))))]
    assert all(not answer or answer.startswith(b"HTTP/1.1 431") for answer in answers)
    assert any(answers)


async def nested_json(server: Server) -> None:
    deep = [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}"]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        for path in (COMPLETIONS, "/v1/chat/completions", "/v1/logits", "/tokenize"):
            for content in deep:
                answer = await client.post(path, content=content)
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["code"] in {"invalid_json", "too_many_values"}


async def compressed_bombs(server: Server) -> None:
    bomb = gzip.compress(bytes(100 << 20))
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        answers = await asyncio.gather(
            *(client.post(COMPLETIONS, content=bomb, headers=headers) for _ in range(50))
        )
    assert {answer.status_code for answer in answers} == {413}


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {"prompt": "a b c", "max_tokens": 40, "stream": True, "return_logits": True}),
    (COMPLETIONS, {"prompt": "a b c", "max_tokens": 40, "return_logits": True}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 40, "stream": True},
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 40, "n": 3}),
    ("/v1/logits", {"input": [5] * 200}),
    ("/v1/perplexity", {"input": ["a b c"] * 20}),
    ("/v1/embeddings", {"input": ["a b c"] * 20}),
    ("/v1/rewards", {"input": ["a b c"] * 20, "return_values": True}),
    ("/pooling", {"input": "a b c"}),
    ("/tokenize", {"prompt": "a b c " * 1000}),
    ("/detokenize", {"tokens": [5] * 400}),
]
GETS = [
    "/v1/models",
    "/v1/models/x",
    "/tokenizer_info",
    "/openapi.json",
    "/version",
    "/metrics",
    "/health",
    "/ready",
]


async def vanish(server: Server, chance: random.Random) -> None:
    """Send a request, or read its answer, up to a random byte. Then go away, sometimes by a reset."""
    if chance.random() < 0.1:
        whole = f"GET {chance.choice(GETS)} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
    else:
        path, body = chance.choice(REQUESTS)
        content = json.dumps(body).encode()
        whole = head(path, f"content-length: {len(content)}") + content
    reader, writer = await asyncio.open_connection(*server.address)
    try:
        if chance.random() < 0.3:
            writer.write(whole[: chance.randrange(len(whole))])
            await writer.drain()
        else:
            writer.write(whole)
            left = chance.choice([0, 1, 50, 500, 5000, 50_000, 500_000])
            while left > 0 and (piece := await reader.read(min(left, 1 << 16))):
                left -= len(piece)
        if chance.random() < 0.5:
            writer.transport.abort()
    except ConnectionResetError:
        pass
    finally:
        writer.close()


async def clients_that_vanish(server: Server) -> None:
    chance = random.Random(17)  # noqa: S311 - for variety
    limit = asyncio.Semaphore(50)

    async def one(seed: int) -> None:
        async with limit, asyncio.timeout(60):
            await vanish(server, random.Random(seed))  # noqa: S311

    await asyncio.gather(*(one(chance.getrandbits(32)) for _ in range(1000)))


async def readers_that_stop(server: Server) -> None:
    """Ask for whole and streamed rows on 100 connections and read nothing, until the server has dropped all of them."""
    body = {"prompt": [5], "max_tokens": 40, "ignore_eos": True, "return_logits": True}
    contents = [json.dumps({**body, "stream": stream}).encode() for stream in (True, False)]

    def stop_reading() -> None:
        with contextlib.ExitStack() as opened:
            dropped = select.poll()
            waiting = set()
            for content in contents * 50:
                connection = opened.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(server.address)
                connection.sendall(head(COMPLETIONS, f"content-length: {len(content)}") + content)
                dropped.register(connection, select.POLLRDHUP)
                waiting.add(connection.fileno())
            deadline = time.monotonic() + SETTLE_SECONDS
            while waiting:
                assert time.monotonic() < deadline, f"{len(waiting)} connections are still open"
                for number, _ in dropped.poll(1000):
                    dropped.unregister(number)
                    waiting.remove(number)

    await asyncio.to_thread(stop_reading)


PAGES: list[tuple[int, dict[str, str]]] = [
    (403, {"origin": "https://evil.example", "content-type": "application/json"}),
    (403, {"origin": "https://evil.example", "content-type": "text/plain"}),
    (403, {"origin": "null", "content-type": "application/json"}),
    (403, {"origin": "http://localhost:1", "content-type": "application/json"}),
    (403, {"origin": "https://evil.example", "host": "evil.example", "content-type": "application/json"}),
    (403, {"origin": "https://evil.example", "content-type": "application/x-www-form-urlencoded"}),
    (421, {"host": "evil.example", "content-type": "application/json"}),
    (415, {"content-type": "text/plain"}),
    (415, {"content-type": "multipart/form-data; boundary=a"}),
]
"""Requests that pages of other origins can make a browser send, and the refusal of each."""


async def web_pages(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

        async def send(expected: int, headers: dict[str, str], path: str, body: dict[str, Any]) -> None:
            answer = await client.post(path, content=json.dumps(body), headers=headers)
            assert answer.status_code == expected, (headers, answer.text)
            assert "access-control-allow-origin" not in answer.headers

        for path, body in REQUESTS:
            await asyncio.gather(*(send(expected, headers, path, body) for expected, headers in PAGES))
        preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        assert (await client.options(COMPLETIONS, headers=preflight)).status_code == 403


@pytest.mark.parametrize(
    "attack",
    [
        web_pages,
        slow_heads,
        slow_bodies,
        silent_connections,
        huge_heads,
        nested_json,
        compressed_bombs,
        clients_that_vanish,
        readers_that_stop,
    ],
)
async def test_streams_are_unharmed_and_nothing_is_left_over(
    server: Server, expected: list[list[Any]], attack: Attack
) -> None:
    async with streams_are_unharmed(server, expected):
        await attack(server)
