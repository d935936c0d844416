"""What a step computed, cut down to what each request asked to see of it and brought to the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from logitkernels import Kernels
from torch import Tensor

from logitengine.link.messages import GenerationRequest, HiddenStatesSpec, PromptOutput, StepOutput
from logitengine.model.value_heads import ValueHead
from logitengine.run.batch import Batch
from logitengine.run.devices import Device
from logitengine.run.rows import (
    TORCH_DTYPES,
    Scores,
    Selected,
    join_scores,
    join_selected,
    row_nbytes,
    score,
    select,
    to_array,
)
from logitengine.run.runner import Computed, ModelRunner
from logitengine.schedule.scheduler import Chunk
from logitengine.schedule.sequence import Sequence

HEAD_ROWS = 64
"""Prompt rows that go through the head at once: 64 rows of 49,152 float32 logits are 12 MiB."""

K = TypeVar("K")
T = TypeVar("T")

Placed = tuple[T, int]
"""Something fetched for several rows, and which of them is meant."""


@dataclass(frozen=True, slots=True)
class _PromptShown:
    """The fetched parts of a PromptOutput."""

    offset: int
    logits: Selected | None
    scores: Scores | None
    hidden_states: Tensor | None
    values: Tensor | None
    pooled: Tensor | None

    def output(self) -> PromptOutput:
        logits, scores = self.logits, self.scores
        return PromptOutput(
            offset=self.offset,
            logits=None if logits is None else logits.rows(0, len(logits.values)),
            logprobs=None if scores is None else scores.rows(0, len(scores.logprobs)),
            hidden_states=None if self.hidden_states is None else to_array(self.hidden_states),
            values=None if self.values is None else to_array(self.values),
            pooled=None if self.pooled is None else to_array(self.pooled),
        )


@dataclass(slots=True)
class Shown:
    """What a step shows, fetched: readable once the wait of the device's next mark is over.

    ``tokens`` int32 [R]: what the step drew, -1 where a row held a NaN. The dicts are by row of that draw and, for
    prompts, by sequence.
    """

    tokens: Tensor
    logits: dict[int, Placed[Selected]] = field(default_factory=dict)
    scores: dict[int, Placed[Scores]] = field(default_factory=dict)
    hidden_states: dict[int, Placed[Tensor]] = field(default_factory=dict)
    prompts: dict[Sequence, _PromptShown] = field(default_factory=dict)

    def output(self, sequence: Sequence, row: int | None, token_id: int | None) -> StepOutput:
        """What the sequence is told: its prompt rows and, where ``row`` drew ``token_id``, that and its rows."""
        prompt = self.prompts.get(sequence)
        logits = scores = hidden_states = None
        if row is not None and token_id is not None:
            if row in self.logits:
                selected, place = self.logits[row]
                logits = selected.rows(place, place + 1)
            if row in self.scores:
                scored, place = self.scores[row]
                scores = scored.rows(place, place + 1)
            if row in self.hidden_states:
                states, place = self.hidden_states[row]
                hidden_states = to_array(states[place : place + 1])
        return StepOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            num_cached_tokens=sequence.num_cached,
            token_ids=[] if token_id is None else [token_id],
            logits=logits,
            logprobs=scores,
            hidden_states=hidden_states,
            prompt=None if prompt is None else prompt.output(),
        )


class Reporter:
    """Launches what the requests of a step asked to see, and fetches it.

    Rows that are asked for alike are computed and fetched together, whoever asked.
    """

    def __init__(
        self, runner: ModelRunner, kernels: Kernels, heads: dict[str, ValueHead], device: Device
    ) -> None:
        self._runner = runner
        self._kernels = kernels
        self._heads = heads
        self._device = device

    def prompt_row_nbytes(self, request: GenerationRequest, vocab_size: int, hidden_size: int) -> int:
        """Bytes of arrays that each prompt row of the request makes; 0 if none travel."""
        total = 0
        if request.logits is not None and request.logits.wants_prompt:
            total += row_nbytes(request.logits, vocab_size)
        if request.hidden_states is not None and request.hidden_states.wants_prompt:
            total += hidden_size * TORCH_DTYPES[request.hidden_states.dtype].itemsize
        return total

    @torch.inference_mode()
    def show(self, batch: Batch, computed: Computed) -> Shown:
        """Launch and fetch what the batch's requests asked to see. Marks prompt rows as sent."""
        shown = Shown(self._device.fetch(computed.token_ids))
        requests = [chunk.sequence.request for chunk in batch.drawing]
        self._show_logits(shown, requests, computed)
        self._show_scores(shown, requests, computed)
        self._show_hidden_states(shown, requests, computed)
        for chunk, hidden in batch.split(computed.hidden):
            prompt = self._prompt(chunk, hidden)
            if prompt is not None:
                shown.prompts[chunk.sequence] = prompt
        return shown

    # Rows of drawn tokens.

    def _show_logits(self, shown: Shown, requests: list[GenerationRequest], computed: Computed) -> None:
        specs = [request.logits for request in requests]
        wanted = ((row, spec) for row, spec in enumerate(specs) if spec is not None and spec.wants_generated)
        for spec, rows in _grouped(wanted):
            source = computed.logits if spec.stage == "raw" else computed.processed
            assert source is not None, "a row shows its processed scores"  # noqa: S101 - the sampler's promise
            selected = select(self._rows(source, rows), spec, self._kernels).fetch(self._device)
            shown.logits.update({row: (selected, place) for place, row in enumerate(rows)})

    def _show_scores(self, shown: Shown, requests: list[GenerationRequest], computed: Computed) -> None:
        wanted = (
            (row, request.logprobs) for row, request in enumerate(requests) if request.logprobs is not None
        )
        for top, rows in _grouped(wanted):
            # A row without a distribution (-1) is scored as token 0 and never reported.
            token_ids = self._rows(computed.token_ids, rows).long().clamp(min=0)
            logits = self._rows(computed.logits, rows)
            scores = score(logits, token_ids, top, self._kernels).fetch(self._device)
            shown.scores.update({row: (scores, place) for place, row in enumerate(rows)})

    def _show_hidden_states(
        self, shown: Shown, requests: list[GenerationRequest], computed: Computed
    ) -> None:
        specs = [request.hidden_states for request in requests]
        wanted = ((row, spec) for row, spec in enumerate(specs) if spec is not None and spec.wants_generated)
        for spec, rows in _grouped(wanted):
            states = self._hidden(spec, self._rows(computed.drawn_hidden, rows))
            shown.hidden_states.update({row: (states, place) for place, row in enumerate(rows)})

    def _rows(self, source: Tensor, rows: list[int]) -> Tensor:
        """``source[rows]``, without a copy where the rows follow one another."""
        if rows[-1] - rows[0] + 1 == len(rows):
            return source[rows[0] : rows[-1] + 1]
        return source[self._device.upload({"rows": np.array(rows, dtype=np.int64)})["rows"]]

    # Rows of prompts.

    def _prompt(self, chunk: Chunk, hidden: Tensor) -> _PromptShown | None:
        """What the chunk owes of its prompt. ``hidden`` is [chunk's tokens, H]."""
        sequence, request = chunk.sequence, chunk.sequence.request
        positions = chunk.prompt_rows
        ends_prompt = sequence.index == 0 and chunk.start < sequence.num_prompt_tokens <= chunk.stop
        owes_last = (
            ends_prompt
            and not sequence.num_generated
            and (request.head is not None or request.pooling is not None)
        )
        if not positions and not owes_last:
            return None
        rows = (
            hidden[positions.start - chunk.start : positions.stop - chunk.start] if positions else hidden[:0]
        )
        last = hidden[sequence.num_prompt_tokens - 1 - chunk.start] if ends_prompt else None
        logits, scores = self._prompt_logits(sequence, positions, rows)
        spec = request.hidden_states
        shown = _PromptShown(
            offset=positions.start if positions else sequence.num_prompt_tokens - 1,
            logits=logits,
            scores=scores,
            hidden_states=self._hidden(spec, rows) if spec is not None and spec.wants_prompt else None,
            values=self._values(request, rows, last),
            pooled=self._pooled(sequence, rows, last),
        )
        if positions:
            sequence.num_prompt_rows_sent = positions.stop
        return shown

    def _prompt_logits(
        self, sequence: Sequence, positions: range, hidden: Tensor
    ) -> tuple[Selected | None, Scores | None]:
        """Through the head a bounded number of rows at a time, and only what was asked for is kept of each."""
        request = sequence.request
        spec = request.logits if request.logits is not None and request.logits.wants_prompt else None
        if spec is None and request.prompt_logprobs is None:
            return None, None
        selected: list[Selected] = []
        scores: list[Scores] = []
        for first in range(positions.start, positions.stop, HEAD_ROWS):
            last = min(first + HEAD_ROWS, positions.stop)
            logits = self._runner.head(hidden[first - positions.start : last - positions.start])
            if spec is not None:
                selected.append(select(logits, spec, self._kernels))
            following = np.array(request.prompt_token_ids[first + 1 : last + 1], dtype=np.int64)
            if request.prompt_logprobs is not None and len(following):
                token_ids = self._device.upload({"following": following})["following"]
                scores.append(
                    score(logits[: len(following)], token_ids, request.prompt_logprobs, self._kernels)
                )
        return (
            join_selected(selected).fetch(self._device) if selected else None,
            join_scores(scores).fetch(self._device) if scores else None,
        )

    # Hidden states and what is made of them.

    def _hidden(self, spec: HiddenStatesSpec, rows: Tensor) -> Tensor:
        return self._device.fetch(rows.to(TORCH_DTYPES[spec.dtype], copy=True))

    def _values(self, request: GenerationRequest, rows: Tensor, last: Tensor | None) -> Tensor | None:
        if request.head is None:
            return None
        if request.head.every_position:
            return self._device.fetch(self._heads[request.head.name].apply(rows))
        return None if last is None else self._device.fetch(self._heads[request.head.name].apply(last[None]))

    def _pooled(self, sequence: Sequence, rows: Tensor, last: Tensor | None) -> Tensor | None:
        """The mean grows in float64, one row after the other, so that its bits do not depend on the chunking."""
        request = sequence.request
        if request.pooling == "last":
            return None if last is None else self._device.fetch(last.to(torch.float32, copy=True))
        if request.pooling == "cls" and not sequence.num_prompt_rows_sent:
            sequence.pooled = rows[0].clone()
        elif request.pooling == "mean":
            carried = (
                rows.new_zeros(1, rows.shape[1], dtype=torch.float64)
                if sequence.pooled is None
                else sequence.pooled[None]
            )
            sequence.pooled = torch.cat((carried, rows.double())).cumsum(0)[-1]
        if request.pooling is None or last is None or sequence.pooled is None:
            return None
        count = sequence.num_prompt_tokens if request.pooling == "mean" else 1
        return self._device.fetch((sequence.pooled / count).float())


def _grouped(wanted: Iterable[tuple[int, K]]) -> Iterable[tuple[K, list[int]]]:
    """Rows by what is asked of them."""
    groups: dict[K, list[int]] = {}
    for row, key in wanted:
        groups.setdefault(key, []).append(row)
    return groups.items()
