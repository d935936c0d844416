"""From sampling params to a row's draw: penalties count every token without reading all of them at each step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitengine.link.messages import GenerationRequest, LogitsSpec, SamplingParams
from logitengine.run.sampler import Sampler
from logitengine.schedule.sequence import Sequence
from logitengine.schedule.token_counts import TokenCounts

SAMPLER = Sampler([2])


def sequence_of(prompt: list[int], logits: LogitsSpec | None = None, **sampling: Any) -> Sequence:
    request = GenerationRequest(
        request_id="a",
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"max_tokens": 50, **sampling}),
        logits=logits,
    )
    return Sequence.of(request, 0, 0)


def generate(sequence: Sequence, token_ids: list[int]) -> None:
    for token_id in token_ids:
        sequence.learn(sequence.await_token(0), token_id)


@given(st.lists(st.integers(0, 30), max_size=20), st.lists(st.integers(0, 40), max_size=120))
def test_token_counts_are_those_of_the_whole_list(first: list[int], rest: list[int]) -> None:
    counts = TokenCounts(first)
    for token_id in rest:
        counts.add(token_id)
    assert dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True)) == Counter(first + rest)
    assert len(counts) == len(set(first + rest))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(0, 9), max_size=40))
def test_a_row_knows_what_was_seen_and_what_was_generated(prompt: list[int], answer: list[int]) -> None:
    sequence = sequence_of(prompt, repetition_penalty=1.2, presence_penalty=0.5)
    generate(sequence, answer)
    row = SAMPLER.row(sequence)
    assert row.seen is not None
    assert sorted(row.seen.tolist()) == sorted(set(prompt + answer))
    found = {}
    if row.generated is not None and row.counts is not None:
        found = dict(zip(row.generated.tolist(), row.counts.tolist(), strict=True))
    assert found == Counter(answer)
    assert (row.position, row.pending) == (len(prompt) + len(answer), None)


class Unreadable(list[int]):
    """Token ids that can be appended to but not read."""

    def __getitem__(self, index: Any) -> Any:
        pytest.fail(f"the history was read at {index}")

    def __iter__(self) -> Any:
        pytest.fail("the history was read")


def test_a_row_of_a_long_history_is_made_without_reading_it() -> None:
    sequence = sequence_of([5] * 9, repetition_penalty=1.2, presence_penalty=0.5)
    generate(sequence, [6, 7, 6])
    sequence.token_ids = Unreadable(sequence.token_ids)
    assert SAMPLER.row(sequence).seen is not None


def test_a_token_that_only_the_device_knows_is_pending_where_a_penalty_needs_it() -> None:
    plain, penalised = sequence_of([5]), sequence_of([5], frequency_penalty=0.5)
    for sequence in (plain, penalised):
        sequence.await_token(3)
    assert (SAMPLER.row(plain).pending, SAMPLER.row(penalised).pending) == (None, 3)


def test_what_ends_an_answer_is_banned_until_min_tokens_are_out() -> None:
    sequence = sequence_of([5], min_tokens=2, stop_token_ids=(9,))
    assert set(SAMPLER.row(sequence).banned) == {9, 2}
    generate(sequence, [4, 4])
    assert SAMPLER.row(sequence).banned == ()
    assert [SAMPLER.ends(sequence, token_id) for token_id in (9, 2, 3)] == [True, True, False]
    assert not SAMPLER.ends(sequence_of([5], ignore_eos=True), 2)


@pytest.mark.parametrize(
    ("spec", "shows"),
    [
        (None, False),
        (LogitsSpec(), False),
        (LogitsSpec(stage="processed"), True),
        (LogitsSpec(stage="processed", positions="prompt"), False),
    ],
)
def test_processed_scores_are_kept_where_they_are_shown(spec: LogitsSpec | None, *, shows: bool) -> None:
    assert SAMPLER.row(sequence_of([5], spec)).shows_processed is shows
