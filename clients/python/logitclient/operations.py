"""Calls as values: the request to send, and the reader of its answer. Nothing here knows sockets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from logitclient import decoding
from logitclient.arrow import ArrowDecoder
from logitclient.options import (
    ChatOptions,
    CompletionOptions,
    DetokenizeOptions,
    EmbeddingOptions,
    HiddenStatesSpec,
    Input,
    InputOptions,
    LogitsOptions,
    LogitsSpec,
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
)
from logitclient.streams import BytesDecoder, ChunkDecoder, StreamDecoder

T = TypeVar("T")

JSON = "application/json"
EVENTS = "text/event-stream"
ARROW = "application/vnd.apache.arrow.stream"


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request, but for the server's address and the key."""

    method: str
    path: str
    accept: str
    body: Mapping[str, Any] | None = None

    @property
    def content(self) -> bytes | None:
        """Return the body as JSON. Raises TypeError or ValueError for a value that JSON lacks."""
        if self.body is None:
            return None
        # Without escapes and spaces, since servers bound the bytes of a body.
        text = json.dumps(
            self.body, default=_to_json, allow_nan=False, ensure_ascii=False, separators=(",", ":")
        )
        return text.encode()


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """A call with one answer."""

    request: Request
    parse: Callable[[dict[str, Any]], T]

    def read(self, content: bytes) -> T:
        """Return the result in an answer's bytes. Raises DecodeError."""
        with decoding.decode_errors(f"answer of {self.request.path}"):
            return self.parse(json.loads(content))


@dataclass(frozen=True, slots=True)
class StreamOperation(Generic[T]):
    """A call whose answer comes in parts. ``decoder`` makes the decoder of one answer."""

    request: Request
    decoder: Callable[[], StreamDecoder[T]]


def _to_json(value: object) -> Any:
    """Return numpy's numbers and arrays, and our own specs, as JSON has them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, LogitsSpec | HiddenStatesSpec):
        chosen = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        # Always base64: it is exact, and costs the server a fortieth of a list.
        return {name: item for name, item in chosen.items() if item is not None} | {"encoding": "base64"}
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


def _post(path: str, body: Mapping[str, Any], accept: str = JSON) -> Request:
    return Request("POST", path, accept, body)


def _generation(options: ChatOptions | CompletionOptions, *, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = dict(options)
    if "stream" in body:
        raise TypeError("'stream' is chosen by the method: stream_chat or stream_complete")
    return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body


def _with_input(
    given: Input | None, messages: Messages | None, options: Mapping[str, Any], name: str = "input"
) -> dict[str, Any]:
    if (given is None) == (messages is None):
        raise TypeError(f"exactly one of {name} and messages is needed")
    return {**options, **({"messages": messages} if given is None else {name: given})}


def chat(messages: Messages, options: ChatOptions) -> Operation[Completion]:
    body = {**_generation(options, stream=False), "messages": messages}
    return Operation(_post("/v1/chat/completions", body), decoding.chat_completion)


def stream_chat(messages: Messages, options: ChatOptions) -> StreamOperation[Chunk]:
    body = {**_generation(options, stream=True), "messages": messages}
    return StreamOperation(
        _post("/v1/chat/completions", body, EVENTS), lambda: ChunkDecoder(decoding.chat_chunks)
    )


def complete(prompt: Input, options: CompletionOptions) -> Operation[Completion]:
    body = {**_generation(options, stream=False), "prompt": prompt}
    return Operation(_post("/v1/completions", body), decoding.text_completion)


def stream_complete(prompt: Input, options: CompletionOptions) -> StreamOperation[Chunk]:
    body = {**_generation(options, stream=True), "prompt": prompt}
    return StreamOperation(_post("/v1/completions", body, EVENTS), lambda: ChunkDecoder(decoding.text_chunks))


def logits(
    given: Input | None, messages: Messages | None, options: LogitsOptions
) -> Operation[Results[SequenceLogits]]:
    body = _with_input(given, messages, options) | {"encoding": "base64"}
    return Operation(_post("/v1/logits", body), decoding.logits)


def stream_logits(
    given: Input | None, messages: Messages | None, options: LogitsOptions
) -> StreamOperation[LogitsBatch]:
    return StreamOperation(_post("/v1/logits", _with_input(given, messages, options), ARROW), ArrowDecoder)


def stream_arrow(
    given: Input | None, messages: Messages | None, options: LogitsOptions
) -> StreamOperation[bytes]:
    return StreamOperation(_post("/v1/logits", _with_input(given, messages, options), ARROW), BytesDecoder)


def perplexity(given: Input, options: InputOptions) -> Operation[Results[Perplexity]]:
    return Operation(_post("/v1/perplexity", {**options, "input": given}), decoding.perplexities)


def rewards(
    given: Input | None, messages: Messages | None, options: RewardOptions
) -> Operation[Results[Reward]]:
    return Operation(_post("/v1/rewards", _with_input(given, messages, options)), decoding.rewards)


def embeddings(given: Input, options: EmbeddingOptions) -> Operation[Results[Embedding]]:
    body = {**options, "input": given, "encoding_format": "base64"}
    return Operation(_post("/v1/embeddings", body), decoding.embeddings)


def pooling(
    given: Input | None, messages: Messages | None, options: PoolingOptions
) -> Operation[Results[Pooling]]:
    body = _with_input(given, messages, options) | {"encoding_format": "base64"}
    return Operation(_post("/pooling", body), decoding.poolings)


def tokenize(prompt: str | None, messages: Messages | None, options: TokenizeOptions) -> Operation[Tokens]:
    return Operation(_post("/tokenize", _with_input(prompt, messages, options, "prompt")), decoding.tokens)


def detokenize(tokens: TokenIds, options: DetokenizeOptions) -> Operation[str]:
    return Operation(_post("/detokenize", {**options, "tokens": tokens}), decoding.prompt_text)


def models() -> Operation[Results[Model]]:
    return Operation(Request("GET", "/v1/models", JSON), decoding.models)
