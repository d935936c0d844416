"""The scheduler alone, without a model: nobody starves, the budget holds, every token is computed once in order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from logitengine.config import EngineConfig
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.schedule.block_manager import BlockManager
from logitengine.schedule.scheduler import Chunk, Scheduler
from logitengine.schedule.sequence import Sequence


def make_sequence(arrival: int, prompt: int, answer: int, *, prompt_rows: bool = False) -> Sequence:
    return Sequence(
        GenerationRequest(
            request_id=f"r{arrival}",
            prompt_token_ids=[arrival % 2] * prompt,
            sampling=SamplingParams(max_tokens=answer),
            logits=LogitsSpec(positions="prompt") if prompt_rows else None,
        ),
        0,
        arrival,
    )


def make_scheduler(num_blocks: int = 64, **options: int | None) -> tuple[Scheduler, BlockManager]:
    config = EngineConfig.model_validate({"block_size": 8, **options})
    blocks = BlockManager(num_blocks, 8, prefix_caching=True)
    return Scheduler(config, blocks), blocks


def apply(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    """What the engine does with a schedule, minus the model: every drawn token is 7."""
    drawing = [chunk for chunk in chunks if chunk.draws_token]
    for chunk in chunks:
        scheduler.complete(chunk)
        chunk.sequence.num_prompt_rows_sent = max(
            chunk.sequence.num_prompt_rows_sent, chunk.prompt_rows.stop if chunk.prompt_rows else 0
        )
    for chunk in drawing:
        chunk.sequence.token_ids.append(7)
        if chunk.sequence.num_generated == chunk.sequence.sampling.max_tokens:
            scheduler.remove(chunk.sequence)


def test_decoding_comes_before_a_long_prompt() -> None:
    scheduler, _ = make_scheduler(max_num_batched_tokens=16, max_num_seqs=4)
    short, long = make_sequence(0, 4, 8), make_sequence(1, 100, 1)
    scheduler.add(short)
    apply(scheduler, scheduler.schedule())
    scheduler.add(long)
    chunks = scheduler.schedule()
    assert [(chunk.sequence.arrival, chunk.stop - chunk.start) for chunk in chunks] == [(0, 1), (1, 15)]


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


def test_a_throttled_sequence_holds_up_nobody() -> None:
    slow = make_sequence(0, 8, 8)
    config = EngineConfig(block_size=8)
    blocks = BlockManager(64, 8, prefix_caching=True)
    lagging: set[Sequence] = set()
    scheduler = Scheduler(config, blocks, throttled=lagging.__contains__)
    scheduler.add(slow)
    apply(scheduler, scheduler.schedule())
    lagging.add(slow)
    assert scheduler.schedule() == []
    quick = make_sequence(1, 8, 8)
    scheduler.add(quick)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [quick]


def test_followers_wait_for_their_leader_and_share_its_prompt() -> None:
    scheduler, _ = make_scheduler()
    leader = make_sequence(0, 17, 4)
    follower = Sequence(leader.request, 1, 1, leader)
    scheduler.add(leader)
    scheduler.add(follower)
    first = scheduler.schedule()
    assert [chunk.sequence for chunk in first] == [leader]
    apply(scheduler, first)
    second = {chunk.sequence: chunk for chunk in scheduler.schedule()}
    assert second[follower].start == 16


def test_owed_prompt_rows_are_not_skipped_by_a_prefix_hit() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add(make_sequence(0, 32, 1))
    apply(scheduler, scheduler.schedule())
    again = make_sequence(2, 32, 1, prompt_rows=True)
    scheduler.add(again)
    (chunk,) = scheduler.schedule()
    assert (chunk.start, chunk.prompt_rows) == (0, range(32))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 12), st.booleans(), st.integers(0, 5)),
        min_size=1,
        max_size=12,
    ),
    st.integers(10, 40),
    st.integers(4, 40),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_every_sequence_ends_and_every_token_is_computed_in_order(
    arrivals: list[tuple[int, int, bool, int]], num_blocks: int, budget: int, max_seqs: int, chunk: int | None
) -> None:
    scheduler, blocks = make_scheduler(
        num_blocks, max_num_batched_tokens=budget, max_num_seqs=max_seqs, max_prefill_chunk=chunk
    )
    sequences = [
        make_sequence(i, prompt, answer, prompt_rows=rows)
        for i, (prompt, answer, rows, _) in enumerate(arrivals)
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
        assert sum(chunk.stop - chunk.start for chunk in chunks) <= budget
        assert len(chunks) <= max_seqs
        for planned in chunks:
            assert planned.start == planned.sequence.num_computed < planned.stop
            assert len(planned.sequence.block_table) * 8 >= planned.stop
            rows_seen[planned.sequence] += planned.prompt_rows
        apply(scheduler, chunks)
    assert not scheduler.has_work
    assert blocks.num_used == 0
    for sequence, (prompt, answer, rows, _) in zip(sequences, arrivals, strict=True):
        assert sequence.num_generated == answer
        assert rows_seen[sequence] == (list(range(prompt)) if rows else []), "each prompt row once, in order"
