"""The scheduler alone: no sequence starves, bounds hold, every token is computed once and every row given once."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from llguidance import LLMatcher
from logitengine.config import EngineConfig
from logitengine.grammar.parse_state import ParseState
from logitengine.grammar.vocabulary import CompiledGrammar, Vocabulary
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.schedule.block_manager import BlockManager
from logitengine.schedule.scheduler import Chunk, Scheduler
from logitengine.schedule.sequence import Sequence, SequenceState

BLOCK_SIZE = 8


def make_sequence(
    arrival: int,
    prompt: int,
    answer: int,
    *,
    prompt_rows: bool = False,
    row_nbytes: int = 0,
    grammar: ParseState | None = None,
) -> Sequence:
    request = GenerationRequest(
        request_id=f"r{arrival}",
        prompt_token_ids=[arrival % 2] * prompt,
        sampling=SamplingParams(max_tokens=answer),
        logits=LogitsSpec(positions="prompt") if prompt_rows else None,
    )
    return Sequence.of(request, 0, arrival, row_nbytes=row_nbytes, grammar=grammar)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def make_scheduler(
    num_blocks: int = 64, clock: Clock | None = None, **options: int | None
) -> tuple[Scheduler, BlockManager]:
    config = EngineConfig.model_validate({"block_size": BLOCK_SIZE, **options})
    blocks = BlockManager(num_blocks, BLOCK_SIZE, prefix_caching=True)
    return Scheduler(config, blocks, clock or Clock()), blocks


def apply(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """Do the engine's work for a schedule, without a model: every drawn token is 7."""
    drawing = [chunk for chunk in chunks if chunk.draws_token]
    for chunk in chunks:
        scheduler.complete(chunk)
    for chunk in chunks:
        sequence = chunk.sequence
        if chunk in drawing:
            sequence.token_ids.append(7)
            if sequence.num_generated == sequence.sampling.max_tokens:
                scheduler.remove(sequence)
        elif sequence.sampling.max_tokens == 0 and chunk.is_prompt_done:
            scheduler.remove(sequence)


def lengths(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    """Return (arrival, tokens computed, rows given) of each chunk."""
    return [(chunk.sequence.arrival, chunk.num_tokens, len(chunk.rows)) for chunk in chunks]


def test_decoding_comes_before_a_long_prompt() -> None:
    scheduler, _ = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    short, long = make_sequence(0, 4, 8), make_sequence(1, 100, 1)
    scheduler.add(short)
    apply(scheduler, scheduler.schedule())
    scheduler.add(long)
    assert lengths(scheduler.schedule()) == [(0, 1, 0), (1, 15, 0)]


def test_the_newest_sequence_gives_way_when_blocks_run_out() -> None:
    scheduler, blocks = make_scheduler(num_blocks=4, max_num_batched_tokens=64)
    old, new = make_sequence(0, 16, 8), make_sequence(1, 16, 8)
    scheduler.add(old)
    scheduler.add(new)
    apply(scheduler, scheduler.schedule())
    assert blocks.num_free == 0
    chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks] == [old]
    assert scheduler.waiting == [new]
    assert scheduler.num_preemptions == 1
    assert new.num_tokens == 17, "a preempted sequence keeps what it has generated"


class CountedTokens(list[int]):
    """Tokens that count the slices taken of them, of which each hash and each comparison of a block takes one."""

    num_slices = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_slices += isinstance(index, slice)
        return super().__getitem__(index)


def test_a_prompt_without_room_is_not_looked_up_again_until_a_block_is_released() -> None:
    scheduler, _ = make_scheduler(num_blocks=24)
    scheduler.add(make_sequence(0, 64, 1))
    apply(scheduler, scheduler.schedule())
    first, second, waiting = make_sequence(1, 65, 40), make_sequence(3, 4, 80), make_sequence(4, 136, 1)
    waiting.token_ids = tokens = CountedTokens(waiting.token_ids)
    for sequence in (first, second, waiting):
        scheduler.add(sequence)
    looked_up = set()
    while not first.is_finished:
        chunks = scheduler.schedule()
        assert [chunk.sequence for chunk in chunks] == [first, second]
        apply(scheduler, chunks)
        looked_up.add(tokens.num_slices)
    assert looked_up == {2 * 8 + 1}, "eight blocks found, and one not"
    assert [chunk.sequence for chunk in scheduler.schedule()] == [second, waiting]
    assert tokens.num_slices <= 3 * 8 + 1, "what was hashed is not hashed again"


