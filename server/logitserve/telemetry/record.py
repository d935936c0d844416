"""The record of a request: its names, times and counts, for its log line, the metrics and its span."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol, Self

from starlette.types import Scope

KEY = "logitserve.record"


class Failure(Protocol):
    """The part of an ApiError that is counted. Its code is one of a fixed set, never a client's text."""

    status: int
    code: str | None


@dataclass(slots=True)
class Counts:
    """Counts of a request's tokens so far.

    Cached tokens are those of the prompts that the prefix cache had. Those of the thinking are part of the completion's;
    None where nothing tells the thinking from the answer.
    """

    prompt: int
    completion: int = 0
    cached: int = 0
    reasoning: int | None = None


@dataclass(slots=True, eq=False)
class RequestRecord:
    """A request from its head to the end of its answer. It never holds a prompt or an answer.

    Times are seconds of `time.monotonic`; one is None until it has come, and for good where it never comes.

    Attributes:
        method: one of the usual ones, or "other".
        route: template of the path, or "other".
        trace_id: of the client's trace, or of the server's own where it traces.
        counts: set once the request has become work for the engine.
        queued, begun: when that work was handed over, and when the engine began its first step.
        first_token, last_token: when tokens of any choice came.
        finish_reasons: one for each choice that is complete.
        failure: the error that was the answer, or ended it.
        has_left: whether the client went away, or was dropped, before its answer was complete.
        status: 0 until the answer begins.
    """

    request_id: str
    method: str
    route: str
    trace_id: str | None = None
    answer_id: str | None = None
    counts: Counts | None = None
    arrived: float = field(default_factory=time.monotonic)
    queued: float | None = None
    begun: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    failure: Failure | None = None
    has_left: bool = False
    status: int = 0

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """Return the record that the request log put into the scope."""
        record: Self = scope[KEY]
        return record

    @property
    def seconds(self) -> float:
        """Time from the request's head to the end of its answer, or to this moment."""
        return (time.monotonic() if self.ended is None else self.ended) - self.arrived

    def names(self) -> dict[str, str]:
        """Return the fields by which the request is found in the log."""
        names = {"request_id": self.request_id}
        return names if self.trace_id is None else {**names, "trace_id": self.trace_id}


def note_failure(scope: Scope, failure: Failure) -> None:
    """Remember the error that a request is answered with, where a record is kept."""
    record: RequestRecord | None = scope.get(KEY)
    if record is not None:
        record.failure = failure


def names_of(scope: Scope) -> dict[str, str]:
    """Return `RequestRecord.names`, or nothing where no record is kept."""
    record: RequestRecord | None = scope.get(KEY)
    return {} if record is None else record.names()
