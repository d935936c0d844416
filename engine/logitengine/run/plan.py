"""A step as data: the tokens to compute, the sampling, and the outputs of every sequence.

Any process that has the same sequences can execute the same plan. Making a plan changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from logitkernels.sampling import RowSampling
from numpy.typing import NDArray

from logitengine.link.messages import HiddenStatesSpec, LogitsSpec, OutputSpec, PromptItem
from logitengine.run.batch import Batch, build_batch
from logitengine.schedule.scheduler import Chunk
from logitengine.schedule.sequence import Sequence

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class DrawnGroup(Generic[S]):
    """Rows of the draw with the same spec."""

    spec: S
    rows: list[int]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt positions ``rows`` of a sequence whose rows are computed.

    Attributes:
        num_held: number of leading positions whose hidden states are held.
        batch_start: batch row of the hidden state of the first position that is not held.
        following: token after each position, 0 after the prompt's last.
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
    """Prompt rows with the same spec."""

    outputs: OutputSpec
    members: list[PromptRows]

    @property
    def num_rows(self) -> int:
        return sum(len(member.rows) for member in self.members)


@dataclass(frozen=True, slots=True)
class Hold:
    """Hidden states of the batch's rows ``start:stop`` that are held because their prompt rows are owed."""

    sequence: Sequence
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Plan of one step.

    Attributes:
        chunks: part of every sequence in the step.
        batch: chunks that compute tokens; None in a step of prompt rows alone.
        sampling: sampling of each drawing chunk of the batch.
        allowed: int32 [drawing chunks, words], the tokens that each chunk may draw; see
            `Kernels.prepare_sampling`. None if every chunk may draw any token.
        logits, logprobs, hidden_states: outputs of drawn tokens, with rows of the draw. A logprobs group's
            spec is its number of likeliest tokens.
        prompts: outputs of prompts.
        holds: hidden states to hold for later steps.
        encoding: the item that the image encoder works on in the step.
        dropped_outputs: digests of encoder outputs that are no longer kept.
        dropped: sequences whose held states are no longer needed; finished ones are forgotten.
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
    encoding: PromptItem | None = None
    dropped_outputs: Iterable[bytes] = ()

    @property
    def drawing(self) -> list[Chunk]:
        """Chunks that draw a token, in the order of the draw's rows."""
        return self.batch.drawing if self.batch is not None else []


def plan_step(
    chunks: list[Chunk],
    block_size: int,
    sampling_of: Callable[[Sequence], RowSampling],
    dropped: Iterable[Sequence] = (),
    *,
    encoding: PromptItem | None = None,
    dropped_outputs: Iterable[bytes] = (),
) -> StepPlan:
    """Plan a step of the given chunks, before any of them is completed."""
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
        allowed=_masks(drawing),
        logits=[DrawnGroup(spec, rows) for spec, rows in logits.items()],
        logprobs=[DrawnGroup(top, rows) for top, rows in logprobs.items()],
        hidden_states=[DrawnGroup(spec, rows) for spec, rows in hidden_states.items()],
        prompts=[PromptGroup(outputs, members) for outputs, members in prompts.items()],
        holds=[_hold(chunk, starts[chunk.sequence]) for chunk in computing if chunk.num_held],
        dropped=list(dropped),
        encoding=encoding,
        dropped_outputs=list(dropped_outputs),
    )


def _masks(drawing: list[Chunk]) -> NDArray[np.int32] | None:
    """Return the masks of the draw's rows, if any sequence follows a grammar: int32 [rows, words]."""
    grammars = [chunk.sequence.grammar for chunk in drawing]
    masks = {row: grammar.mask for row, grammar in enumerate(grammars) if grammar is not None}
    allowed: NDArray[np.int32] | None = None
    for row, mask in masks.items():
        assert mask is not None  # noqa: S101 - the scheduler has seen to it
        if allowed is None:
            allowed = np.full((len(drawing), len(mask)), -1, dtype=np.int32)
        allowed[row] = mask
    return allowed


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