def test_a_prompt_without_room_goes_on_once_its_beginning_is_computed_by_another() -> None:
    scheduler, _ = make_scheduler(num_blocks=12, max_num_batched_tokens=80)
    for arrival, prompt in ((0, 64), (2, 80)):
        scheduler.add(make_sequence(arrival, prompt, 8))
    steps = []
    for _ in range(2):
        chunks = scheduler.schedule()
        steps.append(lengths(chunks))
        apply(scheduler, chunks)
    assert steps == [[(0, 64, 0)], [(0, 1, 0), (2, 16, 0)]]


def test_a_prompt_without_room_gets_that_of_a_sequence_that_is_parked() -> None:
    scheduler, _ = make_scheduler(num_blocks=16)
    slow, quick, waiting = make_sequence(1, 60, 8), make_sequence(3, 8, 8), make_sequence(4, 80, 8)
    for sequence in (slow, quick, waiting):
        scheduler.add(sequence)
    apply(scheduler, scheduler.schedule())
    assert scheduler.waiting == [waiting]
    scheduler.park(slow)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [quick, waiting]
    assert slow.block_table == []


def test_a_parked_sequence_holds_up_nobody_and_goes_on_where_it_was() -> None:
    scheduler, _ = make_scheduler()
    slow = make_sequence(0, 8, 8)
    scheduler.add(slow)
    apply(scheduler, scheduler.schedule())
    scheduler.park(slow)
    assert scheduler.schedule() == []
    quick = make_sequence(1, 8, 8)
    scheduler.add(quick)
    chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks] == [quick]
    apply(scheduler, chunks)
    scheduler.resume(slow)
    assert lengths(scheduler.schedule()) == [(0, 1, 0), (1, 1, 0)], "nothing was computed again"
    assert scheduler.num_preemptions == 0


def test_a_resumed_sequence_decodes_before_a_long_prompt_goes_on() -> None:
    scheduler, _ = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    short, long = make_sequence(0, 4, 8), make_sequence(1, 100, 1)
    scheduler.add(short)
    apply(scheduler, scheduler.schedule())
    scheduler.park(short)
    scheduler.add(long)
    apply(scheduler, scheduler.schedule())
    scheduler.resume(short)
    assert lengths(scheduler.schedule()) == [(0, 1, 0), (1, 15, 0)]


def test_parked_sequences_give_up_their_places_to_newcomers() -> None:
    scheduler, _ = make_scheduler(max_num_seqs=2)
    slow = [make_sequence(arrival, 8, 8) for arrival in range(2)]
    for sequence in slow:
        scheduler.add(sequence)
    apply(scheduler, scheduler.schedule())
    for sequence in slow:
        scheduler.park(sequence)
    assert scheduler.waiting == [], "they do not count as waiting"
    newcomers = [make_sequence(arrival, 8, 2) for arrival in (2, 3)]
    for sequence in newcomers:
        scheduler.add(sequence)
    chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks] == newcomers
    apply(scheduler, chunks)
    for sequence in slow:
        scheduler.resume(sequence)
    assert [sequence.state for sequence in slow] == [SequenceState.WAITING] * 2
    apply(scheduler, scheduler.schedule())
    assert {chunk.sequence for chunk in scheduler.schedule()} == set(slow)


def test_parked_sequences_lose_their_blocks_before_anybody_who_runs() -> None:
    scheduler, blocks = make_scheduler(num_blocks=6, max_num_batched_tokens=64)
    parked, old, new = (make_sequence(arrival, 16, 20) for arrival in range(3))
    for sequence in (parked, old, new):
        scheduler.add(sequence)
    apply(scheduler, scheduler.schedule())
    scheduler.park(parked)
    assert blocks.num_free == 0
    chunks = scheduler.schedule()
    assert [chunk.sequence for chunk in chunks] == [old, new]
    assert (parked.block_table, parked.num_computed, parked.state) == ([], 0, SequenceState.PARKED)
    scheduler.remove(parked)
    assert parked in scheduler.dropped


