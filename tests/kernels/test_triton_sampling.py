"""Sampling by the Triton kernels against the reference, `logitkernels.reference_sampling.sample_rows`.

Logits are multiples of 1/8 where filters are on, so that no mass comes within rounding of a filter's edge.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels.philox import philox_uniform
from logitkernels.reference_sampling import sample_rows
from logitkernels.sampling import NOT_FINITE, NOTHING_ALLOWED, RowSampling
from logitkernels.triton.sample import sample
from logitkernels.triton.sampling_rows import (
    BANNED,
    SEEN,
    SamplingLayout,
    SamplingTensors,
    pack,
    view,
)
from sampling_cases import GREEDY, PLAIN, eighths, sampling_rows
from torch import Tensor

pytestmark = pytest.mark.interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")


def prepare(rows: list[RowSampling], device: str) -> SamplingTensors:
    """Return tensors of exactly these rows on ``device``."""
    layout = SamplingLayout(len(rows), max(1, sum(row.num_edits for row in rows)))
    words = np.empty(layout.numel, dtype=np.int32)
    pack(rows, layout, words)
    return view(torch.from_numpy(words).to(device), layout)


NOTHING = torch.full((1,), -1, dtype=torch.int32)
UNTOUCHED = 12345.0


def run(
    logits: Tensor,
    tensors: SamplingTensors,
    last_tokens: Tensor = NOTHING,
    *,
    tile: int = 64,
    candidates: int = 16,
) -> tuple[Tensor, Tensor]:
    """Return tokens and scores of ``sample``, and check that the logits are unchanged."""
    logits = logits.to(DEVICE)
    before = logits.clone()
    scores = torch.full_like(logits, UNTOUCHED)
    tokens = sample(logits, tensors, last_tokens.to(DEVICE), scores, tile=tile, candidates=candidates)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return tokens.cpu(), scores.cpu()


def check(
    logits: Tensor,
    rows: list[RowSampling],
    last_tokens: Tensor = NOTHING,
    *,
    tile: int = 64,
    candidates: int = 16,
) -> Tensor:
    """Check that tokens equal the reference's, and processed rows have its support and its values (1e-5)."""
    expected = sample_rows(logits, rows, last_tokens)
    tokens, scores = run(logits, prepare(rows, DEVICE), last_tokens, tile=tile, candidates=candidates)
    assert tokens.tolist() == expected.token_ids.tolist()
    for index, row in enumerate(rows):
        if row.shows_processed and tokens[index] >= 0:
            assert expected.processed is not None
            torch.testing.assert_close(scores[index], expected.processed[index], rtol=1e-5, atol=1e-5)
    return tokens


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_rows_of_every_kind_get_the_references_tokens_and_scores(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([1, 5, 60, 123, 200]))
    last = data.draw(st.lists(st.integers(-1, vocab - 1), min_size=2, max_size=2))
    rows = data.draw(st.lists(sampling_rows(vocab, 2), min_size=1, max_size=3))
    logits = eighths(len(rows), vocab, data.draw(st.integers(0, 99)))
    check(logits, rows, torch.tensor(last, dtype=torch.int32))


@pytest.mark.parametrize("spread", [2, 24])
def test_long_rows_get_the_references_tokens_and_scores(spread: int) -> None:
    """A flat row keeps more entries than there are candidates, so the search reads it again."""
    rows = [
        GREEDY,
        PLAIN,
        replace(PLAIN, top_k=50, shows_processed=True),
        replace(PLAIN, top_p=0.93, seed=2, shows_processed=True),
        replace(PLAIN, top_k=5000, top_p=0.77, seed=3, shows_processed=True),
        replace(PLAIN, min_p=0.0517, seed=4, shows_processed=True, bias={19_999: 9.0, 4096: -2.0}),
    ]
    check(eighths(len(rows), 20_000, spread, spread), rows, tile=4096, candidates=2048)


@pytest.mark.parametrize("pending", [0, 2, 3])
def test_a_pending_token_counts_as_seen_and_generated_once_more(pending: int) -> None:
    """Token 0 is among the row's edits but was not seen, token 2 was seen, token 3 is not among the edits."""
    row = replace(
        PLAIN,
        bias={0: 1.0},
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        seen=np.array([2]),
        generated=np.array([2]),
        counts=np.array([3]),
        pending=1,
        shows_processed=True,
    )
    last = torch.tensor([0, pending], dtype=torch.int32)
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    _, scores = run(logits, prepare([row], DEVICE), last)
    zero = 1.5 - 0.5 - 0.25 if pending == 0 else 3.0
    two = 0.5 - 0.5 - 0.25 * (4 if pending == 2 else 3)
    three = 0.25 - 0.5 - 0.25 if pending == 3 else 0.5
    assert scores[0].tolist() == pytest.approx([zero, -2.0, two, three])
    check(logits, [row], last)


