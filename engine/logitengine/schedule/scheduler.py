"""Scheduling of the next step: continuous batching, chunked prefill under a token budget, preemption.

Pure logic over sequences and the block manager; it knows nothing of models or tensors.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from logitengine.config import EngineConfig
from logitengine.schedule.block_manager import BlockManager
from logitengine.schedule.encoder_queue import EncoderQueue
from logitengine.schedule.sequence import Sequence, SequenceState

LAGGING_SECONDS = 1.0
"""Time for which a parked sequence keeps its held states although others need the room: recomputing takes as long."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence's part of a step: tokens ``start:stop`` to compute, and prompt positions ``rows`` whose rows
    are given.

    Either may be empty. ``rows`` begins at the first position that is owed and never extends beyond ``stop``.
    Hidden states of its positions before ``start`` were held; those from its end to ``stop`` are to be held.
    """

    sequence: Sequence
    start: int
    stop: int
    rows: range

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def draws_token(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that its last hidden state gives the next token."""
        sequence = self.sequence
        return (
            self.start < self.stop == sequence.num_tokens
            and sequence.num_generated < sequence.sampling.max_tokens
        )

    @property
    def is_prompt_done(self) -> bool:
        """Whether after the step the whole prompt is computed and no row of it is owed."""
        return self.stop >= self.sequence.num_prompt_tokens == self.rows.stop

    @property
    def num_held(self) -> int:
        """Number of prompt positions whose hidden states are held after the step."""
        return max(0, min(self.stop, self.sequence.num_prompt_tokens) - self.rows.stop)


@dataclass(slots=True)
class _Draft:
    """The step under construction, and what is left of its bounds."""

    tokens_left: int
    rows_left: int
    row_bytes_left: int
    chunks: dict[Sequence, Chunk] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.sequence] = chunk
        self._take(chunk, 1)

    def discard(self, sequence: Sequence) -> None:
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            self._take(chunk, -1)

    def _take(self, chunk: Chunk, sign: int) -> None:
        self.tokens_left -= sign * chunk.num_tokens
        self.rows_left -= sign * len(chunk.rows)
        self.row_bytes_left -= sign * len(chunk.rows) * chunk.sequence.row_nbytes


