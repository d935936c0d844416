"""What a step computed, cut down to what each request asked to see of it."""

from __future__ import annotations

import torch
from logitkernels import Kernels
from torch import Tensor

from logitengine.logits import (
    TORCH_DTYPES,
    join_logprobs,
    join_rows,
    logprobs,
    row_nbytes,
    select,
    to_array,
)
from logitengine.messages import (
    Array,
    GenerationRequest,
    HiddenStatesSpec,
    LogitsRows,
    Logprobs,
    PromptOutput,
    StepOutput,
)
from logitengine.model_runner import ModelRunner
from logitengine.sampler import Draw
from logitengine.scheduler import Chunk
from logitengine.sequence import Sequence
from logitengine.value_heads import ValueHead

HEAD_ROWS = 64
"""Prompt rows that go through the head at once: 64 rows of 49,152 float32 logits are 12 MiB."""


class Reporter:
    """Turns hidden states and logits into the fields of a StepOutput."""

    def __init__(self, runner: ModelRunner, kernels: Kernels, heads: dict[str, ValueHead]) -> None:
        self._runner = runner
        self._kernels = kernels
        self._heads = heads

    def prompt_row_nbytes(self, request: GenerationRequest, vocab_size: int, hidden_size: int) -> int:
        """Bytes of arrays that each prompt row of the request makes; 0 if none travel."""
        total = 0
        if request.logits is not None and request.logits.wants_prompt:
            total += row_nbytes(request.logits, vocab_size)
        if request.hidden_states is not None and request.hidden_states.wants_prompt:
            total += hidden_size * TORCH_DTYPES[request.hidden_states.dtype].itemsize
        return total

    def prompt_output(self, chunk: Chunk, hidden: Tensor) -> PromptOutput | None:
        """What the chunk owes of its prompt. ``hidden`` is [chunk's tokens, H]. Marks the rows as sent."""
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
        output = PromptOutput(
            offset=positions.start if positions else sequence.num_prompt_tokens - 1,
            logits=logits,
            logprobs=scores,
            hidden_states=self._hidden(spec, rows) if spec is not None and spec.wants_prompt else None,
            values=self._values(request, rows, last),
            pooled=self._pooled(sequence, rows, last),
        )
        if positions:
            sequence.num_prompt_rows_sent = positions.stop
        return output

    def generated_output(
        self, sequence: Sequence, draw: Draw, logits: Tensor, hidden: Tensor, prompt: PromptOutput | None
    ) -> StepOutput:
        """One drawn token and its rows: ``logits`` [1, V] and ``hidden`` [1, H] are what it was drawn from."""
        request = sequence.request
        if draw.token_id is None:
            return StepOutput(
                request_id=request.request_id, index=sequence.index, prompt=prompt, finish_reason="error"
            )
        rows: LogitsRows | None = None
        if request.logits is not None and request.logits.wants_generated:
            rows = select(
                logits if draw.processed is None else draw.processed[None], request.logits, self._kernels
            )
        scores: Logprobs | None = None
        if request.logprobs is not None:
            scores = logprobs(logits, [draw.token_id], request.logprobs, self._kernels)
        spec = request.hidden_states
        return StepOutput(
            request_id=request.request_id,
            index=sequence.index,
            num_cached_tokens=sequence.num_cached,
            token_ids=[draw.token_id],
            logits=rows,
            logprobs=scores,
            hidden_states=self._hidden(spec, hidden) if spec is not None and spec.wants_generated else None,
            prompt=prompt,
        )

    def _prompt_logits(
        self, sequence: Sequence, positions: range, hidden: Tensor
    ) -> tuple[LogitsRows | None, Logprobs | None]:
        """Through the head a bounded number of rows at a time, and only what was asked for is kept of each."""
        request = sequence.request
        spec = request.logits if request.logits is not None and request.logits.wants_prompt else None
        if spec is None and request.prompt_logprobs is None:
            return None, None
        rows: list[LogitsRows] = []
        scores: list[Logprobs] = []
        for first in range(positions.start, positions.stop, HEAD_ROWS):
            last = min(first + HEAD_ROWS, positions.stop)
            logits = self._runner.head(hidden[first - positions.start : last - positions.start])
            if spec is not None:
                rows.append(select(logits, spec, self._kernels))
            following = sequence.request.prompt_token_ids[first + 1 : last + 1]
            if request.prompt_logprobs is not None and following:
                scores.append(
                    logprobs(logits[: len(following)], following, request.prompt_logprobs, self._kernels)
                )
        return join_rows(rows) if rows else None, join_logprobs(scores) if scores else None

    def _hidden(self, spec: HiddenStatesSpec, rows: Tensor) -> Array:
        return to_array(rows.to(TORCH_DTYPES[spec.dtype], copy=True))

    def _values(self, request: GenerationRequest, rows: Tensor, last: Tensor | None) -> Array | None:
        if request.head is None:
            return None
        if request.head.every_position:
            return to_array(self._heads[request.head.name].apply(rows))
        return None if last is None else to_array(self._heads[request.head.name].apply(last[None]))

    @torch.inference_mode()
    def _pooled(self, sequence: Sequence, rows: Tensor, last: Tensor | None) -> Array | None:
        """The mean grows in float64, one row after the other, so that its bits do not depend on the chunking."""
        request = sequence.request
        if request.pooling == "last":
            return None if last is None else to_array(last.float())
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
        return to_array((sequence.pooled / count).float())
