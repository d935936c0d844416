"""Sampling by the native CPU kernels against the reference, `logitkernels.reference_sampling.sample_rows`, in float64.

Logits are multiples of 1/8, exact in either type. So tokens and processed logits agree to the bit unless a
mass is within float32's rounding of a filter's edge.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels.cpu import CpuKernels
from logitkernels.cpu.errors import BuildError
from logitkernels.reference_sampling import sample_rows
from logitkernels.sampling import NOT_FINITE, NOTHING_ALLOWED, RowSampling
from sampling_cases import GREEDY, PLAIN, draw_rows, eighths, sampling_rows
from torch import Tensor

try:
    KERNELS = CpuKernels()
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)

INF, NAN = float("inf"), float("nan")


def check(logits: Tensor, rows: list[RowSampling], last_tokens: Tensor | None = None) -> list[int]:
    """Check that tokens and processed rows equal the reference's."""
    before = logits.clone()
    expected = sample_rows(logits.double(), rows, last_tokens)
    got = draw_rows(KERNELS, logits, rows, last_tokens)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert got.token_ids.tolist() == expected.token_ids.tolist()
    for index, row in enumerate(rows):
        if row.shows_processed and got.token_ids[index] >= 0:
            assert got.processed is not None
            assert expected.processed is not None
            assert torch.equal(got.processed[index].double(), expected.processed[index])
    tokens: list[int] = got.token_ids.tolist()
    return tokens


@settings(max_examples=200, deadline=None)
@given(vocab=st.sampled_from([1, 15, 256, 257, 1000, 5000]), seed=st.integers(0, 2**31), data=st.data())
def test_rows_of_every_kind_get_the_references_tokens_and_scores(
    vocab: int, seed: int, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(sampling_rows(vocab, 3), min_size=1, max_size=5))
    last = torch.tensor([0, vocab - 1, -1], dtype=torch.int32)
    check(eighths(len(rows), vocab, seed), [replace(row, shows_processed=True) for row in rows], last)
    check(eighths(len(rows), vocab, seed), rows, last)


@pytest.mark.parametrize("spread", [2, 24, 200])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.31}, {"top_p": 0.93}, {"min_p": 0.11}, {"top_k": 300}, {"top_k": 300, "top_p": 0.77}],
)
def test_a_whole_vocabulary_gets_the_references_tokens(options: dict[str, Any], spread: int) -> None:
    rows = [replace(PLAIN, position=position, shows_processed=True, **options) for position in range(6)]
    check(eighths(6, 49152, spread, spread), rows)


def test_equal_scores_are_cut_by_id() -> None:
    logits = torch.zeros(1, 1000)
    row = replace(PLAIN, top_p=0.3095, shows_processed=True)
    check(logits, [row])
    kept = draw_rows(KERNELS, logits, [row]).processed
    assert kept is not None
    assert torch.isfinite(kept[0]).nonzero().squeeze(-1).tolist() == list(range(310))


@pytest.mark.parametrize("entries", [[NAN, 1.0, 2.0], [-INF, -INF, -INF], [INF, 0.0, 1.0]])
@pytest.mark.parametrize(
    "row", [PLAIN, GREEDY, replace(PLAIN, top_p=0.5, temperature=0.25), replace(PLAIN, top_k=2)]
)
def test_rows_without_a_distribution_have_no_token(entries: list[float], row: RowSampling) -> None:
    check(torch.tensor([entries, [0.0, 1.0, 2.0]]), [row, row])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_nan_that_is_banned_and_bans_that_leave_nothing_are_told_apart(temperature: float) -> None:
    logits = torch.tensor([[NAN, 1.0, 2.0], [0.0, 1.0, 2.0], [-0.0, 0.0, -1.0]])
    rows = [
        replace(PLAIN, temperature=temperature, banned=(0,)),
        replace(PLAIN, temperature=temperature, banned=(0, 1, 2)),
        replace(PLAIN, temperature=0.0),
    ]
    assert check(logits, rows) == [NOT_FINITE, NOTHING_ALLOWED, 0]


def test_a_score_that_a_low_temperature_makes_infinite_is_no_distribution() -> None:
    rows = [replace(PLAIN, temperature=0.25), replace(PLAIN, temperature=0.25, top_p=0.5)]
    logits = torch.tensor([[3e38, 0.0, -3e38]]).expand(2, -1)
    assert draw_rows(KERNELS, logits, rows).token_ids.tolist() == [NOT_FINITE, NOT_FINITE]


def test_draws_follow_the_distribution() -> None:
    """Chi-square test at 1e-6 over 20,000 positions, with four likely tokens among many."""
    logits = torch.full((1, 700), -20.0)
    likely = {3: 0.1, 260: 0.2, 511: 0.3, 699: 0.4}
    for token, share in likely.items():
        logits[0, token] = torch.tensor(share).log()
    draws = 20_000
    rows = [replace(PLAIN, position=position) for position in range(draws)]
    tokens = draw_rows(KERNELS, logits.expand(draws, -1).contiguous(), rows).token_ids
    counts = {token: int((tokens == token).sum()) for token in likely}
    statistic = sum((counts[token] - draws * share) ** 2 / (draws * share) for token, share in likely.items())
    assert statistic < 30.7
