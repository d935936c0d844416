"""Who computes what in the next step: continuous batching, chunked prefill under a token budget, preemption.

Pure logic over sequences and the block manager; it knows nothing of models or tensors.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from logitengine.config import EngineConfig
from logitengine.schedule.block_manager import BlockManager
from logitengine.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute the sequence's tokens ``start:stop``, all of which were unknown to the cache."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def draws_token(self) -> bool:
        """The chunk reaches the sequence's end, so its last row gives the next token."""
        sequence = self.sequence
        return self.stop == sequence.num_tokens and sequence.num_generated < sequence.sampling.max_tokens

    @property
    def prompt_rows(self) -> range:
        """Prompt positions of this chunk whose rows are owed."""
        sequence = self.sequence
        if not sequence.wants_prompt_rows:
            return range(0)
        return range(
            max(self.start, sequence.num_prompt_rows_sent), min(self.stop, sequence.num_prompt_tokens)
        )


class Scheduler:
    """Waiting and running sequences, both in order of arrival.

    ``throttled(sequence)`` says that its reader has not kept up: it keeps its place but computes nothing.
    ``max_chunk(sequence)`` bounds a chunk for reasons of the sequence's own (rows that must fit its window).
    """

    def __init__(
        self,
        config: EngineConfig,
        block_manager: BlockManager,
        *,
        throttled: Callable[[Sequence], bool] = lambda _: False,
        max_chunk: Callable[[Sequence], int | None] = lambda _: None,
    ) -> None:
        self._config = config
        self._blocks = block_manager
        self._throttled = throttled
        self._max_chunk = max_chunk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks."""
        sequence.finished = True
        self._blocks.publish(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._blocks.release(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, in order of arrival; empty when everybody is throttled.

        Decoding sequences come first, so that a long prompt never delays a token by more than one step's budget.
        """
        planned: dict[Sequence, int] = {}
        budget = self._config.max_num_batched_tokens
        by_phase = sorted(self.running, key=lambda sequence: not sequence.is_decoding)
        for sequence in by_phase:
            if sequence in self.running and not self._throttled(sequence):
                budget -= self._plan(sequence, budget, planned)
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self._config.max_num_seqs:
                break
            if sequence.is_answered or sequence.must_wait_for_leader or self._throttled(sequence):
                continue
            if not self._admit(sequence):
                break
            budget -= self._plan(sequence, budget, planned)
        chunks = [
            Chunk(sequence, sequence.num_computed, sequence.num_computed + count)
            for sequence, count in planned.items()
        ]
        return sorted(chunks, key=lambda chunk: chunk.sequence.arrival)

    def complete(self, chunk: Chunk) -> None:
        """Record that the chunk's keys and values are in the cache, or will be before a step that is scheduled later."""
        chunk.sequence.num_computed = chunk.stop
        self._blocks.publish(chunk.sequence)

    def _plan(self, sequence: Sequence, budget: int, planned: dict[Sequence, int]) -> int:
        limits = (budget, self._config.max_prefill_chunk, self._max_chunk(sequence))
        count = min(sequence.num_uncomputed, *(limit for limit in limits if limit is not None))
        if count <= 0:
            return 0
        freed_budget = 0
        while not self._blocks.grow(sequence, sequence.num_computed + count):
            # A reader that lags gives way first, then whoever came last. The oldest sequence can therefore always
            # go on, which is why there is no deadlock.
            victim = max(self.running, key=lambda other: (self._throttled(other), other.arrival))
            freed_budget += planned.pop(victim, 0)
            self._preempt(victim)
            if victim is sequence:
                return -freed_budget
        planned[sequence] = count
        return count - freed_budget

    def _admit(self, sequence: Sequence) -> bool:
        # Rows that are still owed must be computed again: the cache holds keys and values, not hidden states. What was
        # sent before a preemption is not owed any more.
        limit = sequence.num_prompt_rows_sent if sequence.wants_prompt_rows else sequence.num_tokens - 1
        cached = self._blocks.share_prefix(sequence, limit)
        # Room for the whole prompt, or alone: otherwise the newest prompts would preempt each other for ever.
        if self.running and self._blocks.blocks_needed(sequence, sequence.num_tokens) > self._blocks.num_free:
            self._blocks.release(sequence)
            return False
        sequence.num_computed = cached
        if not sequence.admitted_once:
            sequence.admitted_once = True
            sequence.num_cached = cached
            self.num_prefix_hit_tokens += cached
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda other: other.arrival)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._blocks.release(sequence)
        sequence.num_computed = 0
        insort(self.waiting, sequence, key=lambda other: other.arrival)