def test_followers_wait_for_their_leader_and_share_its_prompt() -> None:
    scheduler, _ = make_scheduler()
    request = GenerationRequest(
        request_id="a", prompt_token_ids=[1] * 17, sampling=SamplingParams(max_tokens=4), n=2
    )
    leader = Sequence.of(request, 0, 0)
    follower = Sequence.of(request, 1, 1, leader=leader)
    scheduler.add(leader)
    scheduler.add(follower)
    first = scheduler.schedule()
    assert [chunk.sequence for chunk in first] == [leader]
    apply(scheduler, first)
    second = {chunk.sequence: chunk for chunk in scheduler.schedule()}
    assert second[follower].start == 16


def test_no_choice_draws_before_the_prompts_last_row_has_gone_out() -> None:
    """Rows of 100 bytes and a window of 65,536 bytes: 163 of the 400 rows fit into a step."""
    scheduler, _ = make_scheduler(logits_window_bytes=1 << 16, max_num_batched_tokens=512)
    request = GenerationRequest(
        request_id="a",
        prompt_token_ids=[1] * 400,
        sampling=SamplingParams(max_tokens=4),
        n=2,
        logits=LogitsSpec(positions="all"),
    )
    leader = Sequence.of(request, 0, 0, row_nbytes=100)
    follower = Sequence.of(request, 1, 1, leader=leader, row_nbytes=100)
    scheduler.add(leader)
    scheduler.add(follower)
    steps = []
    for _ in range(4):
        chunks = scheduler.schedule()
        steps.append(lengths(chunks))
        assert (any(chunk.draws_token for chunk in chunks)) == (len(steps) > 2)
        apply(scheduler, chunks)
    assert steps[:2] == [[(0, 399, 163)], [(0, 0, 163)]]
    assert steps[2] == [(0, 1, 74)], "the last prompt token is computed in the step that gives its row"
    assert [arrival for arrival, _, _ in steps[3]] == [0, 1]


def test_a_prompt_whose_rows_are_owed_is_computed_in_the_same_chunks_as_any_other() -> None:
    scheduler, _ = make_scheduler(num_blocks=512, logits_window_bytes=1 << 16, max_num_batched_tokens=64)
    scheduler.add(make_sequence(0, 100, 0, prompt_rows=True, row_nbytes=4096))
    steps = []
    while scheduler.has_work:
        chunks = scheduler.schedule()
        steps.append(lengths(chunks)[0][1:])
        apply(scheduler, chunks)
    assert [rows for _, rows in steps] == [4] * 25
    assert [tokens for tokens, _ in steps if tokens] == [64, 36], "and between the chunks rows alone"


def test_a_lagging_readers_held_states_give_way_to_somebody_elses() -> None:
    clock = Clock()
    scheduler, _ = make_scheduler(512, clock, logits_window_bytes=1 << 16, max_num_batched_tokens=64)
    lagging = make_sequence(0, 100, 0, prompt_rows=True, row_nbytes=4096)
    scheduler.add(lagging)
    apply(scheduler, scheduler.schedule())
    assert lagging.num_held == 60
    scheduler.park(lagging)
    other = make_sequence(1, 100, 0, prompt_rows=True, row_nbytes=4096)
    scheduler.add(other)
    assert scheduler.schedule() == [], "it may only be catching up"
    clock.seconds += 1.0
    chunks = scheduler.schedule()
    assert lengths(chunks) == [(1, 64, 4)]
    assert scheduler.dropped == [lagging]
    assert (lagging.num_computed, lagging.num_rows_given, lagging.num_held) == (0, 4, 0)
    apply(scheduler, chunks)
    scheduler.resume(lagging)
    while scheduler.has_work:
        chunks = scheduler.schedule()
        assert all(chunk.rows.start >= 4 for chunk in chunks if chunk.sequence is lagging)
        apply(scheduler, chunks)


def test_a_reader_that_catches_up_in_time_is_not_computed_again() -> None:
    scheduler, _ = make_scheduler(512, logits_window_bytes=1 << 16, max_num_batched_tokens=64)
    first, second = (make_sequence(i, 64, 0, prompt_rows=True, row_nbytes=4096) for i in range(2))
    for sequence in (first, second):
        scheduler.add(sequence)
    for _ in range(100):
        chunks = scheduler.schedule()
        apply(scheduler, chunks)
        for chunk in chunks:
            if not chunk.sequence.is_finished:
                scheduler.park(chunk.sequence)
                scheduler.schedule()
                scheduler.resume(chunk.sequence)
    assert not scheduler.has_work
    assert scheduler.num_preemptions == 0


