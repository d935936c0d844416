"""The client for asyncio and trio. Only its IO is here: ``operations`` says how requests are written and answers read."""

# ruff: noqa: A002 - input is the wire's name

from __future__ import annotations

import random as random_module
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar, Unpack

import anyio  # httpx needs it too
import httpx

from logitclient import operations
from logitclient.operations import Operation, Request, StreamOperation
from logitclient.options import (
    ChatOptions,
    CompletionOptions,
    DetokenizeOptions,
    EmbeddingOptions,
    Input,
    InputOptions,
    LogitsOptions,
    Messages,
    PoolingOptions,
    RewardOptions,
    TokenIds,
    TokenizeOptions,
)
from logitclient.results import (
    Chunk,
    Completion,
    Embedding,
    LogitsBatch,
    Model,
    Perplexity,
    Pooling,
    Results,
    Reward,
    SequenceLogits,
    Tokens,
    Usage,
)
from logitclient.retries import RetryPolicy, with_retries_async
from logitclient.transport import (
    DEFAULT_TIMEOUT,
    Endpoint,
    Timeout,
    api_error,
    check_injection,
    check_media_type,
    translate_errors,
)

T = TypeVar("T")


class AsyncClient:
    """A ``Client`` to be awaited, with the same arguments and calls. Its streams take ``async with`` and ``async for``."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        http_client: httpx.AsyncClient | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        check_injection(http_client, transport)
        self._endpoint = Endpoint(base_url, api_key, timeout)
        self._owns_http = http_client is None
        self._http = httpx.AsyncClient(transport=transport) if http_client is None else http_client
        self._retries = RetryPolicy(max_retries, random)
        self._sleep = sleep

    async def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Completion:
        """Continue a conversation."""
        return await self._run(operations.chat(messages, options))

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncStream[Chunk]:
        """Continue a conversation, chunk by chunk."""
        return self._stream(operations.stream_chat(messages, options))

    async def complete(self, prompt: Input, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue one or more prompts as they are."""
        return await self._run(operations.complete(prompt, options))

    def stream_complete(self, prompt: Input, **options: Unpack[CompletionOptions]) -> AsyncStream[Chunk]:
        """Continue one or more prompts, chunk by chunk. ``Chunk.index`` is the choice's."""
        return self._stream(operations.stream_complete(prompt, options))

    async def logits(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[LogitsOptions],
    ) -> Results[SequenceLogits]:
        """Return the rows of each input, all at once. ``stream_logits`` holds the rows of one step only."""
        return await self._run(operations.logits(input, messages, options))

    def stream_logits(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[LogitsOptions],
    ) -> AsyncStream[LogitsBatch]:
        """Stream the rows of each input as they are computed. Raises MissingDependencyError without pyarrow."""
        return self._stream(operations.stream_logits(input, messages, options))

    def stream_arrow(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[LogitsOptions],
    ) -> AsyncStream[bytes]:
        """Stream the rows of ``stream_logits`` as the bytes of one Arrow stream, for a file. pyarrow is not needed."""
        return self._stream(operations.stream_arrow(input, messages, options))

    async def perplexity(self, input: Input, **options: Unpack[InputOptions]) -> Results[Perplexity]:
        """Return how well the model predicts each input."""
        return await self._run(operations.perplexity(input, options))

    async def rewards(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[RewardOptions],
    ) -> Results[Reward]:
        """Return the values that a value head or classifier gives each input."""
        return await self._run(operations.rewards(input, messages, options))

    async def embeddings(self, input: Input, **options: Unpack[EmbeddingOptions]) -> Results[Embedding]:
        """Return a vector for each input."""
        return await self._run(operations.embeddings(input, options))

    async def pooling(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[PoolingOptions],
    ) -> Results[Pooling]:
        """Return a head's last values for each input, or without heads the last token's hidden states."""
        return await self._run(operations.pooling(input, messages, options))

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[TokenizeOptions],
    ) -> Tokens:
        """Return the tokens of a prompt, or of messages under the chat template."""
        return await self._run(operations.tokenize(prompt, messages, options))

    async def detokenize(self, tokens: TokenIds, **options: Unpack[DetokenizeOptions]) -> str:
        """Return the text of tokens, special ones included."""
        return await self._run(operations.detokenize(tokens, options))

    async def models(self) -> Results[Model]:
        """Return the served models, each under each of its names."""
        return await self._run(operations.models())

    async def close(self) -> None:
        """Close the connections, unless they are an ``http_client``'s."""
        if self._owns_http:
            await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, operation: Operation[T]) -> T:
        response = await self._send(operation.request)
        try:
            with translate_errors():
                content = await response.aread()
        finally:
            await response.aclose()
        return operation.read(content)

    def _stream(self, operation: StreamOperation[T]) -> AsyncStream[T]:
        return AsyncStream(operation, self._send)

    async def _send(self, request: Request) -> httpx.Response:
        """Return a response whose body has not been read. The caller closes it. Raises APIError."""
        return await with_retries_async(lambda: self._send_once(request), self._retries, self._sleep)

    async def _send_once(self, request: Request) -> httpx.Response:
        with translate_errors():
            response = await self._http.send(self._endpoint.build(self._http, request), stream=True)
        if response.is_success:
            return response
        try:
            with translate_errors():
                await response.aread()
        finally:
            await response.aclose()
        raise api_error(response)


class AsyncStream(Generic[T]):
    """A stream of parts. Entering an ``async with`` statement sends the request, and leaving it closes the connection.

    Leaving early ends the server's work. ``usage`` is known once a stream of text is over.
    """

    def __init__(
        self, operation: StreamOperation[T], send: Callable[[Request], Awaitable[httpx.Response]]
    ) -> None:
        self._request = operation.request
        self._decoder = operation.decoder()
        self._send = send
        self._response: httpx.Response | None = None
        self._parts: AsyncGenerator[T, None] | None = None

    @property
    def usage(self) -> Usage | None:
        return self._decoder.usage

    async def __aenter__(self) -> Self:
        if self._response is not None:
            raise RuntimeError("a stream can be entered once")
        self._response = await self._send(self._request)
        self._parts = self._read(self._response)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._parts is not None:
            await self._parts.aclose()
        if self._response is not None:
            await self._response.aclose()

    def __aiter__(self) -> AsyncIterator[T]:
        if self._parts is None:
            raise RuntimeError("a stream is read inside an async with statement")
        return self._parts

    async def _read(self, response: httpx.Response) -> AsyncGenerator[T, None]:
        try:
            check_media_type(response, self._request)
            with translate_errors():
                async for data in response.aiter_bytes():
                    for part in self._decoder.feed(data):
                        yield part
            self._decoder.finish()
        finally:
            await response.aclose()
