"""The interface of every answer: deltas in, bytes of a response's body out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from logitserve.errors import ApiError
from logitserve.jobs.job import Job
from logitserve.telemetry.record import Counts
from logitserve.text.choice import Delta

Piece = bytes | memoryview

INLINE_BASE64_BYTES = 1 << 20
INLINE_LIST_BYTES = 1 << 14
"""Lists take 40 times as long to write as base64."""


class Answer(Protocol):
    """Writes one job's answer, streamed or whole: a whole one gives all its bytes at the end.

    Attributes:
        id: the answer's id for the log; None where it has none.
        media_type: the body's media type.
        inline_bytes: the size of a delta up to which it is written on the event loop. A thread would take
            longer to reach.
        tells_errors: whether a body that has begun can report an error; else it is cut off.
    """

    id: str | None
    media_type: str
    inline_bytes: int
    tells_errors: bool

    @property
    def nbytes(self) -> int:
        """Bytes that the answer holds for its end; about 0 where it is streamed."""

    def add(self, delta: Delta, counts: Counts) -> Iterable[Piece]:
        """Take in a delta and return the part of the body that can leave. ``counts`` include the delta."""

    def end(self, counts: Counts) -> Iterable[Piece]:
        """Return the rest of the body, once the job is done. The answer keeps nothing of it."""

    def fill_silence(self) -> Iterable[Piece]:
        """Return bytes without meaning. They keep a silent stream's connection from being taken for dead."""

    def tell(self, error: ApiError) -> Iterable[Piece]:
        """Return the end of a body that has begun and fails. Called only where ``tells_errors``."""


def inline_bytes(job: Job) -> int:
    """Return ``Answer.inline_bytes`` of an answer whose rows are written as the job says."""
    encodings = (job.answer.logits_encoding, job.answer.hidden_states_encoding)
    return INLINE_LIST_BYTES if "list" in encodings else INLINE_BASE64_BYTES


def usage(counts: Counts) -> dict[str, object]:
    """OpenAI's ``usage``."""
    written: dict[str, object] = {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
    }
    if counts.reasoning is not None:
        written["completion_tokens_details"] = {"reasoning_tokens": counts.reasoning}
    return written