def test_owed_prompt_rows_are_not_skipped_by_a_prefix_hit() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(0, 32, 1))
    apply(scheduler, scheduler.schedule())
    again = make_sequence(2, 32, 1, prompt_rows=True)
    scheduler.add(again)
    (chunk,) = scheduler.schedule()
    assert (chunk.start, chunk.rows) == (0, range(32))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 12), st.integers(0, 20_000), st.integers(0, 5)),
        min_size=1,
        max_size=12,
    ),
    st.integers(10, 40),
    st.integers(4, 40),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_every_sequence_ends_and_every_token_is_computed_in_order(
    arrivals: list[tuple[int, int, int, int]], num_blocks: int, budget: int, max_seqs: int, chunk: int | None
) -> None:
    scheduler, blocks = make_scheduler(
        num_blocks,
        max_num_batched_tokens=budget,
        max_num_seqs=max_seqs,
        max_prefill_chunk=chunk,
        logits_window_bytes=1 << 16,
    )
    sequences = [
        make_sequence(i, prompt, answer, prompt_rows=bool(nbytes), row_nbytes=nbytes)
        for i, (prompt, answer, nbytes, _) in enumerate(arrivals)
    ]
    due = [(step, sequence) for sequence, (_, _, _, step) in zip(sequences, arrivals, strict=True)]
    rows_seen: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
    for step in range(20_000):
        for _, sequence in [entry for entry in due if entry[0] == step]:
            scheduler.add(sequence)
        if step > 5 and not scheduler.has_work:
            break
        chunks = scheduler.schedule()
        assert chunks or step <= 5, "there is work and no reader lags, but nothing was scheduled"
        check_step(scheduler, chunks, budget, max_seqs)
        for planned in chunks:
            rows_seen[planned.sequence] += planned.rows
        apply(scheduler, chunks)
    assert not scheduler.has_work
    assert blocks.num_used == 0
    for sequence, (prompt, answer, nbytes, _) in zip(sequences, arrivals, strict=True):
        assert sequence.num_generated == answer
        assert rows_seen[sequence] == (list(range(prompt)) if nbytes else []), (
            "each prompt row once, in order"
        )


