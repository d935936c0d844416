"""Reference operations against definitions in float64, one query and one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels import AttentionMetadata, AttentionOptions, ReferenceKernels

KERNELS = ReferenceKernels()


def paged(
    lengths: list[tuple[int, int]], *, kv_heads: int, dim: int, block_size: int
) -> tuple[AttentionMetadata, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Random keys and values of sequences of (query, total) lengths, scattered over shuffled blocks."""
    needed = [-(-total // block_size) for _, total in lengths]
    order = torch.randperm(sum(needed) + 3)
    tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    key_cache = torch.randn(sum(needed) + 3, kv_heads, block_size, dim, dtype=torch.float64)
    value_cache = torch.randn_like(key_cache)
    keys, values, slots, used = [], [], [], 0
    for row, ((query, total), blocks) in enumerate(zip(lengths, needed, strict=True)):
        table = order[used : used + blocks]
        used += blocks
        tables[row, :blocks] = table
        keys.append(key_cache[table].transpose(0, 1).flatten(1, 2)[:, :total])
        values.append(value_cache[table].transpose(0, 1).flatten(1, 2)[:, :total])
        slots += [
            int(table[p // block_size]) * block_size + p % block_size for p in range(total - query, total)
        ]
    starts = torch.tensor([0, *(query for query, _ in lengths)]).cumsum(0)
    metadata = AttentionMetadata(
        query_start=starts.to(torch.int32),
        seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
        max_query_len=max(query for query, _ in lengths),
        max_seq_len=max(total for _, total in lengths),
    )
    return metadata, key_cache, value_cache, keys, values


def one_query(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: float | None,
) -> torch.Tensor:
    """Compute attention of one query [D] over its visible keys [L, D], by the formula."""
    keys, values = (keys[-window:], values[-window:]) if window else (keys, values)
    scores = keys @ query * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp()
    return weights @ values / (weights.sum() + (math.exp(sink) if sink is not None else 0.0))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 50)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (9, 3)]),
    st.sampled_from([None, 1, 7, 33]),
    st.sampled_from([None, 5.0]),
    st.booleans(),
)
def test_attention_follows_its_formula(
    pieces: list[tuple[int, int]],
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    sinks: bool,
) -> None:
    """Compares float64 with float64, to 1e-10."""
    torch.manual_seed(len(pieces))
    num_heads, kv_heads = heads
    lengths = [(query, query + past) for query, past in pieces]
    metadata, key_cache, value_cache, keys, values = paged(lengths, kv_heads=kv_heads, dim=8, block_size=4)
    query = torch.randn(sum(q for q, _ in lengths), num_heads, 8, dtype=torch.float64)
    sink = torch.randn(num_heads, dtype=torch.float64) if sinks else None
    output = KERNELS.paged_attention(
        query, key_cache, value_cache, metadata, AttentionOptions(0.3, window, softcap, sink)
    )
    row = 0
    for sequence, (count, total) in enumerate(lengths):
        for position in range(total - count, total):
            for head in range(num_heads):
                kv_head = head // (num_heads // kv_heads)
                expected = one_query(
                    query[row, head],
                    keys[sequence][kv_head, : position + 1],
                    values[sequence][kv_head, : position + 1],
                    0.3,
                    window,
                    softcap,
                    None if sink is None else float(sink[head]),
                )
                torch.testing.assert_close(output[row, head], expected, rtol=1e-10, atol=1e-10)
            row += 1


def test_what_another_sequence_left_in_a_block_is_not_seen() -> None:
    lengths = [(1, 6), (3, 9), (70, 70)]
    metadata, key_cache, value_cache, _, _ = paged(lengths, kv_heads=2, dim=8, block_size=4)
    query = torch.randn(74, 4, 8, dtype=torch.float64)
    expected = KERNELS.paged_attention(query, key_cache, value_cache, metadata, AttentionOptions(0.3))
    for sequence, (_, total) in enumerate(lengths):
        last = metadata.block_tables[sequence, (total - 1) // 4]
        for cache in (key_cache, value_cache):
            cache[last, :, (total - 1) % 4 + 1 :] = torch.nan
    assert torch.equal(
        KERNELS.paged_attention(query, key_cache, value_cache, metadata, AttentionOptions(0.3)), expected
    )


def test_store_then_read_back_through_the_block_table() -> None:
    metadata, key_cache, value_cache, _, _ = paged([(5, 11), (1, 4)], kv_heads=2, dim=8, block_size=4)
    key, value = torch.randn(6, 2, 8, dtype=torch.float64), torch.randn(6, 2, 8, dtype=torch.float64)
    KERNELS.store_kv(key, value, key_cache, value_cache, metadata.slot_mapping)
    for token, slot in enumerate(metadata.slot_mapping.tolist()):
        assert torch.equal(key_cache[slot // 4, :, slot % 4], key[token])
        assert torch.equal(value_cache[slot // 4, :, slot % 4], value[token])


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rope_turns_pairs_and_passes_the_rest(rotary_dim: int) -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    half = rotary_dim // 2
    angle = torch.rand(3, half, dtype=torch.float64).repeat(1, 2)
    turned = KERNELS.rope(x, angle.cos(), angle.sin())
    pairs = torch.complex(x[..., :half], x[..., half:rotary_dim])
    expected = pairs * torch.polar(torch.ones(()).double(), angle[:, None, :half])
    torch.testing.assert_close(turned[..., :half], expected.real)
    torch.testing.assert_close(turned[..., half:rotary_dim], expected.imag)
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])


def test_the_largest_logits_come_in_order_with_ties_by_lower_id() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, -torch.inf, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    ids, values = KERNELS.top_k_logits(logits, 3)
    assert ids.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert values.tolist() == [[5.0, 5.0, 5.0], [0.0, 0.0, 0.0]]


def test_a_nan_is_larger_than_every_logit() -> None:
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, nan, inf, 2.0], [nan, 3.0, nan, nan], [nan] * 4, [1.0, 4.0, 4.0, 2.0]])
    ids, values = KERNELS.top_k_logits(logits, 2)
    assert ids.tolist() == [[1, 2], [0, 2], [0, 1], [1, 2]]
    assert values.isnan().tolist() == [[True, False], [True, True], [True, True], [False, False]]
    assert torch.equal(ids, torch.sort(logits, descending=True, stable=True).indices[:, :2])
