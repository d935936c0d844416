"""The common part of chat and completions answers: choices in an envelope, as events or as one document."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from logitserve.answers.answer import inline_bytes, usage
from logitserve.answers.delta_parts import halves
from logitserve.answers.json_pieces import dumps
from logitserve.answers.record import Record
from logitserve.errors import ApiError
from logitserve.jobs.job import Job
from logitserve.telemetry.record import Counts
from logitserve.text.choice import Delta

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"

LONGEST_EVENT = 400_000
"""Bytes of an event that holds more than one row. A widely used client reads lines of at most 512 KiB."""

WRITTEN_PER_BYTE = 4 / 3
"""Base64's length for each byte; lists and log-probabilities are longer."""

R = TypeVar("R", bound=Record)


class ChoicesAnswer(ABC, Generic[R]):
    """An Answer with choices. A subclass gives a choice its shape."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, job: Job) -> None:
        self.job = job
        self.id: str | None = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.media_type = "text/event-stream" if job.answer.stream else "application/json"
        self.inline_bytes = inline_bytes(job)
        self.tells_errors = job.answer.stream
        self.nbytes = 0
        self._created = int(time.time())
        self._fingerprint = job.model.info.fingerprint
        self._chunk_usage: dict[str, Any] = {"usage": None} if job.answer.include_usage else {}
        self._begun: set[int] = set()
        self._records: list[R] = []
        if not job.answer.stream:
            self._records = [self.record(index) for index in range(job.num_choices)]

    @abstractmethod
    def record(self, index: int) -> R:
        """Return an empty record of a choice."""

    @abstractmethod
    def opening_choices(self, record: R) -> list[dict[str, Any]]:
        """Return the choices of the chunks that open a choice, from its empty record."""

    @abstractmethod
    def chunk_choice(self, record: R) -> dict[str, Any]:
        """Return a chunk's choice."""

    @abstractmethod
    def whole_choice(self, record: R) -> dict[str, Any]:
        """Return a whole answer's choice."""

    def envelope_extras(self, record: R) -> dict[str, Any]:  # noqa: ARG002 - for subclasses
        """Return the members beside ``choices`` that a choice's record brings."""
        return {}

    def opening_extras(self, record: R) -> dict[str, Any]:  # noqa: ARG002 - for subclasses
        """Return those that come once, in a stream with the chunks that open the choice."""
        return {}

    def divided(self, delta: Delta) -> Sequence[Delta]:
        """Return the delta as those that have a chunk each, whatever their lengths."""
        return (delta,)

    # Methods of Answer.

    def add(self, delta: Delta, counts: Counts) -> Sequence[bytes]:
        if not self.job.answer.stream:
            self.nbytes += self._records[delta.index].add(delta)
            return ()
        if not self._says_something(delta):
            return ()
        if self.job.answer.continuous_usage:
            self._chunk_usage = {"usage": usage(counts)}
        return self._events(delta)

    def end(self, counts: Counts) -> Sequence[bytes]:
        if self.job.answer.stream:
            with_usage = {**self._envelope(self.chunk_object, []), "usage": usage(counts)}
            return [event(with_usage), DONE] if self.job.answer.include_usage else [DONE]
        document = self._envelope(self.whole_object, [self.whole_choice(record) for record in self._records])
        document["usage"] = usage(counts)
        for record in self._records:
            document.update(self.envelope_extras(record), **self.opening_extras(record))
        self._records = []  # lets each piece be freed once it is sent
        return dumps(document)

    def fill_silence(self) -> Sequence[bytes]:
        """Return a comment, which clients skip."""
        return [PING]

    def tell(self, error: ApiError) -> Sequence[bytes]:
        """Return one event with the error, and no [DONE]."""
        return [event(error.body())]

    # Chunks.

    def _says_something(self, delta: Delta) -> bool:
        """Return whether the delta has text, or something that was requested beside the text."""
        job = self.job
        with_tokens = job.answer.return_token_ids or job.returns_rows or delta.logprobs is not None
        return bool(delta.parts or delta.finish_reason or delta.prompt or (with_tokens and delta.token_ids))

    def _events(self, delta: Delta) -> list[bytes]:
        """Return the delta as a chunk, or as several where one would be too long.

        Opening chunks precede a choice's first.
        """
        events = [] if delta.index in self._begun else self._opening(delta.index)
        pending = list(reversed(self.divided(delta)))
        while pending:
            part = pending.pop()
            written = None if self._is_long(part) else self._event(part)
            if written is None or len(written) > LONGEST_EVENT:
                two = halves(part)
                if two is not None:
                    pending += reversed(two)
                    continue
            events.append(self._event(part) if written is None else written)
        return events

    def _opening(self, index: int) -> list[bytes]:
        self._begun.add(index)
        record = self.record(index)
        chunks = [self._chunk(choice) for choice in self.opening_choices(record)]
        if chunks:
            chunks[0].update(self.opening_extras(record))
        return [event(chunk) for chunk in chunks]

    def _event(self, delta: Delta) -> bytes:
        record = self.record(delta.index)
        record.add(delta)
        chunk = self._chunk(self.chunk_choice(record))
        chunk.update(self.envelope_extras(record))
        return event(chunk)

    def _is_long(self, delta: Delta) -> bool:
        """Return whether the delta's event is expected to be too long, without writing it to measure it."""
        if delta.prompt is None and len(delta.token_ids) < 2:
            return False  # the case of nearly every delta
        return WRITTEN_PER_BYTE * delta.nbytes > LONGEST_EVENT

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._envelope(self.chunk_object, [choice]), **self._chunk_usage}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.job.model_name,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }


def event(document: dict[str, Any]) -> bytes:
    """Return one server-sent event of JSON, which holds no line break."""
    return b"".join([b"data: ", *dumps(document), b"\n\n"])
