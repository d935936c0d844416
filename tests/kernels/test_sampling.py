"""Sampling against a second definition in numpy float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels.philox import philox4x32, philox_uniform
from logitkernels.reference_sampling import draw, process_logits, sample_rows
from logitkernels.sampling import NOT_FINITE, NOTHING_ALLOWED, RowSampling
from numpy.typing import NDArray

PLAIN = RowSampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, stream=0, position=0)


def expected_support(scores: NDArray[np.float64], row: RowSampling) -> set[int]:
    """Return the ids that top-k, then top-p over the rest, then min-p keep. Ties go to the lower id."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    kept = order[: row.top_k] if row.top_k else order
    mass = np.exp(scores[kept] - scores[kept].max())
    mass /= mass.sum()
    before = np.cumsum(mass) - mass
    inside = (before < row.top_p) if row.top_p < 1 else np.ones(len(kept), dtype=bool)
    inside[0] = True
    inside &= mass >= row.min_p * mass[0]
    return set(kept[inside].tolist())


logits_rows = st.lists(st.integers(-40, 40).map(lambda steps: steps / 8), min_size=2, max_size=60)


@settings(deadline=None)
@given(
    logits_rows,
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.integers(0, 70),
    st.sampled_from([0.013, 0.31, 0.77, 0.93, 1.0]),
    st.sampled_from([0.0, 0.0017, 0.11, 0.63]),
)
def test_filters_keep_what_their_definitions_keep(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = replace(PLAIN, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = torch.tensor(values)
    processed = process_logits(logits, row)
    kept = set(torch.nonzero(processed > -torch.inf).squeeze(-1).tolist())
    assert kept == expected_support(np.array(values) / temperature, row)
    torch.testing.assert_close(processed[sorted(kept)], logits[sorted(kept)] / temperature)
    assert logits.tolist() == pytest.approx(values), "the raw row is left as it was"


@pytest.mark.parametrize("top_p", [0.5, 0.97, 0.9999])
def test_a_nucleus_wider_than_the_candidates_is_still_exact(top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(20_000, generator=generator)
    row = replace(PLAIN, top_p=top_p)
    kept = set(torch.nonzero(process_logits(logits, row) > -torch.inf).squeeze(-1).tolist())
    assert kept == expected_support(logits.double().numpy(), row)
    assert len(kept) > 1024


def test_penalties_and_bias_follow_their_formulas() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 0.0])
    row = replace(
        PLAIN,
        bias={3: 10.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        seen=np.array([0, 1]),
        generated=np.array([1, 2]),
        counts=np.array([3, 1]),
        banned=(4,),
    )
    expected = [1.0, -4.0 - 0.5 - 0.75, 1.0 - 0.5 - 0.25, 10.5, -np.inf]
    assert process_logits(logits, row).tolist() == pytest.approx(expected)


def test_greedy_is_a_point_mass_on_the_first_of_the_largest() -> None:
    processed = process_logits(torch.tensor([1.0, 3.0, 3.0]), replace(PLAIN, temperature=0.0))
    assert processed.tolist() == [-np.inf, 0.0, -np.inf]
    assert draw(processed, replace(PLAIN, temperature=0.0)) == 1


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 draws of 5 tokens, with a fixed seed.

    A value above 25 (4 degrees of freedom) has probability 5e-5.
    """
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 0.5])
    counts = np.zeros(5)
    for position in range(20_000):
        counts[draw(logits, replace(PLAIN, seed=11, position=position))] += 1
    expected = torch.softmax(logits.double(), -1).numpy() * counts.sum()
    assert counts[3] == 0
    live = expected > 0
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 25


def test_a_draw_depends_on_seed_stream_and_position_alone() -> None:
    numbers = {
        philox_uniform(seed, stream, position)
        for seed in (0, 1, 1 << 40)
        for stream in (0, 1)
        for position in (0, 1, 1 << 33)
    }
    assert len(numbers) == 18
    assert all(0 <= number < 1 for number in numbers)
    assert philox_uniform(5, 1, 9) == philox_uniform(5, 1, 9)


def test_a_batch_is_drawn_row_by_row_and_shows_what_was_asked_for() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 20, generator=generator)
    rows = [
        replace(PLAIN, temperature=0.0),
        replace(PLAIN, top_k=4, shows_processed=True),
        replace(PLAIN, top_p=0.5, seed=9),
    ]
    sampled = sample_rows(logits, rows)
    assert sampled.token_ids.dtype == torch.int32
    assert sampled.token_ids.tolist() == [
        draw(process_logits(logits[i], row), row) for i, row in enumerate(rows)
    ]
    assert sampled.processed is not None
    assert torch.equal(sampled.processed[1], process_logits(logits[1], rows[1]))
    assert sample_rows(logits, [rows[0]] * 3).processed is None


@pytest.mark.parametrize("token", [2, 3])
def test_a_pending_token_counts_as_seen_and_generated_once_more(token: int) -> None:
    """Token 2 was seen and generated before, token 3 was not."""
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    row = replace(
        PLAIN,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        seen=np.array([2]),
        generated=np.array([2]),
        counts=np.array([3]),
        shows_processed=True,
    )
    known = replace(
        row,
        seen=np.array([2, 3] if token == 3 else [2]),
        generated=np.array([2, 3] if token == 3 else [2]),
        counts=np.array([3, 1] if token == 3 else [4]),
    )
    last = torch.tensor([0, token], dtype=torch.int32)
    sampled = sample_rows(logits, [replace(row, pending=1)], last)
    assert sampled.processed is not None
    assert torch.equal(sampled.processed[0], process_logits(logits[0], known))


def test_a_pending_token_of_a_row_that_ended_is_none() -> None:
    logits = torch.tensor([[1.0, 3.0]])
    row = replace(PLAIN, temperature=0.0, repetition_penalty=9.0, pending=0)
    assert sample_rows(logits, [row], torch.tensor([-1], dtype=torch.int32)).token_ids.tolist() == [1]
    assert sample_rows(logits, [row], torch.tensor([1], dtype=torch.int32)).token_ids.tolist() == [0]


def test_a_pending_token_needs_the_tokens_of_the_step_before() -> None:
    with pytest.raises(ValueError, match="no tokens of the step before are given"):
        sample_rows(torch.zeros(1, 3), [replace(PLAIN, pending=0)])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_row_without_a_distribution_has_no_token(temperature: float, top_k: int) -> None:
    row = replace(PLAIN, temperature=temperature, top_k=top_k)
    logits = torch.zeros(5, 4)
    logits[0, 3] = torch.nan
    logits[1] = -torch.inf
    logits[3, 2] = torch.inf
    rows = [row, row, replace(row, banned=(0, 1, 2, 3)), row, row]
    tokens = sample_rows(logits, rows).token_ids.tolist()
    assert tokens[:3] == [NOT_FINITE, NOT_FINITE, NOTHING_ALLOWED]
    assert tokens[3] == (NOT_FINITE if temperature > 0 else 2)
    assert tokens[4] >= 0


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    """Checks the known-answer vectors that Random123 publishes for philox4x32-10."""
    assert philox4x32(counter, key) == words
