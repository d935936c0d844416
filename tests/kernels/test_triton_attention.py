"""Paged prefill and decode in Triton against the reference in float64."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels import AttentionMetadata, AttentionOptions, ReferenceKernels
from logitkernels.triton.paged_decode import paged_decode
from logitkernels.triton.paged_prefill import paged_prefill
from numpy.typing import NDArray
from torch import Tensor

pytestmark = pytest.mark.interpreted

REFERENCE = ReferenceKernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class Sequences:
    """Queries [length, Hq, D], keys [length, Hkv, D] and values [length, Hkv, Dv] of some sequences, in float64."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def draw(
        cls, lengths: list[int], heads: int, kv_heads: int, size: int, value_size: int | None = None
    ) -> Sequences:
        generator = torch.Generator().manual_seed(sum(lengths))

        def normal(length: int, count: int, width: int) -> Tensor:
            return torch.randn(length, count, width, generator=generator, dtype=torch.float64)

        return cls(
            [normal(length, heads, size) for length in lengths],
            [normal(length, kv_heads, size) for length in lengths],
            [normal(length, kv_heads, value_size or size) for length in lengths],
        )

    def only(self, *indices: int) -> Sequences:
        return Sequences(*([part[i] for i in indices] for part in (self.queries, self.keys, self.values)))


@dataclass(frozen=True, slots=True)
class Batch:
    """Last queries of some sequences, over a cache whose unused slots are NaN."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    metadata: AttentionMetadata

    @classmethod
    def of(
        cls,
        sequences: Sequences,
        query_lens: list[int],
        dtype: torch.dtype,
        *,
        block_size: int = 16,
        seed: int = 0,
    ) -> Batch:
        lengths = [len(keys) for keys in sequences.keys]
        width = -(-max(*lengths, 1) // block_size) + 1
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(lengths) * width + 2, generator=generator)
        tables = order[: len(lengths) * width].view(len(lengths), width)
        # Table entries past a sequence's end point to a block that is NaN throughout.
        for row, length in enumerate(lengths):
            tables[row, -(-length // block_size) :] = order[-1]
        caches = []
        for parts in (sequences.keys, sequences.values):
            cache = torch.full(
                (len(order), parts[0].shape[1], block_size, parts[0].shape[2]), torch.nan, dtype=dtype
            )
            for table, part in zip(tables, parts, strict=True):
                positions = torch.arange(len(part))
                cache[table[positions // block_size], :, positions % block_size] = part.to(dtype)
            caches.append(cache.to(DEVICE))
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        queries = [
            part[len(part) - count :] if len(part) else torch.zeros(count, *part.shape[1:], dtype=part.dtype)
            for part, count in zip(sequences.queries, query_lens, strict=True)
        ]
        metadata = AttentionMetadata(
            query_start=starts.int().to(DEVICE),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            block_tables=tables.int().to(DEVICE),
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64, device=DEVICE),
            max_query_len=max(query_lens),
            max_seq_len=max(lengths),
        )
        return cls(torch.cat(queries).to(dtype).to(DEVICE), caches[0], caches[1], metadata)

    def attend(self, scale: float = 0.1, *, uniform: bool = False, **options: Any) -> Tensor:
        """Run both launches over the same tensors."""
        out = self.query.new_full((*self.query.shape[:2], self.value_cache.shape[-1]), torch.nan)
        for function in (paged_prefill, paged_decode):
            function(
                self.query,
                self.key_cache,
                self.value_cache,
                self.metadata,
                out,
                AttentionOptions(scale, **options),
                uniform=uniform,
            )
        return out.cpu()

    def split(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split(self.metadata.query_start.diff().tolist()))

    def expected(self, scale: float = 0.1, **options: Any) -> Tensor:
        """Run the reference in float64 on the same rounded inputs, without the NaN in slots that it masks."""
        clean = [torch.nan_to_num(cache.double().cpu()) for cache in (self.key_cache, self.value_cache)]
        metadata = dataclasses.replace(
            self.metadata,
            **{
                name: getattr(self.metadata, name).cpu()
                for name in ("query_start", "seq_lens", "block_tables", "slot_mapping")
            },
        )
        return REFERENCE.paged_attention(
            self.query.double().cpu(), clean[0], clean[1], metadata, AttentionOptions(scale, **options)
        )

    def assert_close(self, scale: float = 0.1, *, uniform: bool = False, **options: Any) -> None:
        """Check the error relative to a row's largest value: 2e-6 in float32, 2e-3 in float16, 2e-2 in bfloat16."""
        actual, expected = self.attend(scale, uniform=uniform, **options), self.expected(scale, **options)
        largest = expected.abs().amax(-1, keepdim=True).clamp(min=0.1)
        assert actual.dtype == self.query.dtype
        error = ((actual.double() - expected) / largest).abs().max()
        assert error < TOLERANCES[self.query.dtype], error


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(0, 600)), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (3, 1), (7, 1), (4, 2), (6, 3)]),
    st.sampled_from([None, 1, 33, 300]),
    st.sampled_from([None, 5.0]),
    st.sampled_from([8, 16, 32, 64]),
    st.booleans(),
    st.booleans(),
)
def test_attention_follows_the_reference(
    pieces: list[tuple[int, int]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    block_size: int,
    sinks: bool,
    uniform: bool,
) -> None:
    sequences = Sequences.draw([query + past for query, past in pieces], *heads, 64)
    batch = Batch.of(sequences, [query for query, _ in pieces], torch.float32, block_size=block_size)
    batch.assert_close(
        uniform=uniform,
        sliding_window=window,
        softcap=softcap,
        sinks=torch.linspace(-3, 5, heads[0], device=DEVICE) if sinks else None,
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("size", "value_size"), [(16, 16), (32, 32), (80, 80), (96, 72), (128, 128), (192, 128), (256, 256)]
)
def test_head_sizes_and_dtypes(dtype: torch.dtype, size: int, value_size: int) -> None:
    sequences = Sequences.draw([123, 270, 5], 4, 2, size, value_size)
    Batch.of(sequences, [7, 1, 5], dtype).assert_close(size**-0.5)


@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.float32, 5), (torch.float32, 33), (torch.bfloat16, 64), (torch.bfloat16, 71)]
)
def test_groups_larger_than_a_tile_are_divided(dtype: torch.dtype, group: int) -> None:
    sequences = Sequences.draw([70, 11], 2 * group, 2, 32)
    for uniform in (False, True):
        Batch.of(sequences, [1, 3], dtype).assert_close(uniform=uniform)


