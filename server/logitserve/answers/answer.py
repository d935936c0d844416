"""What chat and completions answers share: how deltas become chunks, or one whole body."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import orjson

from logitserve.answers.generation import Counts, Delta
from logitserve.answers.record import Record
from logitserve.jobs.job import Job
from logitserve.state import Model


class Answer(ABC):
    """Renders one job's deltas. A subclass gives a choice its shape."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, job: Job, model: Model) -> None:
        self.job = job
        self.model = model
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._records = [self.record(index) for index in range(job.num_choices)]
        self._begun: set[int] = set()

    @abstractmethod
    def chunk_choice(self, record: Record, *, is_first: bool) -> dict[str, Any]:
        """A chunk's choice; ``is_first`` for the first chunk of that choice."""

    @abstractmethod
    def whole_choice(self, record: Record) -> dict[str, Any]:
        """A whole answer's choice."""

    def opening_choice(self, record: Record) -> dict[str, Any] | None:  # noqa: ARG002 - for subclasses
        """The choice of a chunk that goes before the first of ``record``'s choice, where the shape has one."""
        return None

    def envelope_extras(self, record: Record) -> dict[str, Any]:  # noqa: ARG002 - for subclasses
        """Members beside ``choices`` that a choice's record brings."""
        return {}

    def record(self, index: int) -> Record:
        return Record(self.job, self.model, index)

    def says_nothing(self, delta: Delta) -> bool:
        """Whether a stream may leave this delta out: no text, and nothing asked for beside the text."""
        body = self.job.body
        wanted = body.return_token_ids or body.returns_rows or delta.logprobs is not None
        return not (delta.text or delta.finish_reason or delta.prompt or (wanted and delta.token_ids))

    def chunks(self, delta: Delta) -> list[bytes]:
        """One delta as a chunk's JSON, after the choice's opening chunk if it is the first."""
        record = self.record(delta.index)
        is_first = delta.index not in self._begun
        self._begun.add(delta.index)
        opening = self.opening_choice(record) if is_first else None
        chunks = [] if opening is None else [orjson.dumps(self._chunk(opening))]
        record.add(delta)
        chunk = self._chunk(self.chunk_choice(record, is_first=is_first))
        return [*chunks, orjson.dumps({**chunk, **self.envelope_extras(record)})]

    def usage_chunk(self, counts: Counts) -> bytes:
        """The last chunk where ``include_usage`` asks for one."""
        return orjson.dumps({**self._envelope(self.chunk_object, []), "usage": counts.usage()})

    def add(self, delta: Delta) -> None:
        """Keep a delta for ``whole``."""
        self._records[delta.index].add(delta)

    def whole(self, counts: Counts) -> bytes:
        """Everything that was added, as one body."""
        envelope = self._envelope(self.whole_object, [self.whole_choice(record) for record in self._records])
        envelope["usage"] = counts.usage()
        for record in self._records:
            envelope.update(self.envelope_extras(record))
        return orjson.dumps(envelope)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        envelope = self._envelope(self.chunk_object, [choice])
        return {**envelope, "usage": None} if self.job.body.include_usage else envelope

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.job.model_name,
            "choices": choices,
        }