def test_the_pending_token_of_a_row_that_ended_is_none() -> None:
    row = replace(GREEDY, repetition_penalty=9.0, pending=0, shows_processed=True)
    logits = torch.tensor([[0.5, 2.0, 1.0]])
    assert check(logits, [row], torch.tensor([-1], dtype=torch.int32)).tolist() == [1]
    assert check(logits, [row], torch.tensor([1], dtype=torch.int32)).tolist() == [2]


@pytest.mark.parametrize("vocab", [5, 123])
def test_ties_at_a_filters_edge_go_to_the_lower_id(vocab: int) -> None:
    logits = torch.zeros(4, vocab)
    rows = [
        replace(PLAIN, top_k=3, shows_processed=True),
        replace(PLAIN, top_p=0.5, shows_processed=True),
        replace(PLAIN, min_p=1.0, shows_processed=True),
        replace(PLAIN, top_k=4, top_p=0.6, min_p=0.5, shows_processed=True),
    ]
    check(logits, rows)
    _, scores = run(logits, prepare(rows, DEVICE))
    kept = [torch.nonzero(row > -INF).squeeze(-1).tolist() for row in scores]
    assert kept == [list(range(size)) for size in (3, -(-vocab // 2), vocab, 3)]


def test_a_zero_of_either_sign_is_the_same_score() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]]).repeat(2, 1)
    tokens, scores = run(
        logits, prepare([GREEDY, replace(PLAIN, top_k=2, shows_processed=True)], DEVICE), tile=2
    )
    assert tokens[0] == 1
    assert (scores[1] > -INF).tolist() == [False, True, True, False]


def test_a_row_without_a_draw_says_why_and_leaves_the_others_alone() -> None:
    logits = eighths(8, 123, 1)
    logits[0, 100] = NAN
    logits[1] = -INF
    logits[3, 7] = INF
    logits[5, 7] = INF
    logits[6, 9] = NAN
    everything = tuple(range(123))
    filtered = replace(PLAIN, top_k=5, top_p=0.9, min_p=0.1)
    rows = [
        replace(filtered, banned=(100,)),
        filtered,
        replace(filtered, banned=everything),
        filtered,
        replace(GREEDY, banned=everything),
        GREEDY,
        GREEDY,
        filtered,
    ]
    tokens = check(logits, rows).tolist()
    bad, empty = NOT_FINITE, NOTHING_ALLOWED
    assert tokens[:7] == [bad, bad, empty, bad, empty, 7, bad]
    assert tokens[7] >= 0


def test_entries_of_minus_inf_are_never_drawn() -> None:
    logits = torch.full((6, 40), -INF)
    logits[:, 21] = 0.0
    logits[:, 37] = -80.0
    rows = [replace(PLAIN, position=i, top_k=30 * (i % 2), top_p=1 - 0.2 * (i % 3)) for i in range(6)]
    assert set(run(logits, prepare(rows, DEVICE), tile=16)[0].tolist()) == {21}


