"""Compiled Triton kernels on a GPU at the sizes of real models, against the reference in float64 and bit for bit.

Errors are relative, over all entries together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from logitkernels import AttentionMetadata, AttentionOptions, DenseWeight, Kernels, ReferenceKernels
from logitkernels.philox import philox_uniform
from logitkernels.reference_sampling import process_logits, sample_rows
from logitkernels.sampling import NOT_FINITE, NOTHING_ALLOWED, RowSampling
from logitkernels.triton import TritonKernels
from numpy.typing import NDArray
from sampling_cases import draw_rows
from torch import Tensor

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
ROWS, HIDDEN, INTERMEDIATE, VOCAB = 257, 4096, 14336, 151936
BLOCK_SIZE = 16
QUERY_LENS, SEQ_LENS = [1, 700, 64, 1, 5, 1], [2500, 700, 3000, 1, 5, 33]

REFERENCE = ReferenceKernels()
KERNELS = TritonKernels(batch_invariant=True)

Tensors = tuple[Tensor, ...]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=DEVICE).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True, slots=True)
class Rowwise:
    """Operation whose rows are independent. ``apply(kernels, rows, shared)`` returns tensors with one entry per row.

    ``rows`` are tensors with one entry per row too.
    """

    draw: Callable[[int, torch.dtype], tuple[Tensors, Tensors]]
    apply: Callable[[Kernels, Tensors, Tensors], Tensors]


def _draw_normed(rows: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    return (normal(rows, HIDDEN, dtype=dtype),), (normal(HIDDEN),)


def _draw_added(rows: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    return (normal(rows, HIDDEN), normal(rows, HIDDEN, dtype=dtype)), (normal(HIDDEN),)


def _draw_gated(rows: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    return (normal(rows, 2 * INTERMEDIATE, dtype=dtype),), ()


def _draw_linear(rows: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    return (normal(rows, HIDDEN, dtype=dtype),), (
        normal(INTERMEDIATE, HIDDEN, dtype=dtype),
        normal(INTERMEDIATE, dtype=dtype),
    )


def _draw_heads(rows: int, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """Packed query, key and value heads of 128, cos and sin, and a slot for each."""
    angles = normal(rows, 64).repeat(1, 2)
    slots = torch.randperm(2 * BLOCK_SIZE * (rows // BLOCK_SIZE + 1), device=DEVICE)[:rows]
    return (normal(rows, 48, 128, dtype=dtype), angles.cos(), angles.sin(), slots), ()


def _rope_and_store(kernels: Kernels, rows: Tensors, _shared: Tensors) -> Tensors:
    packed, cos, sin, slots = rows
    query, key, value = packed.split([32, 8, 8], dim=1)
    blocks = int(slots.max()) // BLOCK_SIZE + 1
    keys = packed.new_full((blocks, 8, BLOCK_SIZE, 128), torch.nan)
    values = keys.clone()
    turned = kernels.rope_and_store(query, key, value, cos, sin, keys, values, slots)
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    assert int((~keys.isnan()).sum()) == key.numel(), "nothing else was written"
    return turned, keys[block, :, offset], values[block, :, offset]


def _store(kernels: Kernels, rows: Tensors, _shared: Tensors) -> Tensors:
    packed, slots = rows[0], rows[3]
    blocks = int(slots.max()) // BLOCK_SIZE + 1
    keys = packed.new_full((blocks, 8, BLOCK_SIZE, 128), torch.nan)
    values = keys.clone()
    kernels.store_kv(packed[:, 32:40], packed[:, 40:], keys, values, slots)
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    return keys[block, :, offset], values[block, :, offset]


ROWWISE = {
    "rms_norm": Rowwise(_draw_normed, lambda kernels, x, weight: (kernels.rms_norm(x[0], weight[0], 1e-5),)),
    "add_rms_norm": Rowwise(
        _draw_added,
        lambda kernels, x, weight: kernels.add_rms_norm(x[0], x[1], weight[0], 1e-5, x[1].dtype),
    ),
    "silu_and_mul": Rowwise(_draw_gated, lambda kernels, x, _: (kernels.silu_and_mul(x[0]),)),
    "gelu_and_mul": Rowwise(_draw_gated, lambda kernels, x, _: (kernels.gelu_and_mul(x[0]),)),
    "linear": Rowwise(
        _draw_linear,
        lambda kernels, x, weights: (kernels.pack([DenseWeight("w", weights[0])], weights[1])(x[0]),),
    ),
    "rope_and_store": Rowwise(_draw_heads, _rope_and_store),
    "store_kv": Rowwise(_draw_heads, _store),
}


def _wide(tensors: Tensors) -> Tensors:
    return tuple(x.double() if x.is_floating_point() else x for x in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWWISE)
def test_operations_on_rows_follow_the_reference(name: str, dtype: torch.dtype) -> None:
    operation = ROWWISE[name]
    rows, shared = operation.draw(ROWS, dtype)
    expected = operation.apply(REFERENCE, _wide(rows), _wide(shared))
    for mine, other in zip(operation.apply(KERNELS, rows, shared), expected, strict=True):
        assert relative_error(mine, other) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWWISE)
def test_a_row_has_the_same_bits_alone_among_others_and_again(name: str, dtype: torch.dtype) -> None:
    operation = ROWWISE[name]
    rows, shared = operation.draw(ROWS, dtype)
    together = operation.apply(KERNELS, rows, shared)
    for part in (slice(0, ROWS), slice(0, 1), slice(100, 101), slice(5, 70), slice(ROWS - 1, ROWS)):
        some = operation.apply(KERNELS, tuple(x[part] for x in rows), shared)
        for mine, whole in zip(some, together, strict=True):
            assert torch.equal(mine, whole[part])


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_products_of_every_weight_of_a_layer_follow_the_reference(tokens: int) -> None:
    """A few rows are summed in parts by separate programs, many rows by one program: the bits are the same."""
    for n, k in ((1152, 896), (896, 4864), (6144, HIDDEN), (HIDDEN, INTERMEDIATE), (VOCAB, 896)):
        x, weight = normal(tokens, k, dtype=torch.bfloat16), normal(n, k, dtype=torch.bfloat16)
        linear = KERNELS.pack([DenseWeight("w", weight)])
        product = linear(x)
        assert relative_error(product, x.double() @ weight.double().T) < TOLERANCES[torch.bfloat16]
        assert torch.equal(linear(x[-1:]), product[-1:])


@dataclass(frozen=True, slots=True)
class Attention:
    """Sequences over a scattered cache whose unused slots are NaN."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    metadata: AttentionMetadata
    options: AttentionOptions

    @classmethod
    def draw(
        cls,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        lengths: Sequence[tuple[int, int]],
        **options: Any,
    ) -> Attention:
        """Draw a batch.

        ``lengths`` are (queries, tokens) of each sequence. ``heads`` are query heads, key-value heads and
        their size.
        """
        num_heads, kv_heads, size = heads
        width = -(-max(total for _, total in lengths) // BLOCK_SIZE)
        tables = torch.randperm(len(lengths) * width, device=DEVICE).view(len(lengths), width)
        cache = (len(lengths) * width, kv_heads, BLOCK_SIZE, size)
        caches = normal(*cache, dtype=dtype), normal(*cache, dtype=dtype)
        for (_, total), table in zip(lengths, tables, strict=True):
            for one in caches:
                one[table[-(-total // BLOCK_SIZE) :]] = torch.nan
                if total % BLOCK_SIZE:
                    one[table[total // BLOCK_SIZE], :, total % BLOCK_SIZE :] = torch.nan
        starts = torch.tensor([0, *(count for count, _ in lengths)], device=DEVICE).cumsum(0)
        metadata = AttentionMetadata(
            query_start=starts.int(),
            seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32, device=DEVICE),
            block_tables=tables.int(),
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64, device=DEVICE),
            max_query_len=max(count for count, _ in lengths),
            max_seq_len=max(total for _, total in lengths),
        )
        query = normal(int(starts[-1]), num_heads, size, dtype=dtype)
        return cls(query, *caches, metadata, AttentionOptions(size**-0.5, **options))

    def attend(self, kernels: Kernels) -> Tensor:
        return kernels.paged_attention(
            self.query, self.key_cache, self.value_cache, self.metadata, self.options
        )

    def expected(self) -> Tensor:
        keys, values = self.key_cache.nan_to_num(), self.value_cache.nan_to_num()
        return REFERENCE.paged_attention(self.query.double(), keys, values, self.metadata, self.options)

    def alone(self, index: int) -> Attention:
        """Return one of the sequences as a batch of its own."""
        start, stop = self.metadata.query_start[index : index + 2].tolist()
        total = int(self.metadata.seq_lens[index])
        return self._cut(slice(start, stop), index, total)

    def chunk(self, start: int, stop: int) -> Attention:
        """Return the queries from start to stop of the only sequence, whose queries are all its tokens."""
        return self._cut(slice(start, stop), 0, stop)

    def _cut(self, rows: slice, index: int, total: int) -> Attention:
        count = rows.stop - rows.start
        metadata = AttentionMetadata(
            query_start=torch.tensor([0, count], dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor([total], dtype=torch.int32, device=DEVICE),
            block_tables=self.metadata.block_tables[index : index + 1].contiguous(),
            slot_mapping=self.metadata.slot_mapping[rows],
            max_query_len=count,
            max_seq_len=total,
        )
        return replace(self, query=self.query[rows], metadata=metadata)


CASES = [
    *(((32, 8, 128), dtype) for dtype in DTYPES),
    ((14, 2, 64), torch.bfloat16),
    ((8, 4, 256), torch.bfloat16),
]
"""Heads and dtypes; each pair is compiled separately."""
EVERYTHING: dict[str, Any] = {"sliding_window": 600, "softcap": 30.0}


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("heads", "dtype"), CASES)
def test_attention_follows_the_reference(
    heads: tuple[int, int, int], dtype: torch.dtype, uniform: bool
) -> None:
    batch = Attention.draw(heads, dtype, list(zip(QUERY_LENS, SEQ_LENS, strict=True)))
    out = batch.attend(TritonKernels(batch_invariant=uniform))
    assert relative_error(out, batch.expected()) < TOLERANCES[dtype]


@pytest.mark.parametrize(("heads", "dtype"), CASES)
def test_attention_with_a_window_a_cap_and_sinks_follows_the_reference(
    heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    sinks = normal(heads[0])
    batch = Attention.draw(
        heads, dtype, list(zip(QUERY_LENS, SEQ_LENS, strict=True)), **EVERYTHING, sinks=sinks
    )
    out = batch.attend(TritonKernels())
    assert relative_error(out, batch.expected()) < TOLERANCES[dtype]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("heads", "dtype"), CASES)
def test_a_sequence_has_the_same_bits_alone_among_others_and_again(
    heads: tuple[int, int, int], dtype: torch.dtype, uniform: bool
) -> None:
    kernels = TritonKernels(batch_invariant=uniform)
    batch = Attention.draw(heads, dtype, list(zip(QUERY_LENS, SEQ_LENS, strict=True)))
    together = batch.attend(kernels)
    assert torch.equal(batch.attend(kernels), together)
    for index, rows in enumerate(together.split(QUERY_LENS)):
        assert torch.equal(batch.alone(index).attend(kernels), rows)


@pytest.mark.parametrize(
    ("heads", "dtype", "options"), [*((*case, {}) for case in CASES), (*CASES[2], EVERYTHING)]
)
def test_a_token_has_the_same_bits_in_any_chunk(
    heads: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    total = 1500
    whole = Attention.draw(heads, dtype, [(total, total)], **options)
    rows = whole.attend(KERNELS)
    for stop in (1, 64, 513, 1024, 1499, total):
        for count in (1, 7, 512):
            start = max(0, stop - count)
            assert torch.equal(whole.chunk(start, stop).attend(KERNELS), rows[start:stop]), (start, stop)


def test_a_large_decode_batch_follows_the_reference() -> None:
    lengths = [(1, 1 + 97 * index % 2048) for index in range(256)]
    batch = Attention.draw((32, 8, 128), torch.bfloat16, lengths)
    out = batch.attend(KERNELS)
    assert out.isfinite().all()
    for index in (0, 100, 255):
        alone = batch.alone(index)
        assert relative_error(out[index : index + 1], alone.expected()) < TOLERANCES[torch.bfloat16]
        assert torch.equal(alone.attend(KERNELS), out[index : index + 1])


def test_the_largest_logits_are_the_references() -> None:
    logits = normal(64, VOCAB)
    logits[0] = logits[0].round()  # many ties
    for k in (1, 20, 200):
        ids, values = KERNELS.top_k_logits(logits, k)
        true_ids, true_values = REFERENCE.top_k_logits(logits, k)
        assert torch.equal(ids, true_ids)
        assert torch.equal(values, true_values)
        alone = KERNELS.top_k_logits(logits[7:8], k)
        assert torch.equal(alone[0], ids[7:8])


def test_the_largest_of_a_row_of_nan_are_found_in_the_end() -> None:
    """A failed draw's row is scored before the host knows. A kernel that never ended would take the device down."""
    logits = normal(3, VOCAB)
    logits[1] = torch.nan
    logits[2, 5] = torch.nan
    ids, values = KERNELS.top_k_logits(logits, 20)
    assert torch.equal(ids[:1], REFERENCE.top_k_logits(logits[:1], 20)[0])
    assert ids[1].tolist() == list(range(20))
    assert values[1].isnan().all()
    assert int(ids[2, 0]) == 5


def test_gathered_logits_come_with_their_rows_logsumexp() -> None:
    logits, ids = 4 * normal(64, VOCAB), torch.randint(VOCAB, (64, 3), device=DEVICE)
    values, logsumexp = KERNELS.gather_logits(logits, ids)
    assert torch.equal(values, logits.gather(-1, ids))
    torch.testing.assert_close(
        logsumexp.double(), torch.logsumexp(logits.double(), dim=-1), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(KERNELS.gather_logits(logits[9:10], ids[9:10])[1], logsumexp[9:10])


def _rows() -> list[RowSampling]:
    """Return greedy, plain and edited rows, and rows with each filter."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_p": 0.3, "temperature": 1.5},
        {"top_k": 50},
        {"min_p": 0.02},
        {"top_k": 5000, "top_p": 0.99, "min_p": 1e-4},
        {"bias": {3: 20.0, VOCAB - 1: 18.0}, "banned": (7, 8)},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.3, "temperature": 0.0},
    ]
    rows = []
    for index in range(60):
        row = RowSampling(
            temperature=0.8,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=index,
            stream=index % 3,
            position=1000 + index,
        )
        row = replace(row, **kinds[index % len(kinds)])
        if row.repetition_penalty != 1:
            seen = torch.randperm(VOCAB)[:300].sort().values.numpy()
            row = replace(row, seen=seen, generated=seen[::3], counts=np.full(100, 2))
        rows.append(row)
    return rows


def _sample(logits: Tensor, rows: list[RowSampling], allowed: NDArray[np.int32] | None = None) -> list[int]:
    tokens: list[int] = draw_rows(KERNELS, logits, rows, allowed=allowed).token_ids.tolist()
    return tokens


def test_tokens_are_drawn_from_the_references_distribution() -> None:
    """In float64 the number that drew a token lies in the token's part of the cumulative distribution, within 1e-4."""
    logits, rows = 4 * normal(60, VOCAB), _rows()
    for token, row_logits, row in zip(_sample(logits, rows), logits.cpu().double(), rows, strict=True):
        scores = process_logits(row_logits, row)
        if row.temperature == 0:
            assert token == int(scores.argmax())
            continue
        mass = torch.softmax(scores, dim=-1).cumsum(-1)
        uniform = philox_uniform(row.seed, row.stream, row.position) * float(mass[-1])
        below = float(mass[token - 1]) if token else 0.0
        assert below - 1e-4 <= uniform <= float(mass[token]) + 1e-4, row


def test_a_row_draws_the_same_token_alone_among_others_and_again() -> None:
    logits, rows = 4 * normal(60, VOCAB), _rows()
    tokens = _sample(logits, rows)
    assert _sample(logits, rows) == tokens
    for index in range(len(rows)):
        assert _sample(logits[index : index + 1], rows[index : index + 1]) == tokens[index : index + 1]


def test_rows_without_a_distribution_draw_nothing() -> None:
    logits = normal(4, VOCAB)
    logits[1, 77] = torch.nan
    logits[2] = -torch.inf
    rows = [replace(row, temperature=0.7, top_p=0.9) for row in _rows()[:4]]
    tokens = _sample(logits, rows)
    assert tokens[1:3] == [-1, -1]
    assert min(tokens[0], tokens[3]) >= 0


def test_masks_leave_the_references_tokens_and_say_when_nothing_is_left() -> None:
    """Covers three greedy rows.

    One may draw nothing, one has a NaN that its mask hides, and one has bits beyond the vocabulary.
    """
    logits = normal(4, VOCAB)
    allowed = np.random.default_rng(0).integers(-(2**31), 2**31, (4, -(-VOCAB // 32)), dtype=np.int32)
    allowed[1, : VOCAB // 32] = 0
    if VOCAB % 32:
        allowed[1, -1] = -1 << VOCAB % 32
    logits[2, 77] = torch.nan
    allowed[2, 77 // 32] = 0
    rows = [replace(row, temperature=0.0) for row in _rows()[:4]]
    tokens = _sample(logits, rows, allowed)
    assert tokens == sample_rows(logits.cpu(), rows, allowed=allowed).token_ids.tolist()
    assert tokens[1:3] == [NOTHING_ALLOWED, NOT_FINITE]


def test_the_reference_draws_where_the_logits_are() -> None:
    logits, rows = 4 * normal(60, VOCAB), [replace(row, shows_processed=True) for row in _rows()]
    sampled = draw_rows(REFERENCE, logits, rows)
    assert sampled.token_ids.device == logits.device
    assert sampled.processed is not None
    assert sampled.processed.device == logits.device
    expected = sample_rows(logits.cpu(), rows).token_ids
    assert int((sampled.token_ids.cpu() != expected).sum()) <= 1, (
        "a sum may round to the other side of a number"
    )
