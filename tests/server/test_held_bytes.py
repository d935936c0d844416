"""The budget of answers: some wait, some are refused, and all of them end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logitengine.link.messages import Array, GenerationRequest, LogitsRows, StepOutput
from logitserve.errors import ApiError
from logitserve.held_bytes import WINDOW_COST, HeldBytes
from scripted_engine import OpenApp, Step

LIMIT = 1000
TURNS_OF_A_TIMEOUT = 50
"""Turns of the event loop after which a silent reader is dropped."""


@dataclass(frozen=True)
class Whole:
    """A whole answer: bytes of its deltas, and whether its reader takes them."""

    grows: list[int]
    is_read: bool


@dataclass(frozen=True)
class Stream:
    """A stream: the window that it wants, the smallest that it accepts, and the turns that it lasts."""

    wanted: int
    least: int
    turns: int


wholes = st.builds(Whole, st.lists(st.integers(1, 400), max_size=8), st.booleans())
streams = st.builds(Stream, st.integers(0, 400), st.integers(0, 100), st.integers(0, 30))


@settings(deadline=None, max_examples=200)
@given(clients=st.lists(wholes | streams, max_size=20))
def test_every_answer_ends_and_the_budget_holds(clients: list[Whole | Stream]) -> None:  # noqa: C901 - three roles
    held = HeldBytes(LIMIT)
    # An answer reserves twice a delta's bytes until its written length is known.
    growths = [client.grows for client in clients if isinstance(client, Whole) and client.grows]
    largest = max((sum(grows) + max(grows) for grows in growths), default=0)
    refused = 0

    def check() -> None:
        assert 0 <= held.windows_left <= LIMIT // 2
        assert held.num_answer_bytes <= LIMIT // 2 + largest

    async def answer(client: Whole) -> None:
        with held.answer() as account:
            size = 0
            for nbytes in client.grows:
                await account.reserve(2 * nbytes)
                check()
                size += nbytes
                account.settle(size)
                await asyncio.sleep(0)
            if not client.is_read:
                for _ in range(TURNS_OF_A_TIMEOUT):
                    await asyncio.sleep(0)
                return
            for nbytes in client.grows:
                await asyncio.sleep(0)
                size -= nbytes
                account.settle(size)

    async def stream(client: Stream) -> None:
        nonlocal refused
        window = held.window(client.wanted, client.least)
        check()
        if window is None:
            assert WINDOW_COST * min(client.wanted, client.least) > held.windows_left
            refused += 1
            return
        assert min(client.wanted, client.least) <= window.nbytes <= client.wanted
        for _ in range(client.turns):
            await asyncio.sleep(0)
        window.close()

    async def run() -> None:
        async with asyncio.timeout(60):
            await asyncio.gather(
                *(answer(client) if isinstance(client, Whole) else stream(client) for client in clients)
            )

    asyncio.run(run())
    assert held.num_answer_bytes == 0
    assert held.windows_left == LIMIT // 2


def test_large_windows_shrink_and_leave_room_for_small_ones() -> None:
    held = HeldBytes(1 << 30)
    large = 16 << 20
    sizes: list[int] = []
    while (window := held.window(large, 1 << 20)) is not None and len(sizes) < 1000:
        sizes.append(window.nbytes)
    assert large // 2 < sizes[0] <= large
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1 << 20
    assert len(sizes) > 64
    assert held.windows_left < WINDOW_COST << 20
    assert held.window(large, 1 << 20, is_owed=True) is not None


def test_small_windows_are_granted_whole_to_a_thousand_requests() -> None:
    held = HeldBytes(1 << 30)
    windows = [held.window(held.small, 336) for _ in range(1024)]
    assert [window.nbytes for window in windows if window is not None] == [held.small] * 1024


def test_an_answer_without_rows_never_waits_for_a_large_one() -> None:
    held = HeldBytes(1 << 20)

    async def run() -> None:
        with held.answer() as large:
            await large.reserve(100 << 20)
            with held.answer() as small:
                async with asyncio.timeout(10):
                    await small.reserve(0)
                    await small.reserve(held.small)
                waiting = asyncio.create_task(small.reserve(1))
                await asyncio.sleep(0)
                assert not waiting.done()
                large.settle(0)
                await waiting

    asyncio.run(run())


def test_a_cancelled_answer_gives_back_what_it_held_and_waited_for() -> None:
    held = HeldBytes(LIMIT)

    async def run() -> None:
        with held.answer() as oldest:
            await oldest.reserve(LIMIT // 2)

            async def second() -> None:
                with held.answer() as account:
                    await account.reserve(1)

            waiting = asyncio.create_task(second())
            await asyncio.sleep(0)
            assert held.num_answer_bytes == LIMIT // 2
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await oldest.reserve(1)
        assert held.num_answer_bytes == 0

    asyncio.run(run())


def test_an_answer_that_waits_too_long_is_told_so_and_leaves_no_reservation() -> None:
    held = HeldBytes(LIMIT, wait_seconds=0.01)

    async def run() -> None:
        with held.answer() as oldest:
            await oldest.reserve(LIMIT // 2)
            with held.answer() as second:
                with pytest.raises(ApiError, match="--held-timeout") as refused:
                    await second.reserve(LIMIT // 4)
                assert (refused.value.status, refused.value.code) == (503, "too_many_bytes_held")
                oldest.settle(0)
                await second.reserve(LIMIT // 4)
                assert held.num_answer_bytes == LIMIT // 4
        assert held.num_answer_bytes == 0

    asyncio.run(run())


COLUMNS = 1000
ROW = LogitsRows(values=Array("float32", (1, COLUMNS), np.ones(COLUMNS, "<f4").tobytes()))
BODY: dict[str, Any] = {"prompt": "Hi", "max_tokens": 20, "return_logits": {"top_k": COLUMNS}}


def rows(count: int) -> Any:
    def script(request: GenerationRequest) -> list[Step]:
        return [
            StepOutput(
                request_id=request.request_id,
                index=0,
                token_ids=[33],
                logits=ROW,
                finish_reason="length" if number == count - 1 else None,
            )
            for number in range(count)
        ]

    return script


@pytest.mark.anyio
async def test_an_answer_over_its_limit_is_refused_with_the_advice_to_stream(open_app: OpenApp) -> None:
    """Written lists are longer than their raw bytes, so their length is known only afterwards."""
    body = {**BODY, "return_logits": {"top_k": COLUMNS, "encoding": "list"}, "max_tokens": 10}
    async with open_app(rows(10), max_answer_bytes=100_000) as app:
        raw = 10 * COLUMNS * 8
        assert raw < 100_000
        script = rows(10)
        app.engine.script = lambda request: [
            StepOutput(
                request_id=step.request_id,
                index=0,
                token_ids=step.token_ids,
                logits=LogitsRows(
                    values=Array("float32", (1, COLUMNS), np.full(COLUMNS, -1.2345678e-5, "<f4").tobytes())
                ),
                finish_reason=step.finish_reason,
            )
            for step in script(request)
            if isinstance(step, StepOutput)
        ]
        whole = await app.post("/v1/completions", body)
        streamed = await app.post("/v1/completions", {**body, "stream": True})
        assert app.state.held_bytes.num_answer_bytes == 0
    assert whole.status_code == 400
    error = whole.json()["error"]
    assert error["code"] == "answer_too_large"
    assert "Stream it" in error["message"]
    assert "--max-answer-bytes" in error["message"]
    assert streamed.status_code == 200
    assert streamed.text.endswith("data: [DONE]\n\n")


@pytest.mark.anyio
async def test_an_answer_that_is_surely_too_large_is_refused_before_it_is_queued(open_app: OpenApp) -> None:
    async with open_app(rows(20), max_answer_bytes=20 * COLUMNS * 8 - 1) as app:
        whole = await app.post("/v1/completions", BODY)
        assert app.engine.requests == []
        streamed = await app.post("/v1/completions", {**BODY, "stream": True})
    assert whole.json()["error"]["code"] == "answer_too_large"
    assert streamed.status_code == 200


@pytest.mark.anyio
async def test_a_stream_without_room_for_a_single_row_gets_429_and_retry_after(open_app: OpenApp) -> None:
    async with open_app(rows(20), max_held_bytes=1 << 20) as app:
        held = app.state.held_bytes
        window = held.window(held.windows_left // WINDOW_COST, held.windows_left // WINDOW_COST)
        assert window is not None
        refused = await app.post("/v1/completions", {**BODY, "stream": True})
        without_rows = await app.post("/v1/completions", {"prompt": "Hi", "max_tokens": 20})
        window.close()
        served = await app.post("/v1/completions", {**BODY, "stream": True})
    assert refused.status_code == 429
    assert "--max-held-bytes" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]
    assert (without_rows.status_code, served.status_code) == (200, 200)


@pytest.mark.anyio
async def test_an_answer_without_room_is_put_together_when_an_older_one_is_sent(open_app: OpenApp) -> None:
    async with open_app(rows(20), max_held_bytes=1 << 20) as app:
        held = app.state.held_bytes
        with held.answer() as older:
            await older.reserve(1 << 20)
            answering = asyncio.create_task(app.post("/v1/completions", BODY))
            await app.engine.running(1)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not answering.done()
            assert held.num_answer_bytes == 1 << 20
        assert (await answering).status_code == 200
        assert held.num_answer_bytes == 0
