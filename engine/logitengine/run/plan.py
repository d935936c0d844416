"""A step as data: what to compute, how to draw, and what every sequence is to be shown of it.

Whoever has the same sequences can execute the same plan. Making one changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from logitkernels.sampling import RowSampling
from numpy.typing import NDArray

from logitengine.link.messages import HiddenStatesSpec, LogitsSpec, OutputSpec
from logitengine.run.batch import Batch, build_batch
from logitengine.schedule.scheduler import Chunk
from logitengine.schedule.sequence import Sequence

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class DrawnGroup(Generic[S]):
    """Rows of the draw of which the same is asked."""

    spec: S
    rows: list[int]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt positions ``rows`` of a sequence.

    Attributes:
        num_held: the hidden states of the first so many are held.
        batch_start: row of the batch with the hidden state of the first position that is not.
        following: the token after each position, 0 after the prompt's last.
    """

    sequence: Sequence
    rows: range
    num_held: int
    batch_start: int
    following: list[int]

    @property
    def ends_prompt(self) -> bool:
        return self.rows.stop == self.sequence.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """Prompt rows of which the same is asked."""

    outputs: OutputSpec
    members: list[PromptRows]

    @property
    def num_rows(self) -> int:
        return sum(len(member.rows) for member in self.members)


@dataclass(frozen=True, slots=True)
class Hold:
    """Hidden states of the batch's rows ``start:stop`` to hold: their prompt rows are owed."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        chunks: every sequence's part.
        batch: the chunks that compute tokens; None in a step of prompt rows alone.
        sampling: how each drawing chunk of the batch draws.
        allowed: int32 [drawing chunks, words], the tokens that each may draw; see `Kernels.prepare_sampling`. None where
            all may draw any.
        logits, logprobs, hidden_states: what is to be shown of drawn tokens; the rows are those of the draw. Logprobs
            groups are told apart by the number of likeliest tokens.
        prompts: what is to be shown of prompts.
        holds: hidden states to hold for later steps.
        dropped: sequences of which nothing held is needed any more; finished ones are to be forgotten.
    """

    chunks: list[Chunk]
    batch: Batch | None
    sampling: list[RowSampling]
    allowed: NDArray[np.int32] | None
    logits: list[DrawnGroup[LogitsSpec]]
    logprobs: list[DrawnGroup[int]]
    hidden_states: list[DrawnGroup[HiddenStatesSpec]]
    prompts: list[PromptGroup]
    holds: list[Hold]
    dropped: list[Sequence]

    @property
    def drawing(self) -> list[Chunk]:
        """The chunks that draw a token, in the order of the draw's rows."""
        return self.batch.drawing if self.batch is not None else []


def plan_step(
    chunks: list[Chunk],
    block_size: int,
    sampling_of: Callable[[Sequence], RowSampling],
    dropped: Iterable[Sequence] = (),
) -> StepPlan:
    """Plan the step of some chunks, before any of them is completed."""
    computing = [chunk for chunk in chunks if chunk.num_tokens]
    batch = build_batch(computing, block_size) if computing else None
    drawing = batch.drawing if batch is not None else []
    logits: dict[LogitsSpec, list[int]] = {}
    logprobs: dict[int, list[int]] = {}
    hidden_states: dict[HiddenStatesSpec, list[int]] = {}
    for row, chunk in enumerate(drawing):
        outputs = chunk.sequence.outputs
        if outputs.logits is not None and outputs.logits.wants_generated:
            logits.setdefault(outputs.logits, []).append(row)
        if outputs.logprobs is not None:
            logprobs.setdefault(outputs.logprobs, []).append(row)
        if outputs.hidden_states is not None and outputs.hidden_states.wants_generated:
            hidden_states.setdefault(outputs.hidden_states, []).append(row)
    starts = dict(zip((chunk.sequence for chunk in computing), batch.starts if batch else [], strict=True))
    prompts: dict[OutputSpec, list[PromptRows]] = {}
    for chunk in chunks:
        if chunk.rows:
            member = _prompt_rows(chunk, starts.get(chunk.sequence, 0))
            prompts.setdefault(chunk.sequence.outputs.of_prompt, []).append(member)
    return StepPlan(
        chunks=chunks,
        batch=batch,
        sampling=[sampling_of(chunk.sequence) for chunk in drawing],
        allowed=None,
        logits=[DrawnGroup(spec, rows) for spec, rows in logits.items()],
        logprobs=[DrawnGroup(top, rows) for top, rows in logprobs.items()],
        hidden_states=[DrawnGroup(spec, rows) for spec, rows in hidden_states.items()],
        prompts=[PromptGroup(outputs, members) for outputs, members in prompts.items()],
        holds=[_hold(chunk, starts[chunk.sequence]) for chunk in computing if chunk.num_held],
        dropped=list(dropped),
    )


def _prompt_rows(chunk: Chunk, batch_start: int) -> PromptRows:
    sequence, rows = chunk.sequence, chunk.rows
    following = sequence.prompt.token_ids[rows.start + 1 : rows.stop + 1]
    return PromptRows(
        sequence=sequence,
        rows=rows,
        num_held=min(max(chunk.start - rows.start, 0), len(rows)),
        batch_start=batch_start + max(rows.start - chunk.start, 0),
        following=following + [0] * (len(rows) - len(following)),
    )


def _hold(chunk: Chunk, batch_start: int) -> Hold:
    stop = min(chunk.stop, chunk.sequence.num_prompt_tokens)
    first = max(chunk.start, chunk.rows.stop)
    return Hold(chunk.sequence, batch_start + first - chunk.start, batch_start + stop - chunk.start)