def test_the_number_is_philox_of_seed_stream_and_position() -> None:
    """Over a flat row of 2^14 the token is the first 14 bits of the number."""
    keys = [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**40 + 5), (1 << 63, 3, 1 << 32), (12345, 1, 99)]
    rows = [replace(PLAIN, seed=seed, stream=stream, position=at) for seed, stream, at in keys]
    tokens, _ = run(torch.zeros(len(keys), 1 << 14), prepare(rows, DEVICE), tile=4096)
    assert tokens.tolist() == [int(philox_uniform(*key) * (1 << 14)) for key in keys]


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 100 draws of 5 tokens, with a fixed seed.

    A value above 20 (3 degrees of freedom) has probability 2e-4.
    """
    logits = torch.tensor([0.0, 1.0, 2.0, -INF, 0.5])
    rows = [replace(PLAIN, seed=11, position=position) for position in range(100)]
    tokens, _ = run(logits.repeat(100, 1), prepare(rows, DEVICE), tile=2)
    counts = np.bincount(tokens.numpy(), minlength=5)
    expected = torch.softmax(logits.double(), -1).numpy() * 100
    live = expected > 0
    assert counts[3] == 0
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < 20


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    shown = replace(PLAIN, shows_processed=True)
    rows = [
        shown,
        replace(shown, top_p=0.9, temperature=0.7),
        replace(shown, top_k=9, top_p=0.9, bias={3: 1.0}),
        replace(GREEDY, shows_processed=True),
        replace(shown, min_p=0.02, repetition_penalty=1.3, pending=1),
    ]
    logits = torch.randn(len(rows), 123, generator=torch.Generator().manual_seed(5))
    last = torch.tensor([4, 100], dtype=torch.int32)
    tokens, scores = run(logits, prepare(rows, DEVICE), last)
    for index, row in enumerate(rows):
        alone, alone_scores = run(logits[index : index + 1], prepare([row], DEVICE), last)
        assert alone[0] == tokens[index]
        assert torch.equal(alone_scores[0], scores[index])


def test_plain_rows_write_no_scores() -> None:
    _, scores = run(eighths(2, 123, 2), prepare([GREEDY, PLAIN], DEVICE))
    assert (scores == UNTOUCHED).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the 8 GiB between the rows are free in virtual memory only")
def test_rows_past_two_to_the_31_elements_are_addressed_rightly() -> None:
    stride, vocab = 2**30 + 5, 123  # a 32-bit number whose double is not
    logits, scores = (torch.empty(2 * stride + vocab).as_strided((3, vocab), (stride, 1)) for _ in range(2))
    logits.copy_(eighths(3, vocab, 3))
    rows = [
        GREEDY,
        replace(PLAIN, top_k=5, shows_processed=True),
        replace(PLAIN, top_p=0.77, bias={1: 2.0}, shows_processed=True),
    ]
    expected = sample_rows(logits.clone(), rows)
    tokens = sample(logits, prepare(rows, DEVICE), NOTHING, scores, tile=64, candidates=16)
    assert tokens.tolist() == expected.token_ids.tolist()
    assert expected.processed is not None
    torch.testing.assert_close(scores[1:].clone(), expected.processed[1:])


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="they must be the same"):
        sample(torch.zeros(2, 5), prepare([GREEDY] * 2, "cpu"), NOTHING, torch.zeros(2, 6))


def test_a_rows_edits_are_the_union_of_what_changes_a_logit() -> None:
    row = replace(
        PLAIN,
        bias={9: 1.5, 4: -2.0},
        banned=(5, 4, 5),
        repetition_penalty=1.5,
        presence_penalty=1.0,
        seen=np.array([9, 2]),
        generated=np.array([2]),
        counts=np.array([7]),
    )
    without_effect = replace(row, bias=None, banned=(), repetition_penalty=1.0, presence_penalty=0.0)
    tensors = prepare([without_effect, row, replace(GREEDY, banned=(8, 7, 8))], "cpu")
    assert tensors.edit_start.tolist() == [0, 0, 4, 6]
    assert tensors.edit_ids[4:6].tolist() == [7, 8]
    edits = {
        int(ids): (float(bias), int(count), int(flags))
        for ids, bias, count, flags in zip(
            tensors.edit_ids[:4],
            tensors.edit_bias[:4],
            tensors.edit_counts[:4],
            tensors.edit_flags[:4],
            strict=True,
        )
    }
    assert edits == {2: (0.0, 7, SEEN), 4: (-2.0, 0, BANNED), 5: (0.0, 0, BANNED), 9: (1.5, 0, SEEN)}


def test_a_larger_layout_is_filled_with_greedy_rows() -> None:
    rows = [
        replace(PLAIN, top_p=0.77, bias={3: 2.0}, seed=2**64 - 1),
        replace(PLAIN, repetition_penalty=2.0, seen=np.arange(5), position=2**40),
    ]
    layout = SamplingLayout(num_rows=4, num_edits=100)
    words = np.full(layout.numel, -1, dtype=np.int32)
    pack(rows, layout, words)
    assert layout.nbytes == words.nbytes
    logits = eighths(4, 60, 4)
    tokens, _ = run(logits, view(torch.from_numpy(words).to(DEVICE), layout))
    assert tokens.tolist() == sample_rows(logits, [*rows, GREEDY, GREEDY]).token_ids.tolist()


@pytest.mark.parametrize(("rows", "edits"), [(1, 0), (3, 1), (64, 1000)])
def test_every_field_begins_at_a_multiple_of_16_bytes_and_none_overlaps(rows: int, edits: int) -> None:
    layout = SamplingLayout(rows, edits)
    buffer = torch.zeros(layout.numel, dtype=torch.int32)
    fields = view(buffer, layout)
    taken = np.zeros(layout.numel, dtype=bool)
    for begin, end in layout.spans.values():
        assert begin % 4 == 0
        assert not taken[begin:end].any()
        taken[begin:end] = True
    assert fields.seed.dtype == torch.int64
    assert fields.edit_bias.shape == (edits,)
    fields.temperature[-1] = 1.5
    assert buffer.view(torch.float32)[layout.spans["temperature"][1] - 1] == 1.5


def test_what_does_not_fit_into_a_layout_is_refused() -> None:
    row = replace(PLAIN, bias={1: 1.0, 2: 1.0}, banned=(2,))
    layout = SamplingLayout(1, 2)
    words = np.zeros(layout.numel, dtype=np.int32)
    pack([row], layout, words)
    assert row.num_edits == 3
    with pytest.raises(ValueError, match="more edits than the 1"):
        pack([row], SamplingLayout(1, 1), words)
    with pytest.raises(ValueError, match="2 rows do not fit"):
        pack([row, row], layout, words)
