"""When a call is tried again, and how long it waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from logitclient import (
    APIError,
    AsyncClient,
    Client,
    RateLimitError,
    ServiceUnavailableError,
    StreamError,
    TransportError,
)
from logitclient.retries import RetryPolicy, parse_retry_after, with_retries, with_retries_async

ANSWER = {"object": "list", "data": []}


def refusal(status: int, retry_after: str | None = None) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, json={"error": {"message": "later"}}, headers=headers)


class Script:
    """A server that gives its answers one after another, and a clock that only notes the waits."""

    def __init__(self, *answers: httpx.Response | Exception, draw: float = 0.5) -> None:
        self._answers: Iterator[httpx.Response | Exception] = iter(answers)
        self.num_requests = 0
        self.waits: list[float] = []
        self.random: Callable[[], float] = lambda: draw

    def __call__(self, _request: httpx.Request) -> httpx.Response:
        self.num_requests += 1
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def async_sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def client(self, max_retries: int = 2) -> Client:
        return Client(
            transport=httpx.MockTransport(self), max_retries=max_retries, sleep=self.sleep, random=self.random
        )

    def async_client(self, max_retries: int = 2) -> AsyncClient:
        return AsyncClient(
            transport=httpx.MockTransport(self),
            max_retries=max_retries,
            sleep=self.async_sleep,
            random=self.random,
        )


def events(content: bytes) -> httpx.Response:
    return httpx.Response(200, content=content, headers={"Content-Type": "text/event-stream"})


def success() -> httpx.Response:
    return httpx.Response(200, json=ANSWER)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    script = Script(refusal(status), refusal(status), success())
    with script.client() as client:
        assert len(client.models()) == 0
    assert script.num_requests == 3
    assert script.waits == [0.25, 0.5]


@pytest.mark.anyio
async def test_the_async_client_asks_again_too() -> None:
    script = Script(refusal(429), refusal(503, "3"), success())
    async with script.async_client() as client:
        assert len(await client.models()) == 0
    assert script.waits == [0.25, 3.5]


@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 500, 502, 504])
def test_nothing_else_is_asked_twice(status: int) -> None:
    script = Script(refusal(status, "1"))
    with script.client() as client, pytest.raises(APIError):
        client.models()
    assert script.num_requests == 1


def test_a_broken_connection_is_not_tried_again() -> None:
    script = Script(httpx.ConnectError("refused"))
    with script.client() as client, pytest.raises(TransportError, match="refused"):
        client.models()
    assert script.num_requests == 1


@pytest.mark.parametrize("max_retries", [0, 1, 4])
def test_the_last_refusal_is_raised(max_retries: int) -> None:
    script = Script(*(refusal(429) for _ in range(max_retries + 1)))
    with script.client(max_retries) as client, pytest.raises(RateLimitError):
        client.models()
    assert script.num_requests == max_retries + 1


def test_retry_after_is_the_least_wait() -> None:
    script = Script(refusal(503, "2"), success())
    with script.client() as client:
        client.models()
    assert script.waits == [2.25]


def test_a_wait_that_is_too_long_is_left_to_the_caller() -> None:
    script = Script(refusal(503, "3600"))
    with script.client() as client, pytest.raises(ServiceUnavailableError) as caught:
        client.models()
    assert caught.value.retry_after == 3600
    assert script.waits == []


def test_a_stream_is_retried_before_its_first_byte() -> None:
    script = Script(refusal(429), events(b"data: [DONE]\n\n"))
    with script.client() as client, client.stream_chat([]) as stream:
        assert list(stream) == []
    assert script.num_requests == 2


def test_a_stream_is_never_retried_after_its_first_byte() -> None:
    script = Script(events(b'data: {"error": {"message": "x", "code": "engine_dead"}}\n\n'))
    with script.client() as client, client.stream_chat([]) as stream, pytest.raises(StreamError):
        list(stream)
    assert script.num_requests == 1


def test_backoff_doubles_up_to_its_bound_and_is_jittered() -> None:
    error = RateLimitError(429, "later")
    highest = RetryPolicy(max_retries=9, random=lambda: 1.0)
    assert [highest.delay(done, error) for done in range(7)] == [0.5, 1, 2, 4, 8, 8, 8]
    lowest = RetryPolicy(max_retries=9, random=lambda: 0.0)
    assert lowest.delay(3, error) == 0.0
    endless = RetryPolicy(max_retries=math.inf, random=lambda: 1.0)
    assert endless.delay(1 << 20, error) == 8.0


def test_transport_errors_are_retried_where_the_call_may_be_done_twice() -> None:
    error = TransportError("reset")
    policy = RetryPolicy(max_retries=2, random=lambda: 1.0)
    assert policy.delay(0, error) is None
    bold = replace(policy, on_transport_errors=True)
    assert bold.delay(0, error) == 0.5
    assert bold.delay(2, error) is None
    assert bold.delay(0, StreamError("broken")) is None
    assert bold.delay(0, APIError(500, "broken")) is None


@pytest.mark.anyio
async def test_no_try_begins_after_the_bound_on_seconds() -> None:
    waits: list[float] = []
    policy = RetryPolicy(max_retries=math.inf, random=lambda: 1.0, max_seconds=10.0)

    def clock() -> float:
        return 1000.0 + sum(waits)

    def call() -> None:
        raise RateLimitError(429, "later")

    with pytest.raises(RateLimitError):
        with_retries(call, policy, waits.append, clock)
    assert waits == [0.5, 1.0, 2.0, 4.0]
    waits.clear()

    async def async_call() -> None:
        call()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    with pytest.raises(RateLimitError):
        await with_retries_async(async_call, policy, sleep, clock)
    assert waits == [0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("5", 5.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header) == seconds


def test_retry_after_may_be_a_date() -> None:
    now = datetime.now(UTC)
    ahead = parse_retry_after(format_datetime(now + timedelta(seconds=100), usegmt=True))
    assert ahead is not None
    assert 90 < ahead <= 100
    assert parse_retry_after(format_datetime(now - timedelta(days=1), usegmt=True)) == 0.0