class Scheduler:
    """Puts sequences into steps, oldest first.

    A step computes at most ``max_num_batched_tokens`` tokens, gives at most as many prompt rows, and leaves at most as
    many hidden states held for rows that are owed. The prompt rows of a step take at most ``logits_window_bytes``, those
    of one sequence a quarter of its window; a single row may always be given.

    Args:
        clock: seconds, monotonic.
        encoder_queue: which items of prompts are encoded; None for a model that reads none.

    Attributes:
        waiting, running, parked: the sequences in each state, by arrival.
        dropped: sequences whose held hidden states are no longer needed; the holder of the states clears this
            list.
    """

    def __init__(
        self,
        config: EngineConfig,
        block_manager: BlockManager,
        clock: Callable[[], float] = time.monotonic,
        *,
        encoder_queue: EncoderQueue | None = None,
    ) -> None:
        self._config = config
        self._blocks = block_manager
        self._encoder_queue = encoder_queue
        self._clock = clock
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.parked: list[Sequence] = []
        self.dropped: list[Sequence] = []
        self._refused: tuple[Sequence, int] | None = None
        """The sequence that found no room, with the length of its cached prefix; None once there may be room for it."""
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting
        yield from self.parked

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.parked)

    def add(self, sequence: Sequence) -> None:
        self._enter(SequenceState.WAITING, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its blocks."""
        self._list_of(sequence).remove(sequence)
        sequence.state = SequenceState.FINISHED
        self._blocks.publish(sequence)
        self._release(sequence)
        self.dropped.append(sequence)

    def park(self, sequence: Sequence) -> None:
        """Park a sequence whose reader lags: it takes part in no step until it is resumed."""
        if sequence.state in (SequenceState.WAITING, SequenceState.RUNNING):
            sequence.idle_since = self._clock()
            self._refused = None  # its blocks may be taken
            self._move(sequence, SequenceState.PARKED)

    def resume(self, sequence: Sequence) -> None:
        """Resume a sequence whose reader reads again. If it kept its blocks and there is a place, it runs at once."""
        if sequence.state is not SequenceState.PARKED:
            return
        has_place = len(self.running) < self._config.max_num_seqs
        goes_on = bool(sequence.block_table) and has_place
        self._move(sequence, SequenceState.RUNNING if goes_on else SequenceState.WAITING)

    def _list_of(self, sequence: Sequence) -> list[Sequence]:
        match sequence.state:
            case SequenceState.WAITING:
                return self.waiting
            case SequenceState.RUNNING:
                return self.running
            case SequenceState.PARKED:
                return self.parked
            case SequenceState.FINISHED:
                raise ValueError("a finished sequence is in no list")

    def _enter(self, state: SequenceState, sequence: Sequence) -> None:
        sequence.state = state
        insort(self._list_of(sequence), sequence, key=lambda other: other.arrival)

    def _move(self, sequence: Sequence, state: SequenceState) -> None:
        self._list_of(sequence).remove(sequence)
        self._enter(state, sequence)

    def schedule(self) -> list[Chunk]:
        """Return the next step's chunks, in order of arrival; empty when no sequence can continue.

        Decoding sequences come first, so that a long prompt never delays a token by more than one step's budget.
        """
        bound = self._config.max_num_batched_tokens
        draft = _Draft(bound, bound, self._config.logits_window_bytes)
        for sequence in sorted(self.running, key=lambda sequence: not sequence.is_decoding):
            if sequence.state is SequenceState.RUNNING:  # it may have been preempted for another
                self._plan(sequence, draft)
        for sequence in list(self.waiting):
            if draft.tokens_left <= 0 or len(self.running) >= self._config.max_num_seqs:
                break
            if sequence.state is not SequenceState.WAITING or sequence.is_answered:
                continue
            if sequence.must_wait_for_leader or sequence.must_wait_for_grammar:
                continue
            if not self._admit(sequence):
                break
            self._plan(sequence, draft)
        return sorted(draft.chunks.values(), key=lambda chunk: chunk.sequence.arrival)

    def complete(self, chunk: Chunk) -> None:
        """Record that the chunk is computed, or will be before any later step, and that its rows are given."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.stop
        sequence.num_rows_given = chunk.rows.stop
        self._blocks.publish(sequence)

    def _plan(self, sequence: Sequence, draft: _Draft) -> None:
        start = sequence.num_computed
        count = min(sequence.num_uncomputed, draft.tokens_left)
        if self._config.max_prefill_chunk is not None:
            count = min(count, self._config.max_prefill_chunk)
        stop = start + max(count, 0)
        if sequence.awaits_mask:
            # It may compute all but the token whose step draws. Nobody else waits for it.
            stop = max(start, min(stop, sequence.num_tokens - 1))
        if self._encoder_queue is not None:
            stop = sequence.end_of_ready(stop, self._encoder_queue.is_ready)
        stop = sequence.end_of_whole_items(stop)
        given = sequence.num_rows_given
        rows = range(given, given)
        if sequence.owes_rows:
            stop, rows = self._fit_rows(sequence, stop, draft)
        if stop == start and not rows:
            return
        if self._make_room(sequence, stop, draft):
            draft.add(Chunk(sequence, start, stop, rows))

    def _fit_rows(self, sequence: Sequence, stop: int, draft: _Draft) -> tuple[int, range]:
        """Return where a chunk that would end at ``stop`` has to end because of its rows, and the rows that it gives.

        A row that is not given in the step of its token needs room among the held states. Without room for
        all of them nothing is computed, because a prompt cut into small pieces takes longer in all. A token
        is drawn in the step that gives the prompt's last row, so the prompt's last token is left out until
        then.
        """
        start, given = sequence.num_computed, sequence.num_rows_given
        last = given + self._most_rows(sequence, draft)
        draws = stop == sequence.num_prompt_tokens and sequence.sampling.max_tokens > 0
        if draws and last < stop:
            stop -= 1
        if stop > start and not self._can_hold(sequence, stop - last, draft):
            stop = start
        stop = max(start, stop)
        return stop, range(given, max(given, min(last, stop)))

    def _most_rows(self, sequence: Sequence, draft: _Draft) -> int:
        nbytes = sequence.row_nbytes
        if not nbytes:
            return draft.rows_left
        window = self._config.logits_window_bytes
        is_first = draft.row_bytes_left == window
        in_all = max(draft.row_bytes_left // nbytes, int(is_first))
        return min(
            draft.rows_left, in_all, max(1, min(window, sequence.window_bytes or window) // 4 // nbytes)
        )

    def _can_hold(self, sequence: Sequence, count: int, draft: _Draft) -> bool:
        """Whether there is room for ``count`` held states of the sequence.

        Sequences that were parked for long are preempted to make room.
        """
        if count <= 0:
            return True

        def held() -> int:
            chunks = draft.chunks
            return sum(
                chunks[other].num_held if other in chunks else other.num_held
                for other in self
                if other is not sequence
            )

        while held() + count > self._config.max_num_batched_tokens:
            holders = [other for other in self._idle_with_blocks() if other.num_held and self._lags(other)]
            if not holders:
                return False
            self._preempt(holders[-1], draft)
        return True

    def _lags(self, sequence: Sequence) -> bool:
        """Whether the sequence has been idle for so long that its reader is not just catching up."""
        return self._clock() - sequence.idle_since >= LAGGING_SECONDS

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a place, if there is room for all of it."""
        if not sequence.block_table:
            limit = self._most_cached(sequence)
            if self._is_refused(sequence, limit):
                return False
            sequence.num_computed = self._blocks.share_prefix(sequence, limit)
            # There must be room for the whole prompt, unless it runs alone: else the newest prompts would
            # preempt each other for ever.
            while self.running and self._num_missing(sequence) > self._blocks.num_free:
                idle = [other for other in self._idle_with_blocks() if other is not sequence]
                if not idle:
                    self._blocks.release(sequence)
                    self._refused = sequence, sequence.num_computed
                    sequence.num_computed = 0
                    return False
                self._preempt(idle[-1])
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
                self.num_prefix_query_tokens += (
                    sequence.num_prompt_tokens if self._config.prefix_caching else 0
                )
                self.num_prefix_hit_tokens += sequence.num_computed
        self._move(sequence, SequenceState.RUNNING)
        return True

    def _most_cached(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence the cache may give; at least one is left to compute."""
        limit = min(sequence.num_tokens - 1, sequence.num_known)
        if sequence.owes_rows:
            # They must be recomputed, because the cache holds keys and values but no hidden states.
            limit = min(limit, sequence.num_rows_given)
        return limit

    def _is_refused(self, sequence: Sequence, limit: int) -> bool:
        """Whether the sequence found no room and cannot have any yet.

        The blocks that it could take or share become more only when blocks are released or its cached prefix is extended.
        """
        if self._refused is None or self._refused[0] is not sequence or not self.running:
            return False
        return not self._blocks.extends_prefix(sequence, self._refused[1], limit)

    def _num_missing(self, sequence: Sequence) -> int:
        return self._blocks.blocks_needed(sequence, sequence.num_tokens)

    def _make_room(self, sequence: Sequence, num_tokens: int, draft: _Draft) -> bool:
        """Extend the block table to ``num_tokens``. Returns False if the sequence itself was preempted.

        Idle sequences with blocks are preempted first: those that are parked, or wait again after they were
        parked. Running sequences follow, latest arrival first. So the oldest running sequence can always
        continue, and there is no deadlock.
        """
        while not self._blocks.grow(sequence, num_tokens):
            victim = (self._idle_with_blocks() or self.running)[-1]
            self._preempt(victim, draft)
            if victim is sequence:
                return False
        return True

    def _release(self, sequence: Sequence) -> None:
        self._blocks.release(sequence)
        self._refused = None

    def _idle_with_blocks(self) -> list[Sequence]:
        """Sequences that do not run but keep blocks. The last one is the first to lose them."""
        return [
            *(other for other in self.waiting if other.block_table),
            *(other for other in self.parked if other.block_table),
        ]

    def _preempt(self, sequence: Sequence, draft: _Draft | None = None) -> None:
        """Take the sequence's blocks and held hidden states; it is recomputed when its turn comes."""
        if draft is not None:
            draft.discard(sequence)
        self.num_preemptions += 1
        self._release(sequence)
        sequence.num_computed = 0
        self.dropped.append(sequence)
        if sequence.state is SequenceState.RUNNING:
            self._move(sequence, SequenceState.WAITING)