def check_step(scheduler: Scheduler, chunks: list[Chunk], budget: int, max_seqs: int) -> None:
    """Check the bounds of one step, and that it follows from the state of its sequences."""
    assert sum(chunk.num_tokens for chunk in chunks) <= budget
    assert sum(len(chunk.rows) for chunk in chunks) <= budget
    assert len(chunks) <= max_seqs
    held = {sequence: sequence.num_held for sequence in scheduler}
    held.update({chunk.sequence: chunk.num_held for chunk in chunks})
    assert sum(held.values()) <= budget
    for planned in chunks:
        sequence = planned.sequence
        assert sequence.state is SequenceState.RUNNING
        assert planned.start == sequence.num_computed <= planned.stop
        assert planned.num_tokens or planned.rows
        assert planned.rows.start == sequence.num_rows_given
        assert len(sequence.block_table) * BLOCK_SIZE >= planned.stop
        assert not (planned.draws_token and planned.rows.stop < sequence.num_prompt_tokens)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.booleans()), min_size=1, max_size=10),
    st.lists(st.lists(st.booleans(), min_size=10, max_size=10), min_size=1, max_size=8),
    st.integers(0, 5),
)
def test_sequences_without_a_grammar_never_wait_for_those_that_await_theirs(
    arrivals: list[tuple[int, int, bool]], masked: list[list[bool]], compiled_at: int
) -> None:
    """They draw a token in every step. The others draw in no step before which their mask was missing."""
    scheduler, blocks = make_scheduler(num_blocks=256, max_num_batched_tokens=1000, max_num_seqs=10)
    compiling: Future[CompiledGrammar] = Future()
    sequences = [
        make_sequence(i, prompt, answer, grammar=ParseState("", compiling, cast("Vocabulary", None)))
        if has_grammar
        else make_sequence(i, prompt, answer)
        for i, (prompt, answer, has_grammar) in enumerate(arrivals)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    for step in range(200):
        if step == compiled_at:
            compiling.set_result(CompiledGrammar(cast("LLMatcher", None), np.zeros(1, np.int32)))
        has_mask = masked[step % len(masked)] if step < 100 else [True] * 10
        for sequence, is_masked in zip(sequences, has_mask, strict=False):
            if sequence.grammar is not None and is_masked:
                sequence.grammar.take_back()
            elif sequence.grammar is not None:
                sequence.grammar.give_away()
        free = {sequence for sequence in scheduler if sequence.grammar is None}
        awaiting = {sequence for sequence in scheduler if sequence.awaits_mask}
        chunks = scheduler.schedule()
        drawing = {chunk.sequence for chunk in chunks if chunk.draws_token}
        assert free <= drawing
        assert not awaiting & drawing
        apply(scheduler, chunks)
    assert not scheduler.has_work
    assert blocks.num_used == 0


class LifeMachine(RuleBasedStateMachine):
    """Parked and resumed readers, aborts and arrivals, in any order, over few blocks and places."""

    budget, max_seqs, num_blocks = 16, 3, 8

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.scheduler, self.blocks = make_scheduler(
            self.num_blocks,
            self.clock,
            max_num_batched_tokens=self.budget,
            max_num_seqs=self.max_seqs,
            logits_window_bytes=1 << 16,
        )
        self.live: list[Sequence] = []
        self.arrivals = 0

    @rule(prompt=st.integers(1, 40), answer=st.integers(0, 8), nbytes=st.sampled_from([0, 4096, 9000]))
    def arrive(self, prompt: int, answer: int, nbytes: int) -> None:
        sequence = make_sequence(self.arrivals, prompt, answer, prompt_rows=bool(nbytes), row_nbytes=nbytes)
        self.arrivals += 1
        self.live.append(sequence)
        self.scheduler.add(sequence)

    @rule(which=st.integers(0, 50))
    def lag(self, which: int) -> None:
        if self.live:
            self.scheduler.park(self.live[which % len(self.live)])

    @rule(which=st.integers(0, 50))
    def read_again(self, which: int) -> None:
        if self.live:
            self.scheduler.resume(self.live[which % len(self.live)])

    @rule(which=st.integers(0, 50))
    def abort(self, which: int) -> None:
        if self.live:
            self.scheduler.remove(self.live.pop(which % len(self.live)))

    @rule()
    def step(self) -> None:
        self.clock.seconds += 1.0
        chunks = self.scheduler.schedule()
        check_step(self.scheduler, chunks, self.budget, self.max_seqs)
        ready = [s for s in self.live if s.state in (SequenceState.RUNNING, SequenceState.WAITING)]
        assert bool(chunks) == bool(ready), "whoever can go on does, whoever else is parked"
        apply(self.scheduler, chunks)
        self.live = [sequence for sequence in self.live if not sequence.is_finished]

    @precondition(lambda self: self.live)
    @rule()
    def everybody_reads_to_the_end(self) -> None:
        for sequence in self.live:
            self.scheduler.resume(sequence)
        for _ in range(2_000):
            if not self.scheduler.has_work:
                break
            apply(self.scheduler, self.scheduler.schedule())
        assert not self.scheduler.has_work
        assert all(sequence.is_finished for sequence in self.live)
        self.live = []

    @invariant()
    def every_sequence_is_in_the_list_of_its_state(self) -> None:
        lists = {
            SequenceState.WAITING: self.scheduler.waiting,
            SequenceState.RUNNING: self.scheduler.running,
            SequenceState.PARKED: self.scheduler.parked,
        }
        assert sum(map(len, lists.values())) == len(self.live)
        for state, members in lists.items():
            assert all(sequence.state is state for sequence in members)
            assert members == sorted(members, key=lambda sequence: sequence.arrival)
        assert len(self.scheduler.running) <= self.max_seqs

    @invariant()
    def blocks_belong_to_somebody(self) -> None:
        assert self.blocks.num_used == len({block for s in self.live for block in s.block_table})


LifeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestLives = LifeMachine.TestCase
