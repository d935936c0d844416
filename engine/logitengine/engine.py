"""The engine: requests in, one step at a time, outputs out. One thread owns it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from logitengine.batch import Batch, build_batch
from logitengine.block_manager import BlockManager
from logitengine.config import EngineConfig
from logitengine.errors import EngineOverloadedError, RequestRefusedError
from logitengine.kv_cache import PagedKVCache
from logitengine.loader import LoadedModel
from logitengine.logits import join_logprobs, join_rows, logprobs, row_nbytes, select
from logitengine.messages import (
    EngineStats,
    GenerationRequest,
    LogitsRows,
    Logprobs,
    ModelInfo,
    PromptOutput,
    StepOutput,
)
from logitengine.model_runner import ModelRunner
from logitengine.sampler import Draw, Sampler
from logitengine.scheduler import Chunk, Scheduler
from logitengine.sequence import Sequence

HEAD_ROWS = 64
"""Prompt rows that go through the head at once: 64 rows of 49,152 float32 logits are 12 MiB."""


class Engine:
    """Continuous batching over one model.

    ``add`` and ``abort`` change what is queued; ``step`` computes the next batch and returns what it produced.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.info: ModelInfo = loaded.info
        self._kernels = loaded.kernels
        self._runner: ModelRunner = loaded.runner
        self._kv_cache: PagedKVCache = loaded.kv_cache
        self._blocks = BlockManager(
            loaded.info.num_blocks, config.block_size, prefix_caching=config.prefix_caching
        )
        self._scheduler = Scheduler(
            config, self._blocks, throttled=self._is_throttled, max_chunk=self._max_chunk
        )
        self._sampler = Sampler(loaded.info.eos_token_ids)
        self._unread_bytes: dict[str, int] = {}
        self._num_arrivals = 0
        self.num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    # What is queued.

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestRefusedError or EngineOverloadedError, and then nothing has changed."""
        self._check(request)
        self._unread_bytes[request.request_id] = 0
        leader: Sequence | None = None
        for index in range(request.n):
            sequence = Sequence(request, index, self._num_arrivals, leader)
            self._num_arrivals += 1
            self._scheduler.add(sequence)
            leader = leader or sequence

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request or one of its choices, and free its blocks. Unknown ones are ignored."""
        for sequence in list(self._scheduler):
            if sequence.request.request_id == request_id and index in (None, sequence.index):
                self._scheduler.remove(sequence)
                self._forget_if_done(sequence)

    def consumed(self, request_id: str, nbytes: int) -> None:
        """The reader took ``nbytes`` of the request's arrays."""
        if request_id in self._unread_bytes:
            self._unread_bytes[request_id] -= nbytes

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_used_blocks=self._blocks.num_used,
            num_steps=self.num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_prefix_hit_tokens=self._scheduler.num_prefix_hit_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
        )

    # One step.

    def step(self) -> list[StepOutput]:
        """Schedule, run, sample, and say what came of it. Empty when everyone's reader lags behind."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        batch = build_batch(chunks, self.config.block_size, self._runner.device)
        hidden = self._runner.run(batch, self._kv_cache)
        prompts = {index: self._prompt_output(batch, index, hidden) for index, _ in enumerate(chunks)}
        drawing = [index for index, chunk in enumerate(chunks) if chunk.draws_token]
        logits, draws = self._sample(batch, drawing, hidden)
        for chunk in chunks:
            self._scheduler.complete(chunk)
        outputs = [
            self._advance(chunks[index], logits[row : row + 1], draws[row], prompts.pop(index))
            for row, index in enumerate(drawing)
        ]
        outputs += [
            output for index, prompt in prompts.items() for output in self._hold(chunks[index], prompt)
        ]
        self.num_steps += 1
        self._num_prompt_tokens += sum(
            max(0, min(chunk.stop, chunk.sequence.num_prompt_tokens) - chunk.start) for chunk in chunks
        )
        self._num_generated_tokens += len(drawing)
        self._count_unread(outputs)
        return outputs

    def _sample(self, batch: Batch, drawing: list[int], hidden: Tensor) -> tuple[Tensor, list[Draw]]:
        if not drawing:
            return hidden.new_empty(0), []
        logits = self._runner.head(hidden[[batch.last_row(index) for index in drawing]])
        return logits, self._sampler.sample(logits, [batch.chunks[index].sequence for index in drawing])

    def _advance(self, chunk: Chunk, logits: Tensor, draw: Draw, prompt: PromptOutput | None) -> StepOutput:
        """Append the drawn token and report it. ``logits`` is the row [1, V] it was drawn from."""
        sequence, request = chunk.sequence, chunk.sequence.request
        if draw.token_id is None:
            self._finish(sequence)
            return StepOutput(
                request_id=request.request_id, index=sequence.index, prompt=prompt, finish_reason="error"
            )
        sequence.token_ids.append(draw.token_id)
        ended = self._sampler.ends(sequence, draw.token_id)
        reached_limit = sequence.num_generated >= sequence.sampling.max_tokens
        rows: LogitsRows | None = None
        if request.logits is not None and request.logits.wants_generated:
            shown = logits if draw.processed is None else draw.processed[None]
            rows = select(shown, request.logits, self._kernels)
        scores: Logprobs | None = None
        if request.logprobs is not None:
            scores = logprobs(logits, [draw.token_id], request.logprobs, self._kernels)
        if ended or reached_limit:
            self._finish(sequence)
        return StepOutput(
            request_id=request.request_id,
            index=sequence.index,
            num_cached_tokens=sequence.num_cached,
            token_ids=[draw.token_id],
            logits=rows,
            logprobs=scores,
            prompt=prompt,
            finish_reason="stop" if ended else "length" if reached_limit else None,
            stop_token_id=draw.token_id if ended else None,
        )

    def _hold(self, chunk: Chunk, prompt: PromptOutput | None) -> Iterator[StepOutput]:
        """Report a chunk that drew nothing: its prompt rows if there are any, and the end of a prompt-only request."""
        sequence = chunk.sequence
        complete = sequence.sampling.max_tokens == 0 and sequence.num_computed == sequence.num_prompt_tokens
        if complete:
            self._finish(sequence)
        if complete or prompt is not None:
            yield StepOutput(
                request_id=sequence.request.request_id,
                index=sequence.index,
                num_cached_tokens=sequence.num_cached,
                prompt=prompt,
                finish_reason="length" if complete else None,
            )

    def _prompt_output(self, batch: Batch, index: int, hidden: Tensor) -> PromptOutput | None:
        """The rows that this chunk owes of its prompt, through the head a bounded number at a time."""
        chunk = batch.chunks[index]
        sequence, request, positions = chunk.sequence, chunk.sequence.request, chunk.prompt_rows
        if not positions:
            return None
        rows: list[LogitsRows] = []
        scores: list[Logprobs] = []
        for first in range(positions.start, positions.stop, HEAD_ROWS):
            last = min(first + HEAD_ROWS, positions.stop)
            offset = batch.starts[index] - chunk.start
            logits = self._runner.head(hidden[offset + first : offset + last])
            if request.logits is not None and request.logits.wants_prompt:
                rows.append(select(logits, request.logits, self._kernels))
            if request.prompt_logprobs is not None:
                following = sequence.token_ids[first + 1 : min(last, sequence.num_prompt_tokens - 1) + 1]
                if following:
                    scores.append(
                        logprobs(logits[: len(following)], following, request.prompt_logprobs, self._kernels)
                    )
        sequence.num_prompt_rows_sent = positions.stop
        return PromptOutput(
            offset=positions.start,
            logits=join_rows(rows) if rows else None,
            logprobs=join_logprobs(scores) if scores else None,
        )

    # Bounds.

    def _check(self, request: GenerationRequest) -> None:
        prompt, sampling, spec = request.prompt_token_ids, request.sampling, request.logits
        if not prompt:
            raise RequestRefusedError("the prompt has no tokens")
        if len(prompt) + sampling.max_tokens > self.info.max_model_len:
            raise RequestRefusedError(
                f"the prompt ({len(prompt)} tokens) plus max_tokens ({sampling.max_tokens}) exceeds the context "
                f"of {self.info.max_model_len} tokens"
            )
        named = (*prompt, *sampling.logit_bias, *sampling.stop_token_ids, *((spec and spec.token_ids) or ()))
        if not all(0 <= token_id < self.info.vocab_size for token_id in named):
            raise RequestRefusedError(f"a token id is outside the vocabulary of {self.info.vocab_size}")
        if request.request_id in self._unread_bytes:
            raise RequestRefusedError(f"request id {request.request_id!r} is in use")
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise EngineOverloadedError(f"{self.config.max_waiting} sequences are waiting already")

    # Backpressure: a reader that lags holds up its own request and nobody else's.

    def _is_throttled(self, sequence: Sequence) -> bool:
        return self._unread_bytes[sequence.request.request_id] >= self.config.logits_window_bytes

    def _max_chunk(self, sequence: Sequence) -> int | None:
        """Prompt rows of one step must fit a quarter of the request's window."""
        spec = sequence.logits_spec
        if not sequence.wants_prompt_rows or spec is None or not spec.wants_prompt:
            return None
        return max(1, self.config.logits_window_bytes // 4 // row_nbytes(spec, self.info.vocab_size))

    def _count_unread(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            if output.request_id in self._unread_bytes:
                self._unread_bytes[output.request_id] += output.nbytes

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._forget_if_done(sequence)

    def _forget_if_done(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        if not any(other.request.request_id == request_id for other in self._scheduler):
            self._unread_bytes.pop(request_id, None)
