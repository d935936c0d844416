"""Top-k, logsumexp and ranks of the native CPU backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels import ReferenceKernels
from logitkernels.cpu import CpuKernels
from logitkernels.cpu.errors import BuildError
from torch import Tensor

try:
    KERNELS = CpuKernels()
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)


def stable_order(row: Tensor) -> Tensor:
    """Return the defined order: descending, ties by lower id."""
    return torch.sort(row, descending=True, stable=True).indices


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 3000),
    data=st.data(),
    levels=st.sampled_from([2, 50, 10**6]),
    seed=st.integers(0, 99),
)
def test_top_k_is_the_head_of_a_stable_sort(
    rows: int, vocab: int, data: st.DataObject, levels: int, seed: int
) -> None:
    k = data.draw(st.integers(1, vocab))
    # A few levels make many ties, with infinities among them.
    logits = (
        torch.randint(0, levels, (rows, vocab), generator=torch.Generator().manual_seed(seed)) - levels / 2
    )
    logits = torch.where(logits == 0, -torch.inf, logits.float())
    ids, values = KERNELS.top_k_logits(logits, k)
    expected = torch.stack([stable_order(row)[:k] for row in logits])
    assert torch.equal(ids, expected)
    assert torch.equal(values, logits.gather(-1, expected))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 4), vocab=st.integers(1, 300), data=st.data())
def test_count_above_is_the_reference(rows: int, vocab: int, data: st.DataObject) -> None:
    entries = st.sampled_from([0.0, -0.0, 1.0, 1.5, torch.inf, -torch.inf, torch.nan])
    row = st.lists(entries, min_size=vocab, max_size=vocab)
    logits = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))
    bounds = torch.tensor(data.draw(st.lists(entries, min_size=rows, max_size=rows)))
    assert torch.equal(KERNELS.count_above(logits, bounds), ReferenceKernels().count_above(logits, bounds))


def test_softcap_is_the_formula_and_rounds_each_logit_alike_anywhere() -> None:
    """Tolerance: 4e-7 of the cap."""
    logits = torch.randn(7, 1003, generator=torch.Generator().manual_seed(1)) * 50
    logits[0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    actual = KERNELS.softcap(logits, 30.0)
    assert (actual - 30 * torch.tanh(logits.double() / 30)).abs().max() < 1.2e-5
    for row, expected in zip(logits, actual, strict=True):
        assert torch.equal(KERNELS.softcap(row[None], 30.0)[0], expected)
    assert KERNELS.softcap(torch.tensor([torch.nan]), 30.0).isnan()
    assert KERNELS.softcap(logits.bfloat16(), 30.0).dtype == torch.bfloat16


def test_zeros_of_either_sign_tie_and_keep_their_bits() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -2.0]])
    ids, values = KERNELS.top_k_logits(logits, 3)
    assert ids.tolist() == [[1, 2, 3]]
    assert values.signbit().tolist() == [[True, False, True]]


def test_nan_comes_first() -> None:
    logits = torch.tensor([[1.0, torch.nan, torch.inf, -torch.nan]])
    assert KERNELS.top_k_logits(logits, 4)[0].tolist() == [[1, 3, 2, 0]]


def test_rising_rows_fill_the_buffer_again_and_again() -> None:
    logits = torch.arange(49152.0)[None]
    assert KERNELS.top_k_logits(logits, 3)[0].tolist() == [[49151, 49150, 49149]]


@pytest.mark.parametrize("k", [0, 6, -1])
def test_k_outside_the_vocabulary_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="from 1 to the 5"):
        KERNELS.top_k_logits(torch.zeros(1, 5), k)


@pytest.mark.parametrize("vocab", [1, 17, 1000, 49152])
def test_logsumexp(vocab: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0)) * 20
    logits[0, 0] = -torch.inf if vocab > 1 else 0.0
    actual = KERNELS.logsumexp(logits)
    assert (actual - logits.double().logsumexp(-1)).abs().max() < 1e-5
    assert torch.equal(actual[1:2], KERNELS.logsumexp(logits[1:2]))


def test_logsumexp_of_infinities_and_nan() -> None:
    logits = torch.full((3, 20), -torch.inf)
    logits[1, 19] = torch.inf
    logits[2, 3] = torch.nan
    result = KERNELS.logsumexp(logits)
    assert result[:2].tolist() == [-torch.inf, torch.inf]
    assert result[2].isnan()
