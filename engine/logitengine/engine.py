"""The engine: requests in, one step at a time, outputs out. One thread owns it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from logitengine.config import EngineConfig
from logitengine.errors import EngineOverloadedError, RequestRefusedError
from logitengine.link.messages import EngineStats, GenerationRequest, ModelInfo, StepOutput
from logitengine.model.loader import LoadedModel
from logitengine.run.batch import Batch, build_batch
from logitengine.run.reporter import Reporter, Shown
from logitengine.run.runner import ModelRunner
from logitengine.run.sampler import Sampler
from logitengine.schedule.block_manager import BlockManager
from logitengine.schedule.scheduler import Chunk, Scheduler
from logitengine.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was launched: the tokens that ``positions`` await and what was asked of it come when ``wait`` is over."""

    batch: Batch
    positions: list[int]
    shown: Shown
    wait: Callable[[], None]


class Engine:
    """Continuous batching over one model.

    ``add`` and ``abort`` change what is queued; ``step`` computes the next batch and returns what it produced.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        self.config = config
        self.info: ModelInfo = loaded.info
        self._runner: ModelRunner = loaded.runner
        self._device = loaded.device
        self._reporter = Reporter(loaded.runner, loaded.kernels, loaded.heads, loaded.device)
        self._blocks = BlockManager(
            loaded.info.num_blocks, config.block_size, prefix_caching=config.prefix_caching
        )
        self._scheduler = Scheduler(
            config, self._blocks, throttled=self._is_throttled, max_chunk=self._max_chunk
        )
        self._sampler = Sampler(loaded.info.eos_token_ids)
        self._under_way: _Step | None = None
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
        return self._scheduler.has_work or self.is_computing

    @property
    def is_computing(self) -> bool:
        """A step was launched and has not been reported."""
        return self._under_way is not None

    @property
    def num_blocks_reached(self) -> int:
        """The cache's blocks from this one on were never used."""
        return self._blocks.num_reached

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
        """Schedule, run, sample, and say what came of it. Empty when everyone's reader lags behind.

        On a device that overlaps, what is reported is the step before the one that is launched here.
        """
        launched = self._launch()
        if self._device.overlaps:
            launched, self._under_way = self._under_way, launched
        return self._report(launched) if launched is not None else []

    def _launch(self) -> _Step | None:
        """Put the next step on the device. Sequences go on from tokens that only the device knows yet."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return None
        batch = build_batch(chunks, self.config.block_size)
        computed = self._runner.execute(batch, [self._sampler.row(chunk.sequence) for chunk in batch.drawing])
        shown = self._reporter.show(batch, computed)
        for chunk in chunks:
            self._scheduler.complete(chunk)
        positions = [chunk.sequence.await_token(row) for row, chunk in enumerate(batch.drawing)]
        return _Step(batch, positions, shown, self._device.mark())

    def _report(self, step: _Step) -> list[StepOutput]:
        """Wait for a launched step and say what it did for the sequences that are still there."""
        step.wait()
        token_ids: list[int] = step.shown.tokens.tolist()
        drawn = {
            chunk.sequence: (row, position, token_id)
            for row, (chunk, position, token_id) in enumerate(
                zip(step.batch.drawing, step.positions, token_ids, strict=True)
            )
        }
        outputs: list[StepOutput] = []
        for chunk in step.batch.chunks:
            if chunk.sequence.finished:
                continue
            if chunk.sequence in drawn:
                outputs.append(self._advance(chunk.sequence, *drawn[chunk.sequence], step.shown))
            else:
                outputs += self._hold(chunk, step.shown)
        self._count(step.batch.chunks, outputs)
        return outputs

    def _advance(
        self, sequence: Sequence, row: int, position: int, token_id: int, shown: Shown
    ) -> StepOutput:
        """Learn the token that was drawn for ``position`` and report it with the rows that it came from."""
        if token_id < 0:
            self._finish(sequence)
            return replace(shown.output(sequence, None, None), finish_reason="error")
        output = shown.output(sequence, row, token_id)
        sequence.learn(position, token_id)
        if self._sampler.ends(sequence, token_id):
            self._finish(sequence)
            return replace(output, finish_reason="stop", stop_token_id=token_id)
        if position + 1 - sequence.num_prompt_tokens >= sequence.sampling.max_tokens:
            self._finish(sequence)
            return replace(output, finish_reason="length")
        return output

    def _hold(self, chunk: Chunk, shown: Shown) -> Iterator[StepOutput]:
        """Report a chunk that drew nothing: its prompt rows if there are any, and the end of a prompt-only request."""
        sequence = chunk.sequence
        complete = sequence.sampling.max_tokens == 0 and chunk.stop == sequence.num_prompt_tokens
        if complete:
            self._finish(sequence)
        output = shown.output(sequence, None, None)
        if complete or output.prompt is not None:
            yield replace(output, finish_reason="length" if complete else None)

    def _count(self, chunks: list[Chunk], outputs: list[StepOutput]) -> None:
        self.num_steps += 1
        self._num_prompt_tokens += sum(
            max(0, min(chunk.stop, chunk.sequence.num_prompt_tokens) - chunk.start) for chunk in chunks
        )
        for output in outputs:
            self._num_generated_tokens += len(output.token_ids)
            if output.request_id in self._unread_bytes:
                self._unread_bytes[output.request_id] += output.nbytes

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
        if request.head is not None and request.head.name not in self.info.heads:
            raise RequestRefusedError(f"there is no head called {request.head.name!r}")
        needs_logits = sampling.max_tokens > 0 or spec is not None or request.prompt_logprobs is not None
        if needs_logits and not self.info.can_generate:
            raise RequestRefusedError(
                f"{self.info.architecture} has no language-model head: no tokens, no logits"
            )
        if request.request_id in self._unread_bytes:
            raise RequestRefusedError(f"request id {request.request_id!r} is in use")
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise EngineOverloadedError(f"{self.config.max_waiting} sequences are waiting already")

    # Backpressure: a reader that lags holds up its own request and nobody else's.

    def _is_throttled(self, sequence: Sequence) -> bool:
        return self._unread_bytes[sequence.request.request_id] >= self.config.logits_window_bytes

    def _max_chunk(self, sequence: Sequence) -> int | None:
        """Prompt rows of one step must fit a quarter of the request's window."""
        if not sequence.wants_prompt_rows:
            return None
        nbytes = self._reporter.prompt_row_nbytes(
            sequence.request, self.info.vocab_size, self.info.hidden_size
        )
        return max(1, self.config.logits_window_bytes // 4 // nbytes) if nbytes else None

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._forget_if_done(sequence)

    def _forget_if_done(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        if not any(other.request.request_id == request_id for other in self._scheduler):
            self._unread_bytes.pop(request_id, None)