@pytest.mark.parametrize("lengths", [[1], [1200], [513, 512, 511, 1]])
@pytest.mark.parametrize("window", [None, 40, 700])
def test_lone_queries_of_few_and_of_many_splits(lengths: list[int], window: int | None) -> None:
    sequences = Sequences.draw(lengths, 4, 1, 64)
    batch = Batch.of(sequences, [1] * len(lengths), torch.float32)
    batch.assert_close(sliding_window=window, sinks=torch.tensor([0.0, 3.0, -torch.inf, 40.0], device=DEVICE))


@pytest.mark.parametrize("max_seq_len", [64, 5000])
def test_padded_sequences_get_zeros(max_seq_len: int) -> None:
    sequences = Sequences.draw([40, 0, 0], 2, 1, 32)
    batch = Batch.of(sequences, [1, 1, 1], torch.float32)
    batch = dataclasses.replace(batch, metadata=dataclasses.replace(batch.metadata, max_seq_len=max_seq_len))
    for sinks in (None, torch.tensor([-torch.inf, 1.0], device=DEVICE)):
        out = batch.attend(sinks=sinks)
        assert torch.equal(out[1:], torch.zeros(2, 2, 32))
        assert out[0].isfinite().all()


def test_each_launch_writes_its_own_rows_only() -> None:
    batch = Batch.of(Sequences.draw([40, 20, 7], 2, 1, 32), [1, 5, 1], torch.float32)
    arguments = (batch.query, batch.key_cache, batch.value_cache, batch.metadata)
    for function, rows in ((paged_decode, [0, 6]), (paged_prefill, [1, 2, 3, 4, 5])):
        out = torch.full((7, 2, 32), 9.0, device=DEVICE)
        function(*arguments, out, AttentionOptions(0.1))
        assert [row for row in range(7) if not (out[row] == 9.0).all()] == rows


def test_a_cap_neither_overflows_nor_loses_small_scores() -> None:
    sequences = Sequences.draw([90, 20], 2, 1, 64)
    for size in (1e-3, 1.0, 300.0):
        scaled = dataclasses.replace(sequences, queries=[query * size for query in sequences.queries])
        Batch.of(scaled, [1, 20], torch.float32).assert_close(softcap=20.0)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a row
def test_a_nan_in_a_query_stays_in_its_row() -> None:
    sequences = Sequences.draw([600, 30], 2, 1, 32)
    clean = Batch.of(sequences, [1, 9], torch.bfloat16)
    spoiled = dataclasses.replace(clean, query=clean.query.clone())
    spoiled.query[0, 1, 3] = spoiled.query[4, 0, 5] = torch.nan
    before, after = clean.attend(), spoiled.attend()
    hit = torch.zeros(10, 2, dtype=torch.bool)
    hit[0, 1] = hit[4, 0] = True
    assert after[hit].isnan().all()
    assert torch.equal(after[~hit], before[~hit])


