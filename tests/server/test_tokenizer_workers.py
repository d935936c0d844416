"""Prompts that take too long to tokenize, and the innocent prompts that wait behind them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from logitserve.text.tokenizer import ModelTokenizer
from logitserve.text.tokenizer_workers import NUM_THREADS
from scripted_engine import App, OpenApp

pytestmark = pytest.mark.anyio

SECONDS = 0.05


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Return an event. Encoding "slow" does not end until the event is set."""
    released = threading.Event()
    encode = ModelTokenizer.encode

    def slow_encode(self: ModelTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        if text == "slow":
            released.wait()
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "encode", slow_encode)
    yield released
    released.set()


async def tokenize(app: App, prompt: str) -> httpx.Response:
    return await app.post("/tokenize", {"prompt": prompt})


async def test_only_the_request_whose_own_work_is_slow_is_at_fault(
    open_app: OpenApp, release: threading.Event
) -> None:
    async with open_app(tokenize_timeout=SECONDS) as app:
        slow = await asyncio.gather(*(tokenize(app, "slow") for _ in range(NUM_THREADS)))
        innocent = await tokenize(app, "Hi")
        assert [answer.status_code for answer in slow] == [400] * NUM_THREADS
        assert {answer.json()["error"]["code"] for answer in slow} == {"tokenize_timeout"}
        assert {answer.json()["error"]["param"] for answer in slow} == {"prompt"}
        error = innocent.json()["error"]
        assert (innocent.status_code, error["code"], error["param"]) == (503, "tokenizer_busy", None)
        assert innocent.headers["retry-after"]
        assert "--tokenize-timeout" in error["message"]

        release.set()
        async with asyncio.timeout(30):
            while (await tokenize(app, "Hi")).status_code != 200:
                pass


async def test_a_request_that_went_away_holds_its_thread_until_its_work_ends(
    open_app: OpenApp, release: threading.Event
) -> None:
    async with open_app(tokenize_timeout=SECONDS) as app:
        work, has_begun = _blocking_work(release)
        for _ in range(NUM_THREADS):
            call = asyncio.create_task(app.state.tokenizer_workers.run(work, param="prompt"))
            await asyncio.to_thread(has_begun.acquire)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        assert (await tokenize(app, "Hi")).status_code == 503


def _blocking_work(release: threading.Event) -> tuple[Callable[[], bool], threading.Semaphore]:
    begun = threading.Semaphore(0)

    def work() -> bool:
        begun.release()
        return release.wait()

    return work, begun
