"""The blocking client. Only its IO is here: ``operations`` says how requests are written and answers read."""

# ruff: noqa: A002 - input is the wire's name

from __future__ import annotations

import random as random_module
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar, Unpack

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
from logitclient.retries import RetryPolicy, with_retries
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


class Client:
    """A client of one logitserve server. Use it in a ``with`` statement, or close it.

    ``timeout`` is in seconds, or httpx's own. ``max_retries`` counts the tries after a 429 or 503.
    An ``http_client`` stays the caller's to close. A ``transport`` becomes part of the httpx client made here.
    ``sleep`` and ``random`` are for tests. Every call raises the errors of ``logitclient.errors``.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        http_client: httpx.Client | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        check_injection(http_client, transport)
        self._endpoint = Endpoint(base_url, api_key, timeout)
        self._owns_http = http_client is None
        self._http = httpx.Client(transport=transport) if http_client is None else http_client
        self._retries = RetryPolicy(max_retries, random)
        self._sleep = sleep

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Completion:
        """Continue a conversation."""
        return self._run(operations.chat(messages, options))

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Stream[Chunk]:
        """Continue a conversation, chunk by chunk."""
        return self._stream(operations.stream_chat(messages, options))

    def complete(self, prompt: Input, **options: Unpack[CompletionOptions]) -> Completion:
        """Continue one or more prompts as they are."""
        return self._run(operations.complete(prompt, options))

    def stream_complete(self, prompt: Input, **options: Unpack[CompletionOptions]) -> Stream[Chunk]:
        """Continue one or more prompts, chunk by chunk. ``Chunk.index`` is the choice's."""
        return self._stream(operations.stream_complete(prompt, options))

    def logits(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[LogitsOptions],
    ) -> Results[SequenceLogits]:
        """Return the rows of each input, all at once. ``stream_logits`` holds the rows of one step only."""
        return self._run(operations.logits(input, messages, options))

    def stream_logits(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[LogitsOptions],
    ) -> Stream[LogitsBatch]:
        """Stream the rows of each input as they are computed. Raises MissingDependencyError without pyarrow."""
        return self._stream(operations.stream_logits(input, messages, options))

    def stream_arrow(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[LogitsOptions],
    ) -> Stream[bytes]:
        """Stream the rows of ``stream_logits`` as the bytes of one Arrow stream, for a file. pyarrow is not needed."""
        return self._stream(operations.stream_arrow(input, messages, options))

    def perplexity(self, input: Input, **options: Unpack[InputOptions]) -> Results[Perplexity]:
        """Return how well the model predicts each input."""
        return self._run(operations.perplexity(input, options))

    def rewards(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[RewardOptions],
    ) -> Results[Reward]:
        """Return the values that a value head or classifier gives each input."""
        return self._run(operations.rewards(input, messages, options))

    def embeddings(self, input: Input, **options: Unpack[EmbeddingOptions]) -> Results[Embedding]:
        """Return a vector for each input."""
        return self._run(operations.embeddings(input, options))

    def pooling(
        self,
        input: Input | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[PoolingOptions],
    ) -> Results[Pooling]:
        """Return a head's last values for each input, or without heads the last token's hidden states."""
        return self._run(operations.pooling(input, messages, options))

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        **options: Unpack[TokenizeOptions],
    ) -> Tokens:
        """Return the tokens of a prompt, or of messages under the chat template."""
        return self._run(operations.tokenize(prompt, messages, options))

    def detokenize(self, tokens: TokenIds, **options: Unpack[DetokenizeOptions]) -> str:
        """Return the text of tokens, special ones included."""
        return self._run(operations.detokenize(tokens, options))

    def models(self) -> Results[Model]:
        """Return the served models, each under each of its names."""
        return self._run(operations.models())

    def close(self) -> None:
        """Close the connections, unless they are an ``http_client``'s."""
        if self._owns_http:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, operation: Operation[T]) -> T:
        response = self._send(operation.request)
        try:
            with translate_errors():
                content = response.read()
        finally:
            response.close()
        return operation.read(content)

    def _stream(self, operation: StreamOperation[T]) -> Stream[T]:
        return Stream(operation, self._send)

    def _send(self, request: Request) -> httpx.Response:
        """Return a response whose body has not been read. The caller closes it. Raises APIError."""
        return with_retries(lambda: self._send_once(request), self._retries, self._sleep)

    def _send_once(self, request: Request) -> httpx.Response:
        with translate_errors():
            response = self._http.send(self._endpoint.build(self._http, request), stream=True)
        if response.is_success:
            return response
        try:
            with translate_errors():
                response.read()
        finally:
            response.close()
        raise api_error(response)


class Stream(Generic[T]):
    """A stream of parts. Entering a ``with`` statement sends the request, and leaving it closes the connection.

    Leaving early ends the server's work. ``usage`` is known once a stream of text is over.
    """

    def __init__(self, operation: StreamOperation[T], send: Callable[[Request], httpx.Response]) -> None:
        self._request = operation.request
        self._decoder = operation.decoder()
        self._send = send
        self._response: httpx.Response | None = None
        self._parts: Iterator[T] = iter(())

    @property
    def usage(self) -> Usage | None:
        return self._decoder.usage

    def __enter__(self) -> Self:
        if self._response is not None:
            raise RuntimeError("a stream can be entered once")
        self._response = self._send(self._request)
        self._parts = self._read(self._response)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._response is not None:
            self._response.close()

    def __iter__(self) -> Iterator[T]:
        if self._response is None:
            raise RuntimeError("a stream is read inside a with statement")
        return self._parts

    def _read(self, response: httpx.Response) -> Iterator[T]:
        try:
            check_media_type(response, self._request)
            with translate_errors():
                for data in response.iter_bytes():
                    yield from self._decoder.feed(data)
            self._decoder.finish()
        finally:
            response.close()