@pytest.mark.parametrize(
    ("dtype", "uniform"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_a_sequence_has_the_same_bits_alone_and_among_others(dtype: torch.dtype, uniform: bool) -> None:
    sequences = Sequences.draw([560, 65, 130, 12], 3, 1, 64)
    counts = [1, 30, 3, 12]
    batch = Batch.of(sequences, counts, dtype)
    together = batch.split(batch.attend(uniform=uniform, sliding_window=550))
    order = [3, 1, 0, 2]
    batch = Batch.of(sequences.only(*order), [counts[i] for i in order], dtype, block_size=32, seed=1)
    shuffled = batch.split(batch.attend(uniform=uniform, sliding_window=550))
    for index, rows in zip(order, shuffled, strict=True):
        alone = Batch.of(sequences.only(index), [counts[index]], dtype, seed=2)
        assert torch.equal(rows, together[index])
        assert torch.equal(alone.attend(uniform=uniform, sliding_window=550), together[index])


@pytest.fixture
def ordered_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the interpreter's BLAS products by a loop: their order of summation depends on a row's place."""

    def matmul(
        a: NDArray[np.float32], b: NDArray[np.float32], dtype: np.dtype[np.float32]
    ) -> NDArray[np.float32]:
        product: NDArray[np.float32] = np.einsum("mk,kn->mn", a, np.ascontiguousarray(b), dtype=dtype)
        return product

    if DEVICE == "cpu":
        monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize(
    ("dtype", "size", "window", "split"),
    [
        (torch.float32, 32, 530, 512),
        (torch.bfloat16, 64, 90, 512),
        (torch.bfloat16, 128, None, 512),
        (torch.float16, 192, None, 256),
    ],
)
def test_a_token_has_the_same_bits_wherever_its_chunk_begins(
    dtype: torch.dtype, size: int, window: int | None, split: int
) -> None:
    """Covers a lone query (decode), a short and a long chunk (prefill), across bounds of tiles and of a split."""
    first, total = split - 30, split + 70
    sequences = Sequences.draw([total], 3, 1, size)
    options: dict[str, Any] = {
        "sliding_window": window,
        "sinks": torch.tensor([0.0, 1.0, 2.0], device=DEVICE),
    }
    whole = Batch.of(sequences, [total - first], dtype).attend(uniform=True, **options)
    for end, count in ((split, 1), (split + 1, 1), (split + 1, 2), (split + 65, 1), (split + 65, 40)):
        cut = Sequences(*([part[0][:end]] for part in (sequences.queries, sequences.keys, sequences.values)))
        rows = Batch.of(cut, [count], dtype, seed=end).attend(uniform=True, **options)
        assert torch.equal(rows, whole[end - count - first : end - first]), (end, count)


def test_blocks_past_two_to_the_31_elements_are_found() -> None:
    """Only the last blocks of the caches are touched, so each takes 4 GiB of address space but no memory."""
    block_size, size = 16, 64
    blocks = (1 << 31) // (block_size * size) + 100
    sequences = Sequences.draw([20, 16], 2, 1, size)
    small = Batch.of(sequences, [1, 5], torch.bfloat16)
    used = small.metadata.block_tables.unique().long()
    caches = []
    for cache in (small.key_cache, small.value_cache):
        vast = torch.empty(blocks, 1, block_size, size, dtype=torch.bfloat16, device=DEVICE)
        vast[used + (blocks - len(cache))] = cache[used]
        caches.append(vast)
    tables = small.metadata.block_tables + (blocks - len(small.key_cache))
    metadata = dataclasses.replace(small.metadata, block_tables=tables)
    huge = Batch(small.query, caches[0], caches[1], metadata)
    assert torch.equal(huge.attend(), small.attend())


def test_tensors_that_do_not_fit_are_refused() -> None:
    batch = Batch.of(Sequences.draw([9], 4, 2, 32), [1], torch.float32)
    out = torch.empty(1, 4, 32, device=DEVICE)
    for query, keys, message in (
        (batch.query.bfloat16(), batch.key_cache, "caches are"),
        (batch.query[:, :3], batch.key_cache, "does not fit"),
        (batch.query, batch.key_cache[::2], "caches differ"),
        (batch.query, batch.key_cache.transpose(2, 3).contiguous().transpose(2, 3), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_decode(query, keys, batch.value_cache, batch.metadata, out, AttentionOptions(0.1))
