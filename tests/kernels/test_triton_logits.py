"""Triton kernels for the largest logits, gathered logits and logsumexp, against sorting and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels.triton.gather_logits import gather_logits
from logitkernels.triton.top_k_logits import top_k_logits
from torch import Tensor

pytestmark = pytest.mark.interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")
shapes = st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 5, 123]))
few = settings(max_examples=8, deadline=None)


def by_sorting(logits: Tensor, k: int) -> Tensor:
    """Return ids in the order (NaN first, then descending, then by id), by a stable sort."""
    return torch.sort(logits, descending=True, stable=True).indices[:, :k]


def rows_of(rows: int, vocab: int, seed: int) -> Tensor:
    """Return rows with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 9, (rows, vocab), generator=generator).float() / 2


def far_rows(vocab: int) -> Tensor:
    """Return three rows of which the last begins past 2^31 elements, although their distance is a 32-bit number.

    The memory between them is never touched.
    """
    stride = 2**30 + 5
    rows = torch.empty(2 * stride + vocab).as_strided((3, vocab), (stride, 1))
    rows.copy_(rows_of(3, vocab, 0))
    return rows


@few
@given(shapes, st.integers(1, 16), st.integers(0, 99))
def test_the_largest_come_in_order_with_ties_by_lower_id(shape: tuple[int, int], k: int, seed: int) -> None:
    logits = rows_of(*shape, seed).to(DEVICE)
    k = min(k, shape[1])
    ids, values = top_k_logits(logits, k, tile=64)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, by_sorting(logits, k))
    assert torch.equal(values, logits.gather(-1, ids))


@pytest.mark.parametrize(("vocab", "k"), [(4096, 256), (9001, 256), (20_000, 1), (49152, 20)])
def test_the_largest_of_a_long_row_are_found(vocab: int, k: int) -> None:
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    ids, values = top_k_logits(logits, k)
    assert torch.equal(ids, by_sorting(logits, k))
    assert torch.equal(values, logits.gather(-1, ids))


def test_nan_comes_first_and_the_zeros_and_infinities_fall_in_line() -> None:
    row = [-0.0, -INF, 0.0, NAN, 1.0, INF, -NAN, -1e-45, -INF, 1e-45]
    ids, values = top_k_logits(torch.tensor([row], device=DEVICE), len(row), tile=32)
    assert ids.tolist() == [[3, 6, 5, 4, 9, 0, 2, 7, 1, 8]]
    assert torch.signbit(values[0, 5:7]).tolist() == [True, False], "the values are the row's own"


def test_equal_logits_keep_the_lowest_ids() -> None:
    ids, _ = top_k_logits(torch.zeros(1, 300, device=DEVICE), 16, tile=32)
    assert ids.tolist() == [list(range(16))]


@pytest.mark.parametrize("k", [0, 6, 257])
def test_a_k_that_is_not_there_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to"):
        top_k_logits(torch.zeros(1, 5 if k < 257 else 1000, device=DEVICE), k)


@pytest.mark.parametrize("logits", [torch.zeros(2, 8).half(), torch.zeros(8), torch.zeros(8, 2).t()])
def test_logits_in_another_form_are_refused(logits: Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits (are|lie)"):
        top_k_logits(logits, 2)
    with pytest.raises(ValueError, match=r"logits (are|lie)"):
        gather_logits(logits, torch.zeros(2, 1, dtype=torch.int64))


@few
@given(shapes, st.sampled_from([0, 1, 3, 130]), st.sampled_from([16, 4096]), st.integers(0, 99))
def test_gathered_logits_are_the_rows_own_and_logsumexp_is_that_of_float64(
    shape: tuple[int, int], num_ids: int, tile: int, seed: int
) -> None:
    """Tolerance 1e-6, relative or absolute."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * 10
    logits[torch.rand(shape, generator=generator) < 0.3] = -INF
    ids = torch.randint(0, shape[1], (shape[0], num_ids), generator=generator)
    values, logsumexp = gather_logits(logits.to(DEVICE), ids.to(DEVICE), tile=tile)
    assert torch.equal(values.cpu(), logits.gather(-1, ids))
    expected = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(logsumexp.cpu().double(), expected, rtol=1e-6, atol=1e-6)


def test_logsumexp_of_a_long_row_is_that_of_float64() -> None:
    """Tolerance 1e-6 relative. A plain float32 sum over a flat row of this length is off by more."""
    logits = torch.full((2, 151_936), 3.0)
    logits[1] = torch.linspace(-20, 20, 151_936)
    _, logsumexp = gather_logits(logits.to(DEVICE), torch.zeros(2, 1, dtype=torch.int64, device=DEVICE))
    torch.testing.assert_close(
        logsumexp.cpu().double(), torch.logsumexp(logits.double(), -1), rtol=1e-6, atol=0.0
    )


def test_logsumexp_of_rows_that_are_not_finite() -> None:
    logits = torch.full((5, 40), -INF)
    logits[1, 3] = INF
    logits[2, 30] = NAN
    logits[3, 20] = 88.9
    logits[4, 0], logits[4, 39] = INF, NAN
    _, logsumexp = gather_logits(
        logits.to(DEVICE), torch.zeros(5, 1, dtype=torch.int64, device=DEVICE), tile=16
    )
    assert logsumexp.tolist() == pytest.approx([-INF, INF, NAN, 88.9, NAN], nan_ok=True)


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    logits = torch.randn(5, 123, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ids = torch.arange(5, device=DEVICE)[:, None]
    together = gather_logits(logits, ids, tile=32)[1]
    best = top_k_logits(logits, 5, tile=32)
    for row in range(5):
        assert torch.equal(
            gather_logits(logits[row : row + 1], ids[row : row + 1], tile=32)[1], together[row : row + 1]
        )
        alone = top_k_logits(logits[row : row + 1], 5, tile=32)
        assert torch.equal(alone[0][0], best[0][row])
        assert torch.equal(alone[1][0], best[1][row])


@pytest.mark.skipif(DEVICE == "cuda", reason="the 8 GiB between the rows are free in virtual memory only")
def test_rows_past_two_to_the_31_elements_are_addressed_rightly() -> None:
    logits = far_rows(123)
    ids, values = top_k_logits(logits, 7, tile=32)
    assert torch.equal(ids, by_sorting(logits.clone(), 7))
    assert torch.equal(values, logits.gather(-1, ids))
    gathered, logsumexp = gather_logits(logits, ids, tile=32)
    assert torch.equal(gathered, values)
    torch.testing.assert_close(logsumexp.double(), torch.logsumexp(logits.double(), -1), rtol=1e-6, atol=1e-6)
