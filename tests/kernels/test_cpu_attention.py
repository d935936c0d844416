"""Paged attention and whole layers of the native CPU backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoder_layers import HIDDEN, KV_HEADS, SIZE, layer_of, tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitkernels import AttentionMetadata, AttentionOptions, DecoderLayerWeights, ReferenceKernels
from logitkernels.cpu import CpuKernels
from logitkernels.cpu.errors import BuildError
from logitkernels.decoder import ComposedLayers
from torch import Tensor

try:
    KERNELS = CpuKernels()
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float32]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def metadata_of(
    query_lens: list[int], seq_lens: list[int], block_size: int, seed: int = 0
) -> AttentionMetadata:
    """Metadata of sequences whose blocks are scattered at random."""
    width = -(-max(seq_lens) // block_size)
    order = torch.randperm(len(seq_lens) * width + 3, generator=torch.Generator().manual_seed(seed))
    tables = order[: len(seq_lens) * width].to(torch.int32).view(len(seq_lens), width)
    slots = [
        int(tables[s, position // block_size]) * block_size + position % block_size
        for s, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True))
        for position in range(seq_len - query_len, seq_len)
    ]
    return AttentionMetadata(
        query_start=torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )


def transpose_memory(cache: Tensor) -> Tensor:
    """Return the same cache in memory where the tokens of a block are neighbours."""
    return cache.transpose(2, 3).contiguous().transpose(2, 3)


@dataclasses.dataclass
class Sequences:
    """Keys, values and queries of some sequences, before they are paged."""

    queries: list[Tensor]  # [length, Hq, D] each
    keys: list[Tensor]  # [length, Hkv, D]
    values: list[Tensor]  # [length, Hkv, Dv]

    @classmethod
    def draw(
        cls, lengths: list[int], heads: int, kv_heads: int, size: int, value_size: int | None = None
    ) -> Sequences:
        generator = torch.Generator().manual_seed(5)
        return cls(
            [torch.randn(n, heads, size, generator=generator) for n in lengths],
            [torch.randn(n, kv_heads, size, generator=generator) for n in lengths],
            [torch.randn(n, kv_heads, value_size or size, generator=generator) for n in lengths],
        )

    def attend(
        self,
        query_lens: list[int],
        *,
        dtype: torch.dtype,
        block_size: int = 16,
        transposed: bool = False,
        seed: int = 0,
        key_ends: list[Tensor] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Page the keys and values among NaN, then attend with the last queries of each sequence."""
        seq_lens = [len(keys) for keys in self.keys]
        width = -(-max(seq_lens) // block_size)
        kv_heads, size = self.keys[0].shape[1:]
        shape = (len(seq_lens) * width + 3, kv_heads, block_size)
        key_cache = torch.full((*shape, size), torch.nan).to(dtype)
        if transposed:
            key_cache = transpose_memory(key_cache)
        value_cache = torch.full((*shape, self.values[0].shape[-1]), torch.nan).to(dtype)
        whole = metadata_of(seq_lens, seq_lens, block_size, seed)
        KERNELS.store_kv(
            torch.cat(self.keys), torch.cat(self.values), key_cache, value_cache, whole.slot_mapping
        )
        metadata = metadata_of(query_lens, seq_lens, block_size, seed)
        if key_ends is not None:
            ends = torch.cat([end[len(end) - n :] for end, n in zip(key_ends, query_lens, strict=True)])
            metadata = dataclasses.replace(metadata, key_ends=ends)
        query = torch.cat([q[len(q) - n :] for q, n in zip(self.queries, query_lens, strict=True)])
        out = KERNELS.paged_attention(
            query, key_cache, value_cache, metadata, AttentionOptions(size**-0.5, **options)
        )
        return list(out.split(query_lens))

    def expected(
        self,
        query_lens: list[int],
        *,
        dtype: torch.dtype,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        key_ends: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Compute the attention of `attend` in float64, one sequence at a time."""
        results = []
        ends = key_ends or [torch.arange(1, len(k) + 1) for k in self.keys]
        for q, k, v, end, count in zip(self.queries, self.keys, self.values, ends, query_lens, strict=True):
            group = q.shape[1] // k.shape[1]
            keys = k.to(dtype).double().repeat_interleave(group, dim=1)
            values = v.to(dtype).double().repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[len(q) - count :].double(), keys) * q.shape[-1] ** -0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            positions = torch.arange(len(k))
            distance = positions[len(k) - count :, None] - positions[None]
            hidden = positions[None] >= end[len(k) - count :, None]
            if sliding_window is not None:
                hidden |= distance >= sliding_window
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, count, 1)), dim=-1)
            weights = scores.softmax(-1)[..., : len(k)]
            results.append(torch.einsum("hqk,khd->qhd", weights, values))
        return results


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.isfinite().all()
        error = ((got.double() - want).abs() / (want.abs() + want.square().mean().sqrt())).max()
        assert error < tolerance, f"relative error {error:.2e}"


@quick
@given(data=st.data(), dtype=st.sampled_from(DTYPES), block_size=st.sampled_from([1, 5, 16, 32, 128]))
def test_attention_is_softmax_over_the_visible_positions(
    data: st.DataObject, dtype: torch.dtype, block_size: int
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    query_lens = [data.draw(st.integers(1, length)) for length in lengths]
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    sequences = Sequences.draw(
        lengths, kv_heads * group, kv_heads, data.draw(st.sampled_from([1, 32, 40, 64, 80]))
    )
    window = data.draw(st.none() | st.integers(1, 200))
    transposed = block_size % 16 == 0 and data.draw(st.booleans())
    actual = sequences.attend(
        query_lens, dtype=dtype, block_size=block_size, transposed=transposed, sliding_window=window
    )
    assert_close(actual, sequences.expected(query_lens, dtype=dtype, sliding_window=window))


@quick
@given(data=st.data(), window=st.none() | st.integers(1, 200))
def test_tokens_of_a_block_attend_to_each_other(data: st.DataObject, window: int | None) -> None:
    lengths = data.draw(st.lists(st.integers(2, 300), min_size=1, max_size=3))
    group = data.draw(st.integers(1, 7))
    sequences = Sequences.draw(lengths, 2 * group, 2, 64)
    key_ends, query_lens = [], []
    for length in lengths:
        start = data.draw(st.integers(0, length - 1))
        stop = data.draw(st.integers(start + 1, length))
        ends = torch.arange(1, length + 1, dtype=torch.int32)
        ends[start:stop] = stop
        key_ends.append(ends)
        query_lens.append(data.draw(st.integers(1, length)))
    options: dict[str, Any] = {"dtype": torch.float32, "sliding_window": window, "key_ends": key_ends}
    actual = sequences.attend(query_lens, **options)
    assert_close(actual, sequences.expected(query_lens, **options))
    whole = sequences.attend(lengths, **options)
    assert all(
        torch.equal(part, rows[len(rows) - count :])
        for part, rows, count in zip(actual, whole, query_lens, strict=True)
    )


@pytest.mark.parametrize("size", [32, 64, 96, 128, 192, 256])
def test_head_sizes(size: int) -> None:
    sequences = Sequences.draw([150, 20], 4, 2, size)
    actual = sequences.attend([3, 20], dtype=torch.bfloat16)
    assert_close(actual, sequences.expected([3, 20], dtype=torch.bfloat16))


def test_values_may_be_narrower_than_keys() -> None:
    sequences = Sequences.draw([150], 4, 1, 96, value_size=72)
    assert_close(sequences.attend([5], dtype=torch.float32), sequences.expected([5], dtype=torch.float32))


def test_softcap_bounds_the_scores() -> None:
    sequences = Sequences.draw([140, 9], 6, 2, 64)
    sequences.queries = [q * 20 for q in sequences.queries]
    actual = sequences.attend([4, 9], dtype=torch.float32, softcap=30.0)
    assert_close(actual, sequences.expected([4, 9], dtype=torch.float32, softcap=30.0), 3e-5)


def test_sinks_join_the_denominator_only() -> None:
    sequences = Sequences.draw([140, 9], 6, 2, 64)
    sinks = torch.tensor([0.0, 5.0, -5.0, 40.0, -torch.inf, 1.0])
    actual = sequences.attend([4, 9], dtype=torch.float32, sinks=sinks)
    assert_close(actual, sequences.expected([4, 9], dtype=torch.float32, sinks=sinks))


@quick
@given(data=st.data(), dtype=st.sampled_from(DTYPES), window=st.none() | st.integers(1, 200))
def test_a_query_has_the_same_bits_whatever_surrounds_it(
    data: st.DataObject, dtype: torch.dtype, window: int | None
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=5))
    group = data.draw(st.integers(1, 7))
    sequences = Sequences.draw(lengths, 2 * group, 2, 64)
    whole = sequences.attend(lengths, dtype=dtype, sliding_window=window)
    for index, length in enumerate(lengths):
        alone = Sequences([sequences.queries[index]], [sequences.keys[index]], [sequences.values[index]])
        count = data.draw(st.integers(1, length))
        block_size = data.draw(st.sampled_from([4, 16, 32, 128]))
        with threads(data.draw(st.sampled_from([1, 2, 3]))):
            result = alone.attend(
                [count],
                dtype=dtype,
                block_size=block_size,
                transposed=block_size != 4 and data.draw(st.booleans()),
                seed=data.draw(st.integers(0, 9)),
                sliding_window=window,
            )[0]
        assert torch.equal(result, whole[index][length - count :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", range(1, 8))
def test_transposed_keys_give_the_same_bits(dtype: torch.dtype, heads: int) -> None:
    """Decoded rows read keys in place, at every number of heads that a tile takes; longer chunks copy them."""
    sequences = Sequences.draw([1, 17, 130, 300], heads, 1, 40)
    for counts in ([1, 1, 1, 1], [1, 9, 40, 3]):
        rows = sequences.attend(counts, dtype=dtype)
        for block_size in (16, 64):
            transposed = sequences.attend(counts, dtype=dtype, block_size=block_size, transposed=True)
            assert all(map(torch.equal, transposed, rows))


def test_keys_are_transposed_in_whole_vectors_and_values_never() -> None:
    keys, values = torch.zeros(2, 1, 8, 4), torch.zeros(2, 1, 8, 4)
    key, slots = torch.zeros(1, 1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiple of 16"):
        KERNELS.store_kv(key, key, transpose_memory(keys), values, slots)
    with pytest.raises(ValueError, match="must be contiguous"):
        KERNELS.store_kv(key, key, keys, transpose_memory(values), slots)


def test_a_long_sequence_divided_among_threads_has_the_same_bits() -> None:
    sequences = Sequences.draw([2000], 3, 1, 64)
    with threads(1):
        alone = sequences.attend([2], dtype=torch.bfloat16)[0]
    for count in (2, 4):
        with threads(count):
            assert torch.equal(sequences.attend([2], dtype=torch.bfloat16)[0], alone)


def test_an_infinite_later_token_does_not_reach_earlier_rows() -> None:
    sequences = Sequences.draw([40], 2, 1, 64)
    clean = sequences.attend([40], dtype=torch.float32)[0]
    sequences.values[0][30] = torch.inf
    spoiled = sequences.attend([40], dtype=torch.float32)[0]
    assert torch.equal(clean[:30], spoiled[:30])
    assert not spoiled[30:].isfinite().any()


def run_chunks(
    kernels: CpuKernels,
    layers: Sequence[DecoderLayerWeights],
    hidden: Tensor,
    chunks: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Run one sequence through the layers, chunk by chunk."""
    caches = [torch.zeros(9, KV_HEADS, 32, SIZE, dtype=dtype) for _ in range(2 * len(layers))]
    caches[::2] = map(transpose_memory, caches[::2])
    bound = kernels.bind_layers(layers, caches[::2], caches[1::2])
    rows, done = [], 0
    for chunk in chunks:
        metadata = metadata_of([chunk], [done + chunk], 32)
        # Every chunk uses the same blocks, however long the sequence is so far.
        blocks = torch.tensor([[3, 1, 7, 0, 8, 5]], dtype=torch.int32)
        slots = [int(blocks[0, p // 32]) * 32 + p % 32 for p in range(done, done + chunk)]
        metadata = dataclasses.replace(metadata, block_tables=blocks, slot_mapping=torch.tensor(slots))
        cos, sin = tables(torch.arange(done, done + chunk))
        rows.append(bound(hidden[done : done + chunk], cos, sin, metadata))
        done += chunk
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joined", [False, True], ids=["causal", "joined"])
@pytest.mark.parametrize(
    "features",
    [{}, {"qk_norm": True, "bias": True}, {"gemma": True, "qk_norm": True}, {"sinks": torch.arange(6.0)}],
    ids=["llama", "qwen", "gemma", "sinks"],
)
def test_a_layer_in_one_call_equals_its_operations_one_by_one(
    dtype: torch.dtype, features: dict[str, Any], *, joined: bool
) -> None:
    layer = layer_of(KERNELS, dtype, **features)
    metadata = metadata_of([7, 1, 20], [7, 33, 41], 16)
    if joined:  # tokens 2 to 5 of the first sequence and 30 to 39 of the last attend to each other
        ends = torch.cat([torch.arange(1, 8), torch.tensor([33]), torch.arange(22, 42)]).to(torch.int32)
        ends[2:6], ends[17:27] = 6, 40
        metadata = dataclasses.replace(metadata, key_ends=ends)
    shape = (int(metadata.block_tables.max()) + 1, KV_HEADS, 16, SIZE)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(28, HIDDEN, generator=generator)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    cos, sin = tables(torch.arange(28))
    expected_keys, expected_values = keys.clone(), values.clone()
    composed = ComposedLayers(KERNELS, [layer], [expected_keys], [expected_values])
    expected = composed(hidden, cos, sin, metadata)
    before = hidden.clone()
    actual = KERNELS.bind_layers([layer], [keys], [values])(hidden, cos, sin, metadata)
    assert torch.equal(actual, expected)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_give_the_same_bits_in_chunks_of_any_size(
    exact: bool, dtype: torch.dtype, *, gemma: bool
) -> None:
    layers = [layer_of(KERNELS, dtype, exact=exact, gemma=gemma) for _ in range(3)]
    hidden = torch.randn(150, HIDDEN, generator=torch.Generator().manual_seed(2))
    whole = run_chunks(KERNELS, layers, hidden, [150], dtype)
    for chunks in ([1] * 150, [7] * 21 + [3], [100, 50], [149, 1]):
        assert torch.equal(run_chunks(KERNELS, layers, hidden, chunks, dtype), whole)
    with threads(1):
        assert torch.equal(run_chunks(KERNELS, layers, hidden, [64, 64, 22], dtype), whole)
    assert whole.isfinite().all()


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
def test_layers_in_one_call_equal_layers_one_by_one(*, gemma: bool) -> None:
    layers = [layer_of(KERNELS, torch.bfloat16, gemma=gemma) for _ in range(2)]
    metadata = metadata_of([5, 1], [5, 9], 16)
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(2))
    cos, sin = tables(torch.tensor([0, 1, 2, 3, 4, 8]))
    blocks = int(metadata.block_tables.max()) + 1
    caches = [torch.zeros(blocks, KV_HEADS, 16, SIZE, dtype=torch.bfloat16) for _ in range(4)]
    together = KERNELS.bind_layers(layers, caches[::2], caches[1::2])(hidden, cos, sin, metadata)
    for layer, keys, values in zip(layers, caches[::2], caches[1::2], strict=True):
        hidden = KERNELS.bind_layers([layer], [keys], [values])(hidden, cos, sin, metadata)
    assert torch.equal(together, hidden)


@pytest.mark.parametrize("features", [{}, {"gemma": True, "qk_norm": True}], ids=["llama", "gemma"])
def test_a_layer_is_that_of_the_reference_in_float64(features: dict[str, Any]) -> None:
    """Tolerance: 5e-6 of the root mean square, for float32 sums over up to 192 products in three steps."""
    metadata = metadata_of([7, 1, 20], [7, 33, 41], 16)
    shape = (int(metadata.block_tables.max()) + 1, KV_HEADS, 16, SIZE)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(28, HIDDEN, generator=generator)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    cos, sin = tables(torch.arange(28))
    reference = ReferenceKernels()
    layer = layer_of(reference, torch.float64, **features)
    expected = reference.bind_layers([layer], [keys.double()], [values.double()])(
        hidden.double(), cos.double(), sin.double(), metadata
    )
    layer = layer_of(KERNELS, torch.float32, exact=True, **features)
    actual = KERNELS.bind_layers([layer], [keys], [values])(hidden, cos, sin, metadata)
    assert_close([actual], [expected], 5e-6)
