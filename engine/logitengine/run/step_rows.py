"""Results of a step, on their way to the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from logitengine.link.messages import PromptOutput, StepOutput
from logitengine.run.rows import LogitsBlock, LogprobsBlock, to_array
from logitengine.schedule.sequence import Sequence

T = TypeVar("T")

Row = tuple[T, int]
"""A block of several rows, and the index of the row in question."""


@dataclass(frozen=True, slots=True)
class PromptPart:
    """One sequence's rows ``start:stop`` of a group's blocks; ``offset`` is the position of the first row.

    ``values`` float32 [rows or 1, outputs] and ``pooled`` float32 [H] are the sequence's own. ``num_scored``
    is the number of rows that have a token after them.
    """

    offset: int
    start: int
    stop: int
    num_scored: int
    logits: LogitsBlock | None
    logprobs: LogprobsBlock | None
    hidden_states: Tensor | None
    values: Tensor | None
    pooled: Tensor | None

    def output(self) -> PromptOutput:
        logits, logprobs, start, stop = self.logits, self.logprobs, self.start, self.stop
        has_logprobs = logprobs is not None and self.num_scored > 0
        return PromptOutput(
            offset=self.offset,
            logits=None if logits is None else logits.rows(start, stop),
            logprobs=logprobs.rows(start, start + self.num_scored) if logprobs and has_logprobs else None,
            hidden_states=None if self.hidden_states is None else to_array(self.hidden_states[start:stop]),
            values=None if self.values is None else to_array(self.values),
            pooled=None if self.pooled is None else to_array(self.pooled),
        )


@dataclass(slots=True)
class StepRows:
    """Fetched results of a step, readable after the wait of the device's next mark.

    ``token_ids`` int32 [R] holds the drawn tokens, or a code below 0 where nothing could be drawn (see
    `logitkernels.sampling`). It is None in a step without a draw. The dicts are keyed by row of the draw and,
    for prompts, by sequence. ``has_encoded`` says whether the plan's item is encoded, and
    ``encoding_error`` why it cannot be.
    """

    token_ids: Tensor | None = None
    logits: dict[int, Row[LogitsBlock]] = field(default_factory=dict)
    logprobs: dict[int, Row[LogprobsBlock]] = field(default_factory=dict)
    hidden_states: dict[int, Row[Tensor]] = field(default_factory=dict)
    prompts: dict[Sequence, PromptPart] = field(default_factory=dict)
    has_encoded: bool = False
    encoding_error: str | None = None

    def prompt_output(self, sequence: Sequence) -> StepOutput:
        """Return the output of a sequence for which the step drew nothing: its prompt rows, if any."""
        part = self.prompts.get(sequence)
        return StepOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            num_cached_tokens=sequence.num_cached or 0,
            prompt=None if part is None else part.output(),
        )

    def drawn_output(self, sequence: Sequence, row: int, token_id: int) -> StepOutput:
        """Return the output of a sequence whose row ``row`` drew ``token_id``: the token, its row and its prompt rows."""
        part = self.prompts.get(sequence)
        logits = logprobs = hidden_states = None
        if row in self.logits:
            block, place = self.logits[row]
            logits = block.rows(place, place + 1)
        if row in self.logprobs:
            scored, place = self.logprobs[row]
            logprobs = scored.rows(place, place + 1)
        if row in self.hidden_states:
            states, place = self.hidden_states[row]
            hidden_states = to_array(states[place : place + 1])
        return StepOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            num_cached_tokens=sequence.num_cached or 0,
            token_ids=[token_id],
            logits=logits,
            logprobs=logprobs,
            hidden_states=hidden_states,
            prompt=None if part is None else part.output(),
        )
