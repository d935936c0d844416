"""``best_of``: more choices are generated than returned, and the likeliest of each prompt are kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import msgspec
from logitengine.link.messages import Array, LogitsRows, PromptOutput

from logitserve.answers.answer import Piece
from logitserve.answers.completion import CompletionAnswer
from logitserve.errors import ApiError
from logitserve.jobs.job import Job
from logitserve.jobs.options import BestChoices
from logitserve.telemetry.record import Counts
from logitserve.text.choice import Delta

WRITTEN_PER_BYTE = 7 / 3
"""Bytes of a delta that is held, and of its base64, which is written beside it at the end."""


class BestOfAnswer:
    """A whole completions answer of the choices with the largest mean log-probability of a token.

    Every choice's deltas are held until all choices have ended. What belongs to a prompt goes with its first returned
    choice.
    """

    tells_errors = False

    def __init__(self, job: Job, best: BestChoices) -> None:
        self._n = job.n
        self._best = best
        requests = [msgspec.structs.replace(r, n=best.n, logprobs=best.logprobs) for r in job.requests]
        self._answer = CompletionAnswer(dataclasses.replace(job, requests=requests))
        self.id = self._answer.id
        self.media_type = self._answer.media_type
        self.inline_bytes = self._answer.inline_bytes
        self.nbytes = 0
        self._deltas: list[list[Delta]] = [[] for _ in range(job.num_choices)]
        self._sums = [0.0] * job.num_choices
        self._num_tokens = [0] * job.num_choices

    def add(self, delta: Delta, counts: Counts) -> Sequence[Piece]:  # noqa: ARG002 - counted at the end
        if delta.logprobs is not None:
            self._sums[delta.index] += math.fsum(delta.logprobs.token_logprobs)
            self._num_tokens[delta.index] += len(delta.logprobs.token_logprobs)
        self.nbytes += int(WRITTEN_PER_BYTE * delta.nbytes)
        self._deltas[delta.index].append(_own(delta))
        return ()

    def end(self, counts: Counts) -> Sequence[Piece]:
        for first in range(0, len(self._deltas), self._n):
            choices = sorted(range(first, first + self._n), key=self._rank, reverse=True)[: self._best.n]
            returned = range(first // self._n * self._best.n, (first // self._n + 1) * self._best.n)
            for delta in self._deltas[first]:
                if delta.prompt is not None:
                    self._answer.add(_of_prompt(delta, returned[0]), counts)
            for index, choice in zip(returned, choices, strict=True):
                for delta in self._deltas[choice]:
                    self._answer.add(dataclasses.replace(delta, index=index, prompt=None), counts)
        self._deltas = []
        return self._answer.end(counts)

    def fill_silence(self) -> Sequence[bytes]:
        return ()

    def tell(self, error: ApiError) -> Sequence[bytes]:  # noqa: ARG002 - a whole body fails before it begins
        return ()

    def _rank(self, choice: int) -> float:
        """Return the choice's mean log-probability; that of no tokens, or of an impossible one, comes last."""
        mean = self._sums[choice] / self._num_tokens[choice] if self._num_tokens[choice] else -math.inf
        return -math.inf if math.isnan(mean) else mean


def _of_prompt(delta: Delta, index: int) -> Delta:
    return Delta(index=index, token_ids=[], parts=(), text_offsets=[], prompt=delta.prompt)


def _own(delta: Delta) -> Delta:
    """Return the delta with copies of its arrays, which are views of an engine's message."""
    return dataclasses.replace(
        delta,
        logits=_own_rows(delta.logits),
        hidden_states=_own_array(delta.hidden_states),
        prompt=_own_prompt(delta.prompt),
    )


def _own_prompt(prompt: PromptOutput | None) -> PromptOutput | None:
    if prompt is None:
        return None
    return msgspec.structs.replace(
        prompt, logits=_own_rows(prompt.logits), hidden_states=_own_array(prompt.hidden_states)
    )


def _own_rows(rows: LogitsRows | None) -> LogitsRows | None:
    if rows is None:
        return None
    values = Array(rows.values.dtype, rows.values.shape, bytes(rows.values.data))
    return LogitsRows(values=values, token_ids=_own_array(rows.token_ids))


def _own_array(array: Array | None) -> Array | None:
    return None if array is None else Array(array.dtype, array.shape, bytes(array.data))
