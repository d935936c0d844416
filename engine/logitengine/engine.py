"""The engine takes requests, computes one step at a time and returns outputs. One thread owns it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from logitkernels.sampling import NOTHING_ALLOWED
from msgspec.structs import replace

from logitengine.config import EngineConfig
from logitengine.errors import EngineOverloadedError, RequestRefusedError
from logitengine.grammar.grammars import Grammars
from logitengine.grammar.parse_state import ParseState
from logitengine.grammar.vocabulary import GrammarError, Vocabulary
from logitengine.link.messages import (
    STEP_SECONDS,
    DrawError,
    EngineStats,
    GenerationRequest,
    ModelInfo,
    PromptItem,
    StepOutput,
)
from logitengine.link.row_bytes import prompt_row_nbytes
from logitengine.model.loader import LoadedModel
from logitengine.run.plan import StepPlan, plan_step
from logitengine.run.sampler import Sampler
from logitengine.run.step_rows import StepRows
from logitengine.schedule.block_manager import BlockManager
from logitengine.schedule.encoder_queue import EncoderQueue
from logitengine.schedule.prompt_items import check_items, output_nbytes_per_token
from logitengine.schedule.scheduler import Chunk, Scheduler
from logitengine.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Step:
    """A launched step. After ``wait`` returns, ``rows`` may be read and tokens learnt at ``positions``."""

    plan: StepPlan
    positions: list[int]
    rows: StepRows
    wait: Callable[[], None]
    begun_at: float


@dataclass(slots=True)
class _Request:
    """A request's unfinished choices, and the bytes that its reader has not taken yet of those that its window allows."""

    sequences: list[Sequence]
    window_bytes: int
    unread_bytes: int = 0

    @property
    def is_window_full(self) -> bool:
        return self.unread_bytes >= self.window_bytes


