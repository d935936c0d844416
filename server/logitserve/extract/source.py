"""The source of an extraction's rows: a server, which is asked for one prompt at a time by logitclient."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from logitclient import APIError, AsyncClient, DecodeError, TransportError
from logitclient.retries import RETRIED, RetryPolicy, with_retries_async

from logitserve.extract.config import ExtractConfig
from logitserve.extract.errors import ExtractError, RefusedPromptError, UsageError
from logitserve.extract.prompts import Prompt

REFUSED = frozenset({400, 413, 422})
LONGEST_BACKOFF = 30.0
TIMEOUT = httpx.Timeout(600, connect=10)
"""Long, since a request may wait for its turn before its first byte comes."""

IDENTITY = ("id", "architecture", "vocab_size", "hidden_size", "dtype")
"""The members of /v1/models that tell whether two runs ask the same model."""


class LogitsSource:
    """A source of rows. Tests replace ``sleep``, ``clock`` and ``jitter``, which gives numbers in [0, 1)."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        config: ExtractConfig,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = http.base_url
        # Retries are made here, around a whole answer, since a client never repeats a stream that has begun.
        self._client = AsyncClient(str(http.base_url), timeout=http.timeout, max_retries=0, http_client=http)
        self._config = config
        self._sleep = sleep
        self._clock = clock
        self._policy = RetryPolicy(
            max_retries=math.inf,
            random=jitter,
            longest_backoff=LONGEST_BACKOFF,
            longest_wait=math.inf,
            max_seconds=config.retry_seconds,
        )

    async def model(self) -> dict[str, Any]:
        """Return the IDENTITY of the model. Raises UsageError where the options ask for more than it has."""
        try:
            models = await with_retries_async(self._client.models, self._policy, self._sleep, self._clock)
            card = models[0].raw
            identity = {name: card[name] for name in IDENTITY}
        except APIError as error:
            raise self._failure(error) from error
        except (TransportError, DecodeError, LookupError) as error:
            msg = f"{self._url} does not answer as logitserve does: {error!r}"
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
        """Write one prompt's Arrow stream to a file. Raises RefusedPromptError, or ExtractError after the last try."""

        async def write_answer() -> None:
            stream = self._client.stream_arrow(**prompt.source, **self._config.request(prompt.index))
            # A body that is cut short raises TransportError, so a stream that ends here is whole.
            async with stream as pieces:
                with path.open("wb") as file:
                    async for piece in pieces:
                        file.write(piece)

        policy = replace(self._policy, on_transport_errors=True)
        try:
            await with_retries_async(write_answer, policy, self._sleep, self._clock)
        except APIError as error:
            if error.status in REFUSED:
                raise RefusedPromptError(prompt.index, error.message) from error
            raise self._failure(error) from error
        except TransportError as error:
            msg = f"line {prompt.index + 1}: the connection to the server failed: {error.__cause__!r}"
            raise ExtractError(msg) from error
        except DecodeError as error:
            msg = f"{self._url} answered with something else than Arrow: is it logitserve?"
            raise ExtractError(msg) from error

    def _failure(self, error: APIError) -> ExtractError:
        if error.status in RETRIED:
            return ExtractError(
                f"the server is still busy after {self._config.retry_seconds:g} s: {error.message}"
            )
        return ExtractError(f"the server answered {error.status}: {error.message}")


def open_connections(config: ExtractConfig, url: str, api_key: str) -> httpx.AsyncClient:
    """Open the connections of a LogitsSource to its server."""
    headers = {"accept-encoding": "identity"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=TIMEOUT,
        limits=httpx.Limits(max_connections=config.concurrency),
        # The environment's proxies are for other machines.
        trust_env=config.url is not None,
    )
