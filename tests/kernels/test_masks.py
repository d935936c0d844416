"""Masks in every backend's sampling, against a second definition in numpy float64.

Logits are multiples of 1/8, so that no mass comes within rounding of a filter's edge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels import Kernels
from logitkernels.backend import load_kernels
from logitkernels.cpu.errors import BuildError
from logitkernels.philox import philox_uniform
from logitkernels.sampling import GREEDY_ROW, NOT_FINITE, NOTHING_ALLOWED, RowSampling, SamplingSize
from numpy.typing import NDArray
from sampling_cases import GREEDY, PLAIN, draw_rows, eighths, sampling_rows
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "cpu", "triton"]
EXAMPLES = {"reference": 60, "cpu": 150, "triton": 12}
"""Number of examples per backend; the interpreter is slow."""
INF, NAN = float("inf"), float("nan")


@cache
def kernels_of(name: str) -> Kernels:
    try:
        return load_kernels(name, DEVICE if name == "triton" else "cpu")
    except BuildError as error:  # pragma: no cover
        pytest.skip(f"no native kernels here: {error}")


def draw(
    name: str,
    logits: Tensor,
    rows: list[RowSampling],
    allowed: NDArray[np.int32] | None = None,
    last_tokens: Tensor | None = None,
) -> tuple[list[int], Tensor | None]:
    """Return tokens and processed logits on the host, and check that the raw logits are unchanged."""
    placed = logits.to(DEVICE) if name == "triton" else logits
    last_tokens = None if last_tokens is None else last_tokens.to(placed.device)
    before = placed.clone()
    sampled = draw_rows(kernels_of(name), placed, rows, last_tokens, allowed)
    assert torch.equal(placed.view(torch.int32), before.view(torch.int32))
    return sampled.token_ids.tolist(), None if sampled.processed is None else sampled.processed.cpu()


def pack(is_allowed: NDArray[np.bool_], seed: int) -> NDArray[np.int32]:
    """Pack bits into int32 words one by one, with noise beyond the vocabulary."""
    rows, vocab = is_allowed.shape
    words = np.random.default_rng(seed).integers(0, 1 << 32, (rows, -(-vocab // 32)), dtype=np.uint64)
    for row, token in np.ndindex(rows, vocab):
        bit = np.uint64(1 << token % 32)
        if is_allowed[row, token]:
            words[row, token // 32] |= bit
        else:
            words[row, token // 32] &= ~bit
    return words.astype(np.uint32).view(np.int32)


@dataclass(frozen=True, slots=True)
class Expected:
    token: int
    processed: NDArray[np.float64] | None


def expected_draw(
    raw: NDArray[np.float64], row: RowSampling, is_allowed: NDArray[np.bool_], last_tokens: list[int]
) -> Expected:
    """Compute the definition, one step after the other."""
    if np.isnan(raw).any() or raw.max() == -INF:
        return Expected(NOT_FINITE, None)
    scores = raw.copy()
    seen = set() if row.seen is None else set(row.seen.tolist())
    counts = (
        {}
        if row.generated is None or row.counts is None
        else dict(zip(row.generated, row.counts, strict=True))
    )
    newest = -1 if row.pending is None else last_tokens[row.pending]
    if newest >= 0:
        seen.add(newest)
        counts[newest] = counts.get(newest, 0) + 1
    for token, bias in (row.bias or {}).items():
        scores[token] += bias
    for token in seen:
        penalty = row.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in counts.items():
        scores[token] -= row.presence_penalty + row.frequency_penalty * count
    scores[list(row.banned)] = -INF
    scores[~is_allowed] = -INF
    if scores.max() == -INF:
        return Expected(NOTHING_ALLOWED, None)
    if row.temperature == 0:
        best = int(scores.argmax())
        return Expected(best, np.where(np.arange(len(scores)) == best, 0.0, -INF))
    scores /= row.temperature
    order = np.lexsort((np.arange(len(scores)), -scores))
    order = order[: row.top_k] if row.top_k else order
    mass = np.exp(scores[order] - scores.max())
    before = (np.cumsum(mass) - mass) / mass.sum()
    is_kept = (before < row.top_p) if row.top_p < 1 else np.ones(len(order), dtype=bool)
    is_kept &= mass >= row.min_p * mass[0]
    is_kept[0] = True
    processed = np.full_like(scores, -INF)
    processed[order[is_kept]] = scores[order[is_kept]]
    reached = np.cumsum(np.exp(processed - processed.max()))
    target = philox_uniform(row.seed, row.stream, row.position) * reached[-1]
    return Expected(int(np.searchsorted(reached, target, side="right")), processed)


@pytest.mark.parametrize("name", BACKENDS)
def test_masked_rows_of_every_kind_follow_the_definition(name: str) -> None:
    @settings(max_examples=EXAMPLES[name], deadline=None)
    @given(vocab=st.sampled_from([1, 33, 77, 300]), seed=st.integers(0, 2**31), data=st.data())
    def check(vocab: int, seed: int, data: st.DataObject) -> None:
        rows = data.draw(st.lists(sampling_rows(vocab, 3), min_size=1, max_size=3))
        rows = [replace(row, shows_processed=True) for row in rows]
        share = data.draw(st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))
        is_allowed = np.random.default_rng(seed).random((len(rows), vocab)) < share
        last = [0, vocab - 1, data.draw(st.sampled_from([-1, -2]))]
        logits = eighths(len(rows), vocab, seed)
        tokens, processed = draw(
            name, logits, rows, pack(is_allowed, seed), torch.tensor(last, dtype=torch.int32)
        )
        assert processed is not None
        for index, row in enumerate(rows):
            expected = expected_draw(logits[index].double().numpy(), row, is_allowed[index], last)
            assert tokens[index] == expected.token
            if expected.processed is not None:
                np.testing.assert_allclose(processed[index], expected.processed, rtol=1e-5, atol=1e-5)

    check()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "row", [GREEDY, PLAIN, replace(PLAIN, top_k=3), replace(PLAIN, top_p=0.9, min_p=0.1)]
)
def test_a_row_without_a_draw_says_why(name: str, row: RowSampling) -> None:
    vocab = 77
    logits = eighths(8, vocab, 1)
    is_allowed = np.ones((8, vocab), dtype=bool)
    is_allowed[0] = False
    is_allowed[1] = False
    logits[1, 40] = NAN
    logits[2, 40] = NAN
    is_allowed[2, 40] = False  # a mask does not repair a row
    logits[3] = -INF
    is_allowed[3] = False
    logits[4] = -INF
    logits[4, 40] = 1.0
    is_allowed[4, 40] = False  # the rest of the raw row is -inf
    is_allowed[5, 1:] = False  # the only other token is banned
    logits[6, 40] = INF
    is_allowed[6] = False
    logits[7, 40] = INF
    is_allowed[7, 40] = False  # the other logits are a distribution
    rows = [row] * 5 + [replace(row, banned=(0,))] + [row] * 2
    tokens, _ = draw(name, logits, rows, pack(is_allowed, 0))
    bad, empty = NOT_FINITE, NOTHING_ALLOWED
    assert tokens[:7] == [empty, bad, bad, bad, empty, empty, empty if row.temperature == 0 else bad]
    assert tokens[7] >= 0


@pytest.mark.parametrize("name", BACKENDS)
def test_a_mask_that_allows_everything_changes_nothing(name: str) -> None:
    rows = [GREEDY, PLAIN, replace(PLAIN, top_p=0.7, shows_processed=True), replace(PLAIN, bias={3: 2.0})]
    logits = eighths(4, 300, 2)
    masked = draw(name, logits, rows, np.full((4, 10), -1, dtype=np.int32))
    plain = draw(name, logits, rows)
    assert masked[0] == plain[0]
    assert masked[1] is not None
    assert plain[1] is not None
    assert torch.equal(masked[1][2], plain[1][2])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("has_masks", [False, True])
def test_rows_missing_up_to_the_size_are_greedy_and_unmasked(name: str, has_masks: bool) -> None:
    logits = eighths(5, 77, 3)
    rows = [replace(PLAIN, bias={1: 2.0}), GREEDY]
    is_allowed = np.random.default_rng(0).random((2, 77)) < 0.5
    allowed = pack(is_allowed, 0) if has_masks else None
    size = SamplingSize(num_rows=5, num_edits=9, has_masks=has_masks)
    prepared = kernels_of(name).prepare_sampling(rows, 77, allowed=allowed, size=size)
    tensors = {key: torch.from_numpy(array).to(DEVICE) for key, array in prepared.arrays.items()}
    tokens = prepared.draw(logits.to(DEVICE) if name == "triton" else logits, tensors).token_ids.tolist()
    everything = np.concatenate(
        [is_allowed if has_masks else is_allowed | True, np.ones((3, 77), dtype=bool)]
    )
    assert tokens == draw(name, logits, [*rows, *[GREEDY_ROW] * 3], pack(everything, 0))[0]


def test_what_was_prepared_without_rows_draws_other_rows_of_its_size() -> None:
    """A recorded step draws in this way."""
    kernels, size = kernels_of("triton"), SamplingSize(num_rows=3, num_edits=4, has_masks=True)
    recorded = kernels.prepare_sampling([], 77, size=size)
    is_allowed = np.random.default_rng(1).random((2, 77)) < 0.5
    rows, logits = [PLAIN, replace(GREEDY, banned=(3, 4))], eighths(3, 77, 4)
    prepared = kernels.prepare_sampling(rows, 77, allowed=pack(is_allowed, 0), size=size)
    shapes = {key: (array.shape, array.dtype) for key, array in recorded.arrays.items()}
    assert shapes == {key: (array.shape, array.dtype) for key, array in prepared.arrays.items()}
    tensors = {key: torch.from_numpy(array).to(DEVICE) for key, array in prepared.arrays.items()}
    tokens = recorded.draw(logits.to(DEVICE), {**tensors, "input_ids": torch.empty(0)}).token_ids.tolist()
    everything = np.concatenate([is_allowed, np.ones((1, 77), dtype=bool)])
    assert tokens == draw("triton", logits, [*rows, GREEDY_ROW], pack(everything, 0))[0]


def test_a_batch_without_masks_uploads_none() -> None:
    kernels = kernels_of("triton")
    assert kernels.records_sampling
    assert set(kernels.prepare_sampling([PLAIN], 77).arrays) == {"sampling"}
    allowed = np.zeros((1, 3), dtype=np.int32)
    assert set(kernels.prepare_sampling([PLAIN], 77, allowed=allowed).arrays) == {
        "sampling",
        "sampling_allowed",
    }


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_rows_that_are_read_on_the_host_upload_nothing(name: str) -> None:
    assert not kernels_of(name).records_sampling
    assert not kernels_of(name).prepare_sampling([PLAIN], 77).arrays


@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_fit_is_refused(name: str) -> None:
    kernels, mask = kernels_of(name), np.zeros((1, 3), dtype=np.int32)
    misfits: list[NDArray[Any]] = [mask[:, :2], mask[:0], mask.astype(np.int64)]
    for allowed in misfits:
        with pytest.raises(ValueError, match="it must be int32"):
            kernels.prepare_sampling([PLAIN], 77, allowed=allowed)
    with pytest.raises(ValueError, match="2 rows do not fit into a size of 1"):
        kernels.prepare_sampling([PLAIN] * 2, 77, size=SamplingSize(1, 0, has_masks=False))
    with pytest.raises(ValueError, match="no room for any"):
        kernels.prepare_sampling([PLAIN], 77, allowed=mask, size=SamplingSize(1, 0, has_masks=False))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_logits_of_another_shape_than_was_prepared_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="1 rows of 77 were prepared"):
        kernels_of(name).prepare_sampling([PLAIN], 77).draw(torch.zeros(1, 78), {})


def test_a_size_is_exact() -> None:
    rows = [PLAIN, replace(PLAIN, bias={1: 1.0}, banned=(2, 3)), replace(PLAIN, seen=np.array([4, 5]))]
    assert SamplingSize.of(rows, None) == SamplingSize(3, 5, has_masks=False)
    assert SamplingSize.of([], np.zeros((0, 3), dtype=np.int32)) == SamplingSize(0, 0, has_masks=True)
    assert len({SamplingSize.of(rows, None), SamplingSize.of(rows, None)}) == 1
