"""Replicas behind balancers that are killed, and that are restarted one after the other under load."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pyarrow as pa
import pytest
from balancers import KINDS, Balancer, balancing
from byte_model import save_byte_model
from raw_http import SECONDS
from render_balancer import SHIPPED
from replicas import Replica, two_replicas

pytestmark = [pytest.mark.deployments, pytest.mark.anyio, pytest.mark.timeout(900)]

COMPLETIONS = "/v1/completions"
SHORT = {"prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 1500, "stream": True, "return_logits": {"top_k": 1}}
STREAMS = 16

(DRAIN_DELAY,) = re.findall(r"--drain-delay (\d+)", SHIPPED["haproxy"].read_text())
"""What haproxy.cfg advises: it notices within two checks, a second apart, that a replica drains."""

Balancers = dict[str, Balancer]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Replica]]:
    directory = tmp_path_factory.mktemp("replicas")
    model = save_byte_model(directory / "model")
    with two_replicas(directory, model, "--drain-delay", DRAIN_DELAY) as both:
        yield both


@pytest.fixture(scope="module")
def balancers(
    replicas: tuple[Replica, Replica], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Balancers]:
    """Run each balancer in front of the same two replicas."""
    addresses = (replicas[0].address, replicas[1].address)
    with contextlib.ExitStack() as opened:
        yield {
            kind: opened.enter_context(balancing(kind, tmp_path_factory.mktemp(kind) / "run", addresses))
            for kind in KINDS
        }


@dataclass
class Stream:
    """One stream that is read to its end."""

    request_id: str
    events: int = 0
    is_complete: bool = False
    error: Exception | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    def count_event(self) -> None:
        self.events += 1
        self.begun.set()


async def read_by_httpx(client: httpx.AsyncClient, stream: Stream) -> None:
    headers = {"x-request-id": stream.request_id}
    try:
        async with client.stream("POST", COMPLETIONS, json=LONG, headers=headers) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                stream.is_complete |= line == "data: [DONE]"
                if line.startswith("data: {"):
                    stream.count_event()
    except httpx.HTTPError as error:
        stream.error = error


async def read_by_openai(client: openai.AsyncOpenAI, stream: Stream) -> None:
    body: dict[str, Any] = {**LONG, "model": "model"}
    own = {name: body.pop(name) for name in ("ignore_eos", "return_logits")}
    try:
        answer = await client.completions.create(
            **body, extra_body=own, extra_headers={"x-request-id": stream.request_id}
        )
        async for chunk in answer:
            stream.count_event()
            stream.is_complete |= chunk.choices[0].finish_reason is not None
    except (openai.OpenAIError, httpx.HTTPError) as error:
        stream.error = error


@contextlib.asynccontextmanager
async def streams_under_way(
    client: httpx.AsyncClient, replicas: tuple[Replica, Replica]
) -> AsyncIterator[tuple[list[Stream], asyncio.Future[list[None]]]]:
    """Begin streams one after the other, half of them by openai's client, and hold them all when they have begun."""
    theirs = openai.AsyncOpenAI(
        base_url=f"{client.base_url}/v1", api_key="none", max_retries=0, timeout=SECONDS
    )
    streams = [Stream(f"stream-{index}") for index in range(STREAMS)]
    tasks = []
    async with theirs:
        for replica in replicas:
            replica.hold()
        try:
            for index, stream in enumerate(streams):
                # Two by each client in turn, because neighbours go to different replicas.
                by_httpx = index % 4 < 2
                tasks.append(
                    asyncio.create_task(
                        read_by_httpx(client, stream) if by_httpx else read_by_openai(theirs, stream)
                    )
                )
                async with asyncio.timeout(SECONDS):
                    while not stream.begun.is_set():
                        for replica in replicas:
                            replica.allow_step()
                        await asyncio.sleep(0.01)
            yield streams, asyncio.gather(*tasks)
        finally:
            for replica in replicas:
                replica.release()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_replica_that_is_killed_fails_its_own_streams_and_no_others(
    balancers: Balancers, replicas: tuple[Replica, Replica]
) -> None:
    nginx, (first, second) = balancers["nginx"], replicas
    async with httpx.AsyncClient(base_url=nginx.url, timeout=SECONDS) as client:
        async with streams_under_way(client, replicas) as (streams, ends):
            first.kill()
            second.release()
            later = await asyncio.gather(*(client.post(COMPLETIONS, json=SHORT) for _ in range(STREAMS)))
            await ends
        assert [answer.status_code for answer in later] == [200] * STREAMS
    used = {stream.request_id: nginx.logged(stream.request_id)["upstream"] for stream in streams}
    assert Counter(used.values()) == {first.address: STREAMS // 2, second.address: STREAMS // 2}
    for stream in streams:
        if used[stream.request_id] == second.address:
            assert (stream.is_complete, stream.error) == (True, None)
        else:
            assert not stream.is_complete
            assert isinstance(stream.error, httpx.RemoteProtocolError | openai.APIConnectionError)
    first.start()


class Load:
    """Clients that ask one request after another. Whatever is no complete answer is a fault."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._is_over = False
        self._names = itertools.count()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        asks = (self._stream, self._stream, self._whole, self._whole, self._arrow)
        self._has_ended = asyncio.Event()
        self._clients = Counter(ask.__name__ for ask in asks)
        self._tasks = [asyncio.create_task(self._ask_on(ask)) for ask in asks]

    async def go_on(self) -> None:
        """Wait until requests of each kind have ended, one at least that began after this call."""
        # Each client has at most one request that began before.
        enough = {ask: self.counts[ask] + 2 * number for ask, number in self._clients.items()}
        async with asyncio.timeout(SECONDS):
            while any(self.counts[ask] < count for ask, count in enough.items()):
                self._has_ended.clear()
                await self._has_ended.wait()

    async def end(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _ask_on(self, ask: Any) -> None:
        while not self._is_over:
            number = next(self._names)
            headers = {"x-conversation-id": f"talk {number}"} if number % 3 == 0 else {}
            try:
                await ask(headers)
            except (httpx.HTTPError, AssertionError, pa.ArrowInvalid) as fault:
                self.faults.append(f"{type(fault).__name__}: {fault}")
            self.counts[ask.__name__] += 1
            self._has_ended.set()

    async def _stream(self, headers: dict[str, str]) -> None:
        body = {**SHORT, "stream": True}
        async with self._client.stream("POST", COMPLETIONS, json=body, headers=headers) as answer:
            content = await answer.aread()
        assert answer.status_code == 200, content
        assert content.endswith(b"data: [DONE]\n\n"), content

    async def _whole(self, headers: dict[str, str]) -> None:
        answer = await self._client.post(COMPLETIONS, json=SHORT, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == SHORT["max_tokens"]

    async def _arrow(self, headers: dict[str, str]) -> None:
        answer = await self._client.post("/v1/logits", json={"input": [5] * 30}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert pa.ipc.open_stream(answer.content).read_all().num_rows == 30


async def test_a_rolling_restart_fails_no_request(
    balancers: Balancers, replicas: tuple[Replica, Replica]
) -> None:
    async with contextlib.AsyncExitStack() as opened:
        loads = []
        for balancer in balancers.values():
            client = httpx.AsyncClient(base_url=balancer.url, timeout=SECONDS)
            loads.append(Load(await opened.enter_async_context(client)))
        for replica in replicas:
            await asyncio.to_thread(replica.stop)
            for load in loads:
                await load.go_on()
            await asyncio.to_thread(replica.start)
            for balancer in balancers.values():
                await asyncio.to_thread(balancer.wait_all_up)
        for load in loads:
            await load.end()
    for load in loads:
        assert load.faults == []
        assert load.counts.keys() == {"_stream", "_whole", "_arrow"}
    assert {entry["status"] for entry in balancers["nginx"].retried()} == {200}
