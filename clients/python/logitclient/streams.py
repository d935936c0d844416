"""Decoders of streamed answers: bytes in, chunks out. They know nothing of HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from logitclient.decoding import chunk_usage, decode_errors
from logitclient.errors import StreamError
from logitclient.results import Chunk, Usage
from logitclient.sse import Event, SSEDecoder

T_co = TypeVar("T_co", covariant=True)


class StreamDecoder(Protocol[T_co]):
    """A decoder of one stream, which is fed its bytes as they come."""

    @property
    def usage(self) -> Usage | None:
        """Return the counts of tokens, or None before they have come."""

    def feed(self, data: bytes) -> Sequence[T_co]:
        """Return the parts that ``data`` completes. Raises StreamError or DecodeError."""

    def finish(self) -> None:
        """Check the end, once all bytes were fed. Raises StreamError where the stream was cut short."""


class BytesDecoder:
    """A decoder that hands bytes on as they come. A body that is cut short is the connection's error."""

    usage = None

    def feed(self, data: bytes) -> list[bytes]:
        return [data]

    def finish(self) -> None:
        """Accept any end."""


class ChunkDecoder:
    """A decoder of chat and completions. ``parse`` reads one event. Empty chunks are dropped."""

    def __init__(self, parse: Callable[[dict[str, Any]], list[Chunk]]) -> None:
        self._parse = parse
        self._events = SSEDecoder()
        self._done = False
        self.usage: Usage | None = None

    def feed(self, data: bytes) -> list[Chunk]:
        return [chunk for event in self._events.feed(data) for chunk in self._chunks(event)]

    def finish(self) -> None:
        if not self._done:
            raise StreamError("the stream ended before its [DONE]")

    def _chunks(self, event: Event) -> list[Chunk]:
        if self._done:
            return []
        if event.is_done:
            self._done = True
            return []
        with decode_errors("chunk"):
            body = json.loads(event.data)
            if body.get("error") is not None:
                raise _stream_error(body["error"])
            self.usage = chunk_usage(body) or self.usage
            chunks = self._parse(body)
        return [chunk for chunk in chunks if _is_filled(chunk)]


def _is_filled(chunk: Chunk) -> bool:
    """Return whether a chunk holds anything. The one that opens a chat's answer does not."""
    rows = [
        part for held in (chunk.logits, chunk.hidden_states) if held for part in (held.generated, held.prompt)
    ]
    has_tokens = chunk.token_ids is not None and len(chunk.token_ids) > 0
    # A token that ends within a character has logprobs before it has text.
    has_logprobs = bool(chunk.prompt_logprobs or chunk.raw.get("logprobs"))
    has_prompt = bool(chunk.raw.get("prompt_token_ids"))
    return bool(
        chunk.text
        or chunk.finish_reason
        or has_tokens
        or has_logprobs
        or has_prompt
        or any(part is not None for part in rows)
    )


def _stream_error(error: Any) -> StreamError:
    if not isinstance(error, dict):
        return StreamError(str(error))
    return StreamError(
        str(error.get("message")), type=error.get("type"), code=error.get("code"), param=error.get("param")
    )
