"""Computation of the outputs that a plan asks for, and their transfer to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from logitkernels import Kernels
from torch import Tensor

from logitengine.link.messages import HiddenStatesSpec, OutputSpec
from logitengine.model.network.value_heads import ValueHead
from logitengine.run.devices import Device
from logitengine.run.plan import PromptGroup, PromptRows, StepPlan
from logitengine.run.prompt_states import HeldStates, PooledStates
from logitengine.run.rows import (
    TORCH_DTYPES,
    LogitsBlock,
    LogprobsBlock,
    compute_logprobs,
    join_logits,
    join_logprobs,
    take_columns,
)
from logitengine.run.step_rows import PromptPart, StepRows
from logitengine.schedule.sequence import Sequence

HEAD_ROWS = 64
"""Prompt rows that pass through the head at once: 64 rows of 49,152 float32 logits are 12 MiB."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Results of a batch on the device, valid until the next batch is launched.

    ``hidden`` is [T, H], for every token. The other fields are for the R rows that draw: ``drawn_hidden``
    [R, H], raw ``logits`` float32 [R, V], ``token_ids`` int32 [R] and, if a row shows it, ``processed``
    float32 [R, V]. They are None without a draw.
    """

    hidden: Tensor
    drawn_hidden: Tensor | None = None
    logits: Tensor | None = None
    token_ids: Tensor | None = None
    processed: Tensor | None = None


class RowComputer:
    """Computes rows with equal specs together, whichever requests they belong to.

    Args:
        head: maps hidden states [R, H] to raw logits float32 [R, V].
    """

    def __init__(
        self,
        head: Callable[[Tensor], Tensor],
        kernels: Kernels,
        device: Device,
        value_heads: Mapping[str, ValueHead],
    ) -> None:
        self._head = head
        self._kernels = kernels
        self._device = device
        self._value_heads = value_heads
        self.held = HeldStates(device)
        self.pooled = PooledStates()

    def drop(self, sequence: Sequence) -> None:
        """Free the states held for the sequence, and its pooled state if it is finished."""
        self.held.drop(sequence)
        if sequence.is_finished:
            self.pooled.drop(sequence)

    def compute(self, plan: StepPlan, forward: Forward | None) -> StepRows:
        """Launch and fetch the outputs of the plan. ``forward`` is the result of its batch."""
        rows = StepRows()
        if forward is not None and forward.token_ids is not None:
            rows.token_ids = self._device.fetch(forward.token_ids)
            self._show_drawn(plan, forward, rows)
        hidden = None if forward is None else forward.hidden
        for group in plan.prompts:
            self._show_prompts(group, hidden, rows)
        if hidden is not None:
            for hold in plan.holds:
                self.held.put(hold.sequence, hidden[hold.start : hold.stop])
        return rows

    def _show_drawn(self, plan: StepPlan, forward: Forward, rows: StepRows) -> None:
        logits, hidden, token_ids = forward.logits, forward.drawn_hidden, forward.token_ids
        assert logits is not None and hidden is not None and token_ids is not None  # noqa: S101, PT018 - something was drawn
        for spec_group in plan.logits:
            source = logits if spec_group.spec.stage == "raw" else forward.processed
            assert source is not None, "a row shows its processed scores"  # noqa: S101 - the sampler's promise
            block = take_columns(self._pick(source, spec_group.rows), spec_group.spec, self._kernels)
            fetched = block.fetch(self._device)
            rows.logits.update({row: (fetched, place) for place, row in enumerate(spec_group.rows)})
        for top_group in plan.logprobs:
            # A row that could draw nothing has a code below 0; its logprob is never reported.
            drawn = self._pick(token_ids, top_group.rows).long().clamp(min=0)
            picked = self._pick(logits, top_group.rows)
            scored = compute_logprobs(picked, drawn, top_group.spec, self._kernels).fetch(self._device)
            rows.logprobs.update({row: (scored, place) for place, row in enumerate(top_group.rows)})
        for states_group in plan.hidden_states:
            states = self._hidden_states(states_group.spec, self._pick(hidden, states_group.rows))
            rows.hidden_states.update({row: (states, place) for place, row in enumerate(states_group.rows)})

    def _pick(self, source: Tensor, rows: list[int]) -> Tensor:
        """Return ``source[rows]``, without a copy if the rows are consecutive."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return source[rows[0] : rows[-1] + 1]
        return source[self._device.upload({"rows": np.array(rows, dtype=np.int64)})["rows"]]

    def _show_prompts(self, group: PromptGroup, hidden: Tensor | None, rows: StepRows) -> None:
        states = [self._states(member, hidden) for member in group.members]
        joined = states[0] if len(states) == 1 else torch.cat(states)
        outputs = group.outputs
        logits, logprobs = self._through_head(group, joined)
        hidden_states = None
        if outputs.hidden_states is not None:
            hidden_states = self._hidden_states(outputs.hidden_states, joined)
        start = 0
        for member, own in zip(group.members, states, strict=True):
            stop = start + len(member.rows)
            rows.prompts[member.sequence] = PromptPart(
                offset=member.rows.start,
                start=start,
                stop=stop,
                num_scored=len(member.rows) - member.ends_prompt,
                logits=logits,
                logprobs=logprobs,
                hidden_states=hidden_states,
                values=self._values(outputs, member, own),
                pooled=self._pool(outputs, member, own),
            )
            start = stop

    def _states(self, member: PromptRows, hidden: Tensor | None) -> Tensor:
        """Return the hidden states of a member's rows: first the held ones, then those of this step's batch."""
        count = len(member.rows) - member.num_held
        parts = [self.held.take(member.sequence, member.num_held)] if member.num_held else []
        if count:
            assert hidden is not None  # noqa: S101 - states that were not held are computed in this step
            parts.append(hidden[member.batch_start : member.batch_start + count])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _through_head(
        self, group: PromptGroup, hidden: Tensor
    ) -> tuple[LogitsBlock | None, LogprobsBlock | None]:
        """Run the head on a bounded number of rows at a time, and keep only the requested outputs of each."""
        spec, top = group.outputs.logits, group.outputs.prompt_logprobs
        if spec is None and top is None:
            return None, None
        following = None
        if top is not None:
            ids = [token_id for member in group.members for token_id in member.following]
            following = self._device.upload({"following": np.array(ids, dtype=np.int64)})["following"]
        blocks: list[LogitsBlock] = []
        scored: list[LogprobsBlock] = []
        for first in range(0, len(hidden), HEAD_ROWS):
            logits = self._head(hidden[first : first + HEAD_ROWS])
            if spec is not None:
                blocks.append(take_columns(logits, spec, self._kernels))
            if top is not None and following is not None:
                scored.append(
                    compute_logprobs(logits, following[first : first + HEAD_ROWS], top, self._kernels)
                )
        return (
            join_logits(blocks).fetch(self._device) if blocks else None,
            join_logprobs(scored).fetch(self._device) if scored else None,
        )

    def _hidden_states(self, spec: HiddenStatesSpec, states: Tensor) -> Tensor:
        return self._device.fetch(states.to(TORCH_DTYPES[spec.dtype], copy=True))

    def _values(self, outputs: OutputSpec, member: PromptRows, states: Tensor) -> Tensor | None:
        """Return the value head's outputs at every row, or at the prompt's last row alone."""
        if outputs.head is None or not (outputs.head.every_position or member.ends_prompt):
            return None
        rows = states if outputs.head.every_position else states[-1:]
        return self._device.fetch(self._value_heads[outputs.head.name].apply(rows))

    def _pool(self, outputs: OutputSpec, member: PromptRows, states: Tensor) -> Tensor | None:
        """Return the pooled prompt once its last row is added."""
        if outputs.pooling is None:
            return None
        self.pooled.add(member.sequence, outputs.pooling, states)
        if not member.ends_prompt:
            return None
        return self._device.fetch(self.pooled.pop(member.sequence, outputs.pooling))
