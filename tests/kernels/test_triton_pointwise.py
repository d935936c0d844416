"""Triton's norms, gated activations and cache writes against ReferenceKernels in float64.

Runs on a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels import ReferenceKernels
from torch import Tensor

pytest.importorskip("triton")

from logitkernels.triton.activations import gelu_and_mul, silu_and_mul
from logitkernels.triton.rms_norm import add_rms_norm, rms_norm
from logitkernels.triton.store_kv import rope_and_store, store_kv

REFERENCE = ReferenceKernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
"""Tolerance relative to a row's largest value: one rounding of the result.

Triton's interpreter truncates to bfloat16.
"""
DTYPES = list(TOLERANCE)
EPS = 1e-5
FAR = 2**30 + 40
"""Distance in elements that fits in 32 bits, while its double does not."""


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_rows_close(actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
    scale = expected.abs().amax(-1, keepdim=True)
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= roundings * TOLERANCE[actual.dtype] * scale).all()


def far_rows(rows: Tensor) -> Tensor:
    """Return three rows FAR elements apart. The memory is reserved, but touched only at the rows."""
    spread = torch.empty((len(rows) - 1) * FAR + rows[0].numel(), dtype=rows.dtype, device=DEVICE)
    spread = spread.as_strided(rows.shape, (FAR, *rows.stride()[1:]))
    return spread.copy_(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n"), [(1, 5), (5, 123), (123, 576), (1, 4096), (3, 16384)])
def test_rms_norm_follows_its_formula(tokens: int, n: int, dtype: torch.dtype) -> None:
    x, weight = normal(tokens, n, dtype=dtype) * 3, normal(n, seed=1)
    expected = REFERENCE.rms_norm(x.double(), weight, EPS)
    for result in DTYPES:
        actual = rms_norm(x, weight, EPS, result)
        assert actual.dtype == result
        assert_rows_close(actual, expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 7, 12]), st.integers(1, 140), st.sampled_from(DTYPES))
def test_rms_norm_of_heads_reads_them_from_their_packed_row(
    tokens: int, heads: int, size: int, dtype: torch.dtype
) -> None:
    packed, weight = normal(tokens, (heads + 4) * size, dtype=dtype), normal(size, seed=1, dtype=dtype)
    x = packed[:, size : (heads + 1) * size].unflatten(1, (heads, size))
    assert_rows_close(rms_norm(x, weight, EPS, dtype), REFERENCE.rms_norm(x.double(), weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "n"), [(1, 123), (5, 576), (2, 5000)])
def test_add_rms_norm_gives_the_sum_and_the_norm_of_the_sum_as_stored(
    tokens: int, n: int, residual_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    residual, x, weight = (
        normal(tokens, n, dtype=residual_dtype),
        normal(tokens, n, dtype=dtype, seed=1),
        normal(n),
    )
    total, normed = add_rms_norm(residual, x, weight, EPS, dtype)
    expected = residual + x.to(residual_dtype)
    assert total.dtype == residual_dtype
    assert torch.equal(total, expected)
    assert normed.dtype == dtype
    assert_rows_close(normed, REFERENCE.rms_norm(expected.double(), weight, EPS))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("n", [5, 123, 576])
def test_a_normed_row_has_the_same_bits_alone_and_beside_rows_that_are_not_finite(n: int) -> None:
    x, residual, weight = normal(20, n, dtype=torch.bfloat16), normal(20, n, seed=1), normal(n, seed=2)
    x[3], x[11, 0] = torch.nan, torch.inf
    normed = rms_norm(x, weight, EPS, torch.float32)
    total, added = add_rms_norm(residual, x, weight, EPS, torch.float32)
    for row in (0, 2, 4, 12, 19):
        one = slice(row, row + 1)
        assert normed[one].isfinite().all()
        assert torch.equal(rms_norm(x[one], weight, EPS, torch.float32), normed[one])
        alone = add_rms_norm(residual[one], x[one], weight, EPS, torch.float32)
        assert torch.equal(alone[0], total[one])
        assert torch.equal(alone[1], added[one])
    assert normed[3].isnan().all()
    assert added[3].isnan().all()
    assert added[11, 0].isnan()


def exact_activation(gate_up: Tensor, *, gelu: bool) -> Tensor:
    wide = gate_up.double()
    return REFERENCE.gelu_and_mul(wide) if gelu else REFERENCE.silu_and_mul(wide)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 5), (5, 123), (123, 576), (2, 3001)])
def test_gated_activations_follow_their_formulas(
    tokens: int, size: int, dtype: torch.dtype, *, gelu: bool
) -> None:
    gate_up = normal(tokens, 2 * size + 3, dtype=dtype)[:, : 2 * size] * 3
    actual = gelu_and_mul(gate_up) if gelu else silu_and_mul(gate_up)
    assert actual.dtype == dtype
    assert_rows_close(actual, exact_activation(gate_up, gelu=gelu))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_neither_overflow_nor_become_nan(dtype: torch.dtype, *, gelu: bool) -> None:
    largest = torch.finfo(dtype).max
    gate = torch.tensor([-largest, -3e4, -200.0, -89.0, -0.0, 0.0, 89.0, 200.0, 3e4, largest, torch.inf])
    gate_up = torch.stack((gate, torch.ones_like(gate)), dim=1).to(dtype).to(DEVICE)
    actual = gelu_and_mul(gate_up) if gelu else silu_and_mul(gate_up)
    expected = exact_activation(gate_up, gelu=gelu).to(dtype)
    # The remainder of a gate of -89 is below the smallest normal number, which float32 keeps to 1e-38.
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=1e-37)


def caches(blocks: int, kv_heads: int, block_size: int, *sizes: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.full((blocks, kv_heads, block_size, size), -7.0, dtype=dtype, device=DEVICE) for size in sizes
    ]


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kv_heads", "sizes"), [(1, (5, 8)), (7, (80, 96)), (12, (192, 128))])
def test_keys_and_values_go_to_their_slots_and_nowhere_else(
    kv_heads: int, sizes: tuple[int, int], cache_dtype: torch.dtype
) -> None:
    packed = normal(5, kv_heads * sum(sizes) + 2)
    key = packed[:, 2 : 2 + kv_heads * sizes[0]].unflatten(1, (kv_heads, sizes[0]))
    value = packed[:, 2 + kv_heads * sizes[0] :].unflatten(1, (kv_heads, sizes[1]))
    slots = torch.tensor([3, -1, 12, 0, -5], device=DEVICE)
    stored = caches(3, kv_heads, 5, *sizes, dtype=cache_dtype)
    expected = caches(3, kv_heads, 5, *sizes, dtype=cache_dtype)
    store_kv(key, value, stored[0], stored[1], slots)
    REFERENCE.store_kv(key, value, expected[0], expected[1], slots)
    assert torch.equal(stored[0], expected[0])
    assert torch.equal(stored[1], expected[1])


def packed_heads(
    tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    packed = normal(tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    query, key, value = packed.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    return (
        query.unflatten(1, (heads, size)),
        key.unflatten(1, (kv_heads, size)),
        value.unflatten(1, (kv_heads, size)),
    )


def angles(tokens: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    angle = normal(tokens, rotary_dim // 2, seed=4).repeat(1, 2) * 9
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "size", "rotary_dim"),
    [(1, 7, 1, 64, 64), (5, 40, 20, 80, 80), (3, 6, 2, 96, 32), (2, 3, 3, 256, 64), (4, 9, 3, 6, 4)],
)
def test_rope_and_store_norms_turns_and_stores_packed_heads(
    tokens: int, heads: int, kv_heads: int, size: int, rotary_dim: int, dtype: torch.dtype, *, normed: bool
) -> None:
    query, key, value = packed_heads(tokens, heads, kv_heads, size, dtype)
    cos, sin = angles(tokens, rotary_dim)
    slots = torch.tensor([9, 0, 5, 14, 3][:tokens], device=DEVICE)
    q_norm, k_norm = (normal(size, seed=seed) if normed else None for seed in (2, 3))
    key_cache, value_cache = caches(3, kv_heads, 5, size, size, dtype=dtype)
    turned = rope_and_store(
        query, key, value, cos, sin, key_cache, value_cache, slots, q_norm=q_norm, k_norm=k_norm, eps=EPS
    )
    expected_keys, expected_values = caches(3, kv_heads, 5, size, size, dtype=torch.float64)
    wide_query, wide_key = query.double(), key.double()
    if q_norm is not None and k_norm is not None:
        wide_query = REFERENCE.rms_norm(wide_query, q_norm, EPS).to(dtype).double()
        wide_key = REFERENCE.rms_norm(wide_key, k_norm, EPS).to(dtype).double()
    expected = REFERENCE.rope_and_store(
        wide_query, wide_key, value.double(), cos, sin, expected_keys, expected_values, slots
    )
    assert turned.is_contiguous()
    assert turned.dtype == dtype
    # A normed value may lie where float32 and float64 round to different neighbours.
    assert_rows_close(turned, expected, roundings=2)
    assert_rows_close(key_cache, expected_keys, roundings=2)
    assert torch.equal(value_cache.double(), expected_values)


@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_a_norm_within_rope_and_store_rounds_as_a_norm_before_it(rotary_dim: int) -> None:
    # Squares of small integers add up exactly in any order, so that only the rounding can differ.
    query, key, value = (x.mul(4).round() for x in packed_heads(6, 5, 2, 64, torch.bfloat16))
    cos, sin = angles(6, rotary_dim)
    q_norm, k_norm = normal(64, seed=2), normal(64, seed=3)
    slots = torch.arange(6, device=DEVICE)
    within, before = (caches(2, 2, 4, 64, 64, dtype=torch.bfloat16) for _ in range(2))
    turned = rope_and_store(
        query, key, value, cos, sin, within[0], within[1], slots, q_norm=q_norm, k_norm=k_norm, eps=EPS
    )
    query, key = (rms_norm(x, weight, EPS, torch.bfloat16) for x, weight in ((query, q_norm), (key, k_norm)))
    assert torch.equal(turned, rope_and_store(query, key, value, cos, sin, before[0], before[1], slots))
    assert torch.equal(within[0], before[0])


def test_padding_stores_nothing_and_leaves_the_other_tokens_their_bits() -> None:
    query, key, value = packed_heads(4, 7, 2, 80, torch.bfloat16)
    query[2], key[2], value[2] = torch.nan, torch.inf, torch.nan
    cos, sin = angles(4, 80)
    weight = normal(80, seed=2)
    slots = torch.tensor([4, 1, -1, 6], device=DEVICE)
    together, alone = (caches(2, 2, 4, 80, 80, dtype=torch.bfloat16) for _ in range(2))
    turned = rope_and_store(
        query, key, value, cos, sin, together[0], together[1], slots, q_norm=weight, k_norm=weight, eps=EPS
    )
    for token in (0, 1, 3):
        one = slice(token, token + 1)
        single = rope_and_store(
            query[one],
            key[one],
            value[one],
            cos[one],
            sin[one],
            alone[0],
            alone[1],
            slots[one],
            q_norm=weight,
            k_norm=weight,
            eps=EPS,
        )
        assert torch.equal(single, turned[one])
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])


def test_no_tokens_launch_nothing() -> None:
    empty = normal(0, 8)
    assert rms_norm(empty, normal(8), EPS, torch.float32).shape == (0, 8)
    assert silu_and_mul(empty).shape == (0, 4)


def test_rows_past_two_to_the_31_elements_are_found() -> None:
    rows, weight = normal(3, 16, dtype=torch.bfloat16), normal(16)
    far = far_rows(rows)
    assert torch.equal(rms_norm(far, weight, EPS, torch.float32), rms_norm(rows, weight, EPS, torch.float32))
    for actual, expected in zip(
        add_rms_norm(far, far, weight, EPS, torch.float32),
        add_rms_norm(rows, rows, weight, EPS, torch.float32),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    assert torch.equal(silu_and_mul(far), silu_and_mul(rows))


def test_heads_and_cache_blocks_past_two_to_the_31_elements_are_found() -> None:
    heads = normal(3, 3, 16, dtype=torch.bfloat16)
    far_heads = far_rows(heads)
    cos, sin = angles(3, 16)
    slots = torch.tensor([3, 6, 9], device=DEVICE)
    near = caches(3, 3, 4, 16, 16, dtype=torch.bfloat16)
    far = far_rows(near[0])
    turned = rope_and_store(heads, heads, heads, cos, sin, near[0], near[1], slots)
    assert torch.equal(rope_and_store(far_heads, far_heads, far_heads, cos, sin, far, near[1], slots), turned)
    assert torch.equal(far, near[0])
    store_kv(heads, heads, near[1], near[1], slots)
    store_kv(far_heads, far_heads, far, far, slots)
    assert torch.equal(far[0, :, 3], near[1][0, :, 3])
    assert torch.equal(far[1, :, 2], near[1][1, :, 2])
    assert torch.equal(far[2, :, 1], near[1][2, :, 1])


def test_gelu_is_the_tanh_approximation() -> None:
    value = gelu_and_mul(torch.tensor([[1.5, 2.0]], device=DEVICE)).item()
    inner = math.sqrt(2 / math.pi) * (1.5 + 0.044715 * 1.5**3)
    assert value == pytest.approx(1.5 * (1 + math.tanh(inner)), rel=1e-6)