class Engine:
    """Continuous batching over one model.

    ``add`` and ``abort`` change the queue; ``step`` computes the next batch and returns its outputs.

    Args:
        wake: called on a thread when a step may have work after one that had none.
    """

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel, wake: Callable[[], None] = lambda: None
    ) -> None:
        self.config = config
        self.info: ModelInfo = loaded.info
        self._runner = loaded.runner
        self._device = loaded.device
        self._blocks = BlockManager(
            loaded.info.num_blocks, config.block_size, prefix_caching=config.prefix_caching
        )
        self._encoder_queue = _encoder_queue(config, loaded.info)
        self._scheduler = Scheduler(config, self._blocks, encoder_queue=self._encoder_queue)
        self._sampler = Sampler(loaded.info.eos_token_ids)
        info = loaded.info
        self._vocabulary = Vocabulary(info.tokenizer_path, info.vocab_size, info.eos_token_ids)
        self._grammars = Grammars(self._vocabulary, wake)
        self._awaiting: set[Sequence] = set()
        self._under_way: _Step | None = None
        self._requests: dict[str, _Request] = {}
        self._num_arrivals = 0
        self.num_steps = 0
        self._step_seconds = 0.0
        self._step_counts = [0] * (len(STEP_SECONDS) + 1)
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises RequestRefusedError or EngineOverloadedError; nothing has changed then."""
        self._check(request)
        grammars = self._parse_states(request)
        info = self.info
        row_nbytes = prompt_row_nbytes(request.outputs, info.vocab_size, info.hidden_size, info.heads)
        sequences: list[Sequence] = []
        for index in range(request.n):
            leader = sequences[0] if sequences else None
            sequences.append(
                Sequence.of(
                    request,
                    index,
                    self._num_arrivals,
                    leader=leader,
                    row_nbytes=row_nbytes,
                    joins_items=info.encoder is not None and info.encoder.joins_tokens,
                    grammar=grammars[index],
                )
            )
            if grammars[index] is not None:
                self._awaiting.add(sequences[-1])
            self._num_arrivals += 1
            self._scheduler.add(sequences[-1])
        window = self.config.logits_window_bytes
        self._requests[request.request_id] = _Request(sequences, min(window, request.window_bytes or window))

    def prepare_grammars(self) -> str | None:
        """Make what the first request with a grammar would wait for. Returns why this model has no grammars, if so."""
        try:
            _ = self._vocabulary.tokenizer
        except GrammarError as error:
            return str(error)
        return None

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Forget a request or one of its choices, and free its blocks. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        for sequence in list(request.sequences) if request is not None else ():
            if index in (None, sequence.index):
                self._remove(sequence)

    def consumed(self, request_id: str, nbytes: int) -> None:
        """Record that the reader took ``nbytes`` of the request's outputs."""
        request = self._requests.get(request_id)
        if request is None:
            return
        request.unread_bytes -= nbytes
        if not request.is_window_full:
            for sequence in request.sequences:
                self._scheduler.resume(sequence)

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self.is_computing

    @property
    def is_computing(self) -> bool:
        """True while a launched step is not reported yet."""
        return self._under_way is not None

    @property
    def begun_request_ids(self) -> set[str]:
        """Ids of requests for which something was computed or is being computed. The others have only waited."""
        return {
            request_id
            for request_id, request in self._requests.items()
            if any(sequence.has_begun for sequence in request.sequences)
        }

    @property
    def num_blocks_reached(self) -> int:
        """Number of the first cache block that was never used; no later block was used either."""
        return self._blocks.num_reached

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_parked=len(self._scheduler.parked),
            num_used_blocks=self._blocks.num_used,
            num_steps=self.num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_prefix_hit_tokens=self._scheduler.num_prefix_hit_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_query_tokens=self._scheduler.num_prefix_query_tokens,
            step_seconds=self._step_seconds,
            step_counts=tuple(self._step_counts),
        )

    def step(self) -> list[StepOutput]:
        """Schedule, plan, execute and report one step. Returns an empty list when every reader is parked.

        On a device that overlaps, the outputs are those of the step before the one launched here.
        """
        begun_at = time.monotonic()
        outputs = self._settle_grammars()
        launched = self._launch(begun_at, outputs)
        if self._device.overlaps:
            launched, self._under_way = self._under_way, launched
        if launched is None:
            return outputs
        reported = self._report(launched)
        self._count(launched.plan.chunks, reported, time.monotonic() - begun_at)
        return outputs + reported

    def _launch(self, begun_at: float, outputs: list[StepOutput]) -> _Step | None:
        """Launch the next step on the device. Sequences continue from tokens that only the device knows yet.

        Sequences whose image the encoder fails on end in ``outputs``.
        """
        chunks = self._scheduler.schedule()
        dropped = self._scheduler.dropped
        queue = self._encoder_queue
        encoding = None if queue is None else queue.next_item(self._scheduler.running)
        if not chunks and not dropped and encoding is None:
            return None
        plan = plan_step(
            chunks,
            self.config.block_size,
            self._sampler.row,
            dropped,
            encoding=encoding,
            dropped_outputs=() if queue is None else queue.dropped,
        )
        dropped.clear()
        rows = self._runner.execute(plan)
        if queue is not None:
            queue.dropped.clear()
        if not chunks and encoding is None:
            return None
        for chunk in chunks:
            self._scheduler.complete(chunk)
        positions = [chunk.sequence.await_token(row) for row, chunk in enumerate(plan.drawing)]
        step = _Step(plan, positions, rows, self._device.mark(), begun_at)
        if queue is not None and encoding is not None:
            if rows.has_encoded:
                queue.complete(encoding)
            elif rows.encoding_error is not None:
                outputs += self._fail_readers_of(encoding, rows.encoding_error)
        return step

    def _fail_readers_of(self, item: PromptItem, error: str) -> list[StepOutput]:
        """End the sequences that wait for the output of an item which cannot be encoded."""
        readers = [
            sequence
            for sequence in self._scheduler
            if any(own.digest == item.digest for own in sequence.uncomputed_items)
        ]
        return [self._failed(sequence, "image_failed", error) for sequence in readers]

    def _failed(self, sequence: Sequence, error: DrawError, detail: str | None) -> StepOutput:
        """End a sequence that cannot go on."""
        output = StepOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            num_cached_tokens=sequence.num_cached or 0,
            finish_reason="error",
            error=error,
            error_detail=detail,
        )
        self._deliver(sequence, output)
        return output

    def _report(self, step: _Step) -> list[StepOutput]:
        """Wait for a launched step and return its outputs for the sequences that still exist."""
        step.wait()
        token_ids: list[int] = [] if step.rows.token_ids is None else step.rows.token_ids.tolist()
        drawn = {
            chunk.sequence: (row, position, token_id)
            for row, (chunk, position, token_id) in enumerate(
                zip(step.plan.drawing, step.positions, token_ids, strict=True)
            )
        }
        outputs: list[StepOutput] = []
        for chunk in step.plan.chunks:
            sequence = chunk.sequence
            if sequence.is_finished:
                continue
            draw = drawn.get(sequence)
            output = (
                self._prompt_output(chunk, step.rows)
                if draw is None
                else self._drawn_output(sequence, *draw, step.rows)
            )
            if output is not None:
                if _begins(chunk):
                    output = replace(output, begun_seconds=time.monotonic() - step.begun_at)
                outputs.append(output)
                self._deliver(sequence, output)
        return outputs + self._make_masks(drawn)

    def _drawn_output(
        self, sequence: Sequence, row: int, position: int, token_id: int, rows: StepRows
    ) -> StepOutput:
        """Learn the token drawn for ``position`` and report it with the rows that it was drawn from."""
        if token_id < 0:
            error = "nothing_allowed" if token_id == NOTHING_ALLOWED else "not_finite"
            return replace(rows.prompt_output(sequence), finish_reason="error", error=error)
        output = rows.drawn_output(sequence, row, token_id)
        sequence.learn(position, token_id)
        if self._sampler.ends(sequence, token_id):
            return replace(output, finish_reason="stop", stop_token_id=token_id)
        if position + 1 - sequence.num_prompt_tokens >= sequence.sampling.max_tokens:
            return replace(output, finish_reason="length")
        return output

    def _make_masks(self, sequences: Iterable[Sequence]) -> list[StepOutput]:
        """Make the masks of the next tokens. On a device that overlaps, the next step of the others is under way."""
        advanced = [
            (sequence, sequence.grammar)
            for sequence in sequences
            if sequence.grammar is not None and not sequence.is_finished
        ]
        if not advanced:
            return []
        for sequence, grammar in advanced:
            grammar.learn(sequence.token_ids[sequence.num_known - 1])
        self._grammars.make_masks(grammar for _, grammar in advanced)
        self._awaiting.update(sequence for sequence, _ in advanced)
        return self._settle_grammars()

    def _settle_grammars(self) -> list[StepOutput]:
        """Fail the sequences whose grammar cannot be followed any further. Those whose threads still work are left."""
        outputs: list[StepOutput] = []
        for sequence in list(self._awaiting):
            grammar = sequence.grammar
            if sequence.is_finished or grammar is None:
                self._awaiting.remove(sequence)
                continue
            if not grammar.is_settled:
                continue
            self._awaiting.remove(sequence)
            if grammar.mask is not None:
                continue
            outputs.append(self._failed(sequence, "grammar_failed", grammar.error))
        return outputs

    def _parse_states(self, request: GenerationRequest) -> list[ParseState | None]:
        """Return a state for each choice. A request for no tokens has none. Raises RequestRefusedError."""
        if request.grammar is None or request.sampling.max_tokens == 0:
            return [None] * request.n
        try:
            return [self._grammars.state(request.grammar) for _ in range(request.n)]
        except GrammarError as error:
            raise RequestRefusedError(str(error)) from error

    def _prompt_output(self, chunk: Chunk, rows: StepRows) -> StepOutput | None:
        """Report a chunk without a draw: prompt rows, a prompt-only request's end, a request's beginning."""
        sequence = chunk.sequence
        is_complete = sequence.sampling.max_tokens == 0 and chunk.is_prompt_done
        if not (is_complete or _begins(chunk) or sequence in rows.prompts):
            return None
        output = rows.prompt_output(sequence)
        return replace(output, finish_reason="length") if is_complete else output

    def _deliver(self, sequence: Sequence, output: StepOutput) -> None:
        """Count the bytes that the reader has to take, and park the request where they exceed its window."""
        request = self._requests[sequence.request_id]
        if output.finish_reason is not None:
            self._remove(sequence)
        request.unread_bytes += output.nbytes
        if request.is_window_full:
            for other in request.sequences:
                self._scheduler.park(other)

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        request = self._requests[sequence.request_id]
        request.sequences.remove(sequence)
        if sequence.grammar is not None:
            self._grammars.release(sequence.grammar)
        if not request.sequences:
            del self._requests[sequence.request_id]

    def _count(self, chunks: list[Chunk], outputs: list[StepOutput], seconds: float) -> None:
        self.num_steps += 1
        self._step_seconds += seconds
        self._step_counts[bisect_left(STEP_SECONDS, seconds)] += 1
        for chunk in chunks:
            prompt_stop = min(chunk.stop, chunk.sequence.num_prompt_tokens)
            self._num_prompt_tokens += max(0, prompt_stop - chunk.start)
        self._num_generated_tokens += sum(len(output.token_ids) for output in outputs)

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
        check_items(request, self.info, self.config.image_cache_bytes)
        if request.head is not None and request.head.name not in self.info.heads:
            raise RequestRefusedError(f"there is no head called {request.head.name!r}")
        needs_logits = sampling.max_tokens > 0 or spec is not None or request.prompt_logprobs is not None
        if needs_logits and not self.info.can_generate:
            raise RequestRefusedError(
                f"{self.info.architecture} has no language-model head: no tokens, no logits"
            )
        if request.request_id in self._requests:
            raise RequestRefusedError(f"request id {request.request_id!r} is in use")
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise EngineOverloadedError(
                f"{self.config.max_waiting} sequences are waiting already (--max-waiting)"
            )


def _encoder_queue(config: EngineConfig, info: ModelInfo) -> EncoderQueue | None:
    if info.encoder is None:
        return None
    return EncoderQueue(config.image_cache_bytes, output_nbytes_per_token(info))


def _begins(chunk: Chunk) -> bool:
    """Return whether the chunk is the first of its request."""
    return chunk.sequence.index == 0 and chunk.start == chunk.sequence.num_cached
