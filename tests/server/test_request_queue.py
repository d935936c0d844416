"""Bounds on waiting requests and tokens, and the refusals of a full queue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitengine.errors import EngineOverloadedError
from logitengine.link.messages import GenerationRequest, StepOutput
from logitserve.errors import ApiError
from logitserve.request_queue import LONGEST_RETRY_SECONDS, Place, RequestQueue
from logitserve.text.tokenizer import ModelTokenizer
from logitserve.text.tokenizer_workers import NUM_THREADS
from scripted_engine import OpenApp, Step

pytestmark = pytest.mark.anyio

COMPLETIONS = "/v1/completions"
BODY = {"prompt": [5, 6, 7], "max_tokens": 1}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A script whose requests begin when the gate is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    def script(self, request: GenerationRequest) -> list[Step]:
        end = StepOutput(request_id=request.request_id, index=0, token_ids=[33], finish_reason="length")
        return [self.opened.wait(), end]


async def test_a_request_too_many_is_refused_before_it_is_tokenized(
    open_app: OpenApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = ModelTokenizer.encode

    def noted(self: ModelTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        encoded.append(text)
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "encode", noted)
    gate = Gate()
    async with open_app(gate.script, max_queued_requests=2) as app:
        waiting = [asyncio.ensure_future(app.post(COMPLETIONS, BODY)) for _ in range(2)]
        await app.engine.running(2)
        refused = await app.post(COMPLETIONS, {**BODY, "prompt": "Hi"})
        assert encoded == []
        gate.opened.set()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
        assert (await app.post(COMPLETIONS, BODY)).status_code == 200
        assert (app.state.queue.num_requests, app.state.queue.num_tokens) == (0, 0)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "--max-queued-requests" in refused.json()["error"]["message"]


async def test_requests_that_run_are_not_in_the_queue(open_app: OpenApp) -> None:
    runs = asyncio.Event()

    async def go_on() -> None:
        runs.set()
        await asyncio.Event().wait()

    def script(request: GenerationRequest) -> list[Step]:
        return [StepOutput(request_id=request.request_id, index=0), go_on()]

    async with open_app(script, max_queued_requests=1) as app:
        running = []
        for _ in range(3):
            running.append(asyncio.ensure_future(app.post(COMPLETIONS, BODY)))
            await runs.wait()
            runs.clear()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_tokens_too_many_are_refused_and_a_long_prompt_alone_is_not(open_app: OpenApp) -> None:
    gate = Gate()
    async with open_app(gate.script, max_queued_tokens=2) as app:
        waiting = asyncio.ensure_future(app.post(COMPLETIONS, BODY))
        await app.engine.running(1)
        refused = await app.post(COMPLETIONS, BODY)
        gate.opened.set()
        assert (await waiting).status_code == 200
    assert refused.status_code == 429
    assert "--max-queued-tokens" in refused.json()["error"]["message"]


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Yield an event until which no text is encoded or decoded."""
    released = threading.Event()
    encode, decode = ModelTokenizer.encode, ModelTokenizer.decode

    def slow_encode(self: ModelTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        released.wait()
        return encode(self, text, add_special_tokens=add_special_tokens)

    def slow_decode(self: ModelTokenizer, token_ids: Sequence[int]) -> str:
        released.wait()
        return decode(self, token_ids)

    monkeypatch.setattr(ModelTokenizer, "encode", slow_encode)
    monkeypatch.setattr(ModelTokenizer, "decode", slow_decode)
    yield released
    released.set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 1}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [5]}),
    ],
    ids=["completions", "tokenize", "detokenize"],
)
async def test_requests_that_wait_to_be_tokenized_are_counted(
    open_app: OpenApp, release: threading.Event, path: str, body: dict[str, object]
) -> None:
    most = NUM_THREADS + 2
    async with open_app(max_queued_requests=most) as app:
        posted = [asyncio.ensure_future(app.post(path, body)) for _ in range(most + 1)]
        (refused,), others = await asyncio.wait(posted, return_when=asyncio.FIRST_COMPLETED)
        release.set()
        assert {answer.status_code for answer in await asyncio.gather(*others)} == {200}
        assert app.state.queue.num_requests == 0
    assert refused.result().status_code == 429


async def test_the_engines_own_refusal_says_when_to_come_again(open_app: OpenApp) -> None:
    async with open_app(lambda _: [EngineOverloadedError("7 sequences are waiting (--max-waiting)")]) as app:
        answer = await app.post(COMPLETIONS, BODY)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert "--max-waiting" in answer.json()["error"]["message"]


def test_a_client_is_told_to_wait_about_as_long_as_others_have() -> None:
    clock = Clock()
    queue = RequestQueue(10, 1000, clock)
    assert queue.retry_after == {"Retry-After": "1"}
    for _ in range(60):
        with queue.enter(3) as place:
            clock.now += 7.0
            place.begin()
    assert queue.retry_after == {"Retry-After": "7"}
    for _ in range(60):
        with queue.enter(3) as place:
            clock.now += 1000.0
            place.begin()
    assert queue.retry_after == {"Retry-After": str(LONGEST_RETRY_SECONDS)}


@given(
    st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=40),
    st.integers(1, 8),
    st.integers(1, 60),
)
def test_the_queue_never_holds_more_than_its_bounds_and_one_request(
    arrivals: list[tuple[int, bool]], max_requests: int, max_tokens: int
) -> None:
    queue = RequestQueue(max_requests, max_tokens, Clock())
    places: list[Place] = []
    for num_tokens, leaves in arrivals:
        before = (queue.num_requests, queue.num_tokens)
        if before[0] >= max_requests or before[1] >= max_tokens:
            with pytest.raises(ApiError):
                queue.enter(num_tokens)
            assert (queue.num_requests, queue.num_tokens) == before
        else:
            places.append(queue.enter(num_tokens))
        if leaves and places:
            place = places.pop(0)
            place.begin()
            place.leave()
    for place in places:
        place.leave()
    assert (queue.num_requests, queue.num_tokens) == (0, 0)
