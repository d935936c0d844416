"""POST /v1/logits, one prompt at a time, each answer to a file as it comes."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

from logitserve.extract.config import ExtractConfig
from logitserve.extract.errors import ExtractError, RefusedPromptError, UsageError
from logitserve.extract.prompts import Prompt

ARROW = "application/vnd.apache.arrow.stream"
BUSY = frozenset({429, 503})
REFUSED = frozenset({400, 413, 422})
FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 30.0
TIMEOUT = httpx.Timeout(600, connect=10)
"""A request may wait long for its turn before its first byte comes."""

IDENTITY = ("id", "architecture", "vocab_size", "hidden_size", "dtype")
"""What of /v1/models tells whether two runs ask the same model."""

T = TypeVar("T")


class _BusyError(Exception):
    """429 or 503: nothing was begun."""

    def __init__(self, response: httpx.Response, message: str) -> None:
        super().__init__(message)
        self.retry_after = _seconds(response.headers.get("retry-after", ""))


class LogitsSource:
    """A server. ``sleep``, ``clock`` and ``jitter`` (in [0, 1)) are asyncio's, time's and random's but in tests."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        config: ExtractConfig,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._config = config
        self._sleep = sleep
        self._clock = clock
        self._jitter = jitter

    async def model(self) -> dict[str, Any]:
        """The IDENTITY of what is served. Raises UsageError where it cannot give what the options ask for."""

        async def ask() -> dict[str, Any]:
            response = await self._client.get("/v1/models")
            self._raise_for_status(response)
            card: dict[str, Any] = response.json()["data"][0]
            return card

        try:
            card = await self._retrying(ask, retried=(_BusyError,))
            identity = {name: card[name] for name in IDENTITY}
        except (httpx.TransportError, ValueError, LookupError, TypeError) as error:
            msg = f"{self._client.base_url} does not answer as logitserve does: {error!r}"
            raise ExtractError(msg) from error
        largest = max([self._config.top_k or 0, *(token_id + 1 for token_id in self._config.token_ids)])
        if largest > identity["vocab_size"]:
            msg = f"--top-k or --token-ids is outside the model's vocabulary of {identity['vocab_size']}"
            raise UsageError(msg)
        if not card.get("can_generate", True):
            msg = (
                f"the model ({identity['architecture']}) is a classifier: it has no logits over a vocabulary"
            )
            raise UsageError(msg)
        return identity

    async def fetch(self, prompt: Prompt, path: Path) -> None:
        """Write the answer's Arrow stream. Raises RefusedPromptError, or ExtractError where no try succeeded."""
        body = {**self._config.request(prompt.index), **prompt.source}

        async def ask() -> None:
            async with self._client.stream("POST", "/v1/logits", json=body) as response:
                if not response.is_success:
                    await response.aread()
                    if response.status_code in REFUSED:
                        raise RefusedPromptError(prompt.index, _message(response))
                    self._raise_for_status(response)
                if response.headers.get("content-type") != ARROW:
                    msg = (
                        f"{self._client.base_url} answered with something else than Arrow: is it logitserve?"
                    )
                    raise ExtractError(msg)
                # A body cut short raises RemoteProtocolError here, so what is written in full is a whole answer.
                with path.open("wb") as file:
                    async for piece in response.aiter_bytes():
                        file.write(piece)

        try:
            await self._retrying(ask, retried=(_BusyError, httpx.TransportError))
        except httpx.TransportError as error:
            msg = f"line {prompt.index + 1}: the connection to the server failed: {error!r}"
            raise ExtractError(msg) from error

    async def _retrying(self, call: Callable[[], Awaitable[T]], retried: tuple[type[Exception], ...]) -> T:
        """``call()`` until it succeeds: exponential backoff with full jitter, on top of Retry-After."""
        give_up = math.inf
        for attempt in itertools.count():
            try:
                return await call()
            except retried as error:
                now = self._clock()
                give_up = min(give_up, now + self._config.retry_seconds)
                wait = self._jitter() * min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(attempt, 10))
                if isinstance(error, _BusyError):
                    wait += error.retry_after
                if now + wait > give_up:
                    if isinstance(error, _BusyError):
                        msg = f"the server is still busy after {self._config.retry_seconds:g} s: {error}"
                        raise ExtractError(msg) from error
                    raise
            await self._sleep(wait)
        raise AssertionError

    @staticmethod
    def _raise_for_status(response: httpx.Response) -> None:
        if response.status_code in BUSY:
            raise _BusyError(response, _message(response))
        if not response.is_success:
            msg = f"the server answered {response.status_code}: {_message(response)}"
            raise ExtractError(msg)


def open_client(config: ExtractConfig, url: str, api_key: str) -> httpx.AsyncClient:
    """Connections to the server that a LogitsSource asks."""
    headers = {"accept": ARROW, "accept-encoding": "identity"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=config.concurrency),
        # Proxies are for the way to other machines.
        trust_env=config.url is not None,
    )


def _message(response: httpx.Response) -> str:
    """The message of OpenAI's error object, or what came instead."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:200]


def _seconds(retry_after: str) -> float:
    """Retry-After where it is a number of seconds, which is what logitserve sends."""
    return min(float(retry_after), 3600.0) if retry_after.isascii() and retry_after.isdigit() else 0.0
