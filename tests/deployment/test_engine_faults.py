"""An engine that is killed, stopped or raises, behind nginx: who was served by it sees an error, and nobody else does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from balancers import Balancer, balancing
from byte_model import save_byte_model
from raw_http import SECONDS
from replicas import Replica, two_replicas

pytestmark = [pytest.mark.deployments, pytest.mark.anyio, pytest.mark.timeout(900)]

COMPLETIONS = "/v1/completions"
SHORT = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 1500, "stream": True, "return_logits": {"top_k": 1}}
STREAMS = 8
ENGINE_TIMEOUT = "15"
"""Seconds: ten times as many are allowed while an engine loads, and machines may be slow."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Replica, Replica]]:
    directory = tmp_path_factory.mktemp("replicas")
    model = save_byte_model(directory / "model")
    with two_replicas(directory, model, "--engine-timeout", ENGINE_TIMEOUT) as both:
        yield both


@pytest.fixture(scope="module")
def nginx(replicas: tuple[Replica, Replica], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    addresses = (replicas[0].address, replicas[1].address)
    with balancing("nginx", tmp_path_factory.mktemp("nginx") / "run", addresses) as balancer:
        yield balancer


def kill(replica: Replica) -> None:
    replica.engine.kill()


def stop(replica: Replica) -> None:
    replica.engine.suspend()


def fail_a_step(replica: Replica) -> None:
    (replica.faults / "fault").touch()
    replica.release()


async def read(client: httpx.AsyncClient, name: str, begun: asyncio.Barrier) -> list[str]:
    """Return the data lines of a stream. Wait at the barrier when the first has come."""
    lines: list[str] = []
    headers = {"x-request-id": name}
    async with client.stream("POST", COMPLETIONS, json=LONG, headers=headers) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                if len(lines) == 1:
                    await begun.wait()
    return lines


async def short_answers(client: httpx.AsyncClient, count: int) -> list[httpx.Response]:
    return await asyncio.gather(*(client.post(COMPLETIONS, json=SHORT) for _ in range(count)))


@pytest.mark.parametrize("break_engine", [kill, stop, fail_a_step], ids=lambda function: function.__name__)
async def test_a_fault_of_an_engine_fails_the_answers_that_it_had_begun_and_nothing_else(
    nginx: Balancer, replicas: tuple[Replica, Replica], break_engine: Callable[[Replica], None]
) -> None:
    first, second = replicas
    names = [f"{break_engine.__name__}-{index}" for index in range(STREAMS)]
    begun = asyncio.Barrier(STREAMS + 1)
    async with httpx.AsyncClient(base_url=nginx.url, timeout=3 * SECONDS) as client:
        for replica in replicas:
            replica.hold()
        streams = [asyncio.create_task(read(client, name, begun)) for name in names]
        arrivals = asyncio.create_task(begun.wait())
        while not arrivals.done():
            for replica in replicas:
                replica.allow_step()
            await asyncio.sleep(0.01)
        broken = first.engine
        break_engine(first)
        later = asyncio.create_task(short_answers(client, STREAMS))
        second.release()
        first.release()
        endings = dict(zip(names, await asyncio.gather(*streams), strict=True))
        answers = [*await later, *await short_answers(client, STREAMS)]
    assert [answer.status_code for answer in answers] == [200] * 2 * STREAMS
    used = {name: nginx.logged(name)["upstream"] for name in names}
    assert set(used.values()) == {first.address, second.address}
    for name, lines in endings.items():
        if used[name] == second.address:
            assert lines[-1] == "[DONE]"
        else:
            assert json.loads(lines[-1])["error"]["code"] == "engine_dead"
    first.wait_ready()
    assert not broken.is_running()
