"""Triton's linear layer against float64, and its rows against themselves in other batches.

Runs on a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from logitkernels.triton import matmul as module
from logitkernels.triton.matmul import Tile, matmul, tile_for

pytestmark = pytest.mark.interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
"""Tolerance relative to the result. Triton's interpreter truncates to bfloat16."""
ACCUMULATION = 1e-6
"""Tolerance relative to the sum of the magnitudes that are added in float32."""
DTYPES = list(ROUNDING)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_is_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = ROUNDING[actual.dtype] * exact.abs() + ACCUMULATION * magnitude
    assert actual.shape == exact.shape
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [(1, 1, 1), (5, 123, 123), (3, 130, 528), (66, 7, 601), (2, 2050, 48), (65, 48, 528), (1, 16, 1040)],
)
def test_product_and_bias_follow_float64(tokens: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = normal(tokens, k, dtype=dtype), normal(n, k, dtype=dtype, seed=1)
    assert_is_product(matmul(x, weight), x, weight)
    for bias in (normal(n, dtype=dtype, seed=2), normal(n, seed=2)):
        actual = matmul(x, weight, bias)
        assert actual.dtype == dtype
        assert_is_product(actual, x, weight, bias)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 80), st.integers(1, 140), st.integers(1, 600), st.sampled_from(DTYPES))
def test_product_of_strided_rows_of_any_shape_follows_float64(
    tokens: int, n: int, k: int, dtype: torch.dtype
) -> None:
    x, weight = normal(tokens, k + 3, dtype=dtype)[:, 2:-1], normal(n, k + 5, dtype=dtype, seed=1)[:, :k]
    assert_is_product(matmul(x, weight), x, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(70, 528), (20, 301)])
def test_a_row_has_the_same_bits_alone_and_anywhere_among_others(n: int, k: int, dtype: torch.dtype) -> None:
    weight, bias, row = normal(n, k, dtype=dtype), normal(n, seed=1), normal(1, k, dtype=dtype, seed=2)
    alone = matmul(row, weight, bias)
    for tokens, places in ((1, [0]), (3, [0, 1]), (64, [17, 63]), (130, [2, 64, 129])):
        x = normal(tokens, k, dtype=dtype, seed=tokens)
        x[places] = row
        together = matmul(x, weight, bias)
        for place in places:
            assert torch.equal(together[place], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_k_in_one_program_have_the_bits_of_parts_in_many(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = normal(67, 600, dtype=dtype), normal(70, 600, dtype=dtype, seed=1), normal(70, seed=2)
    # A row of zeros times minus one, because the sign of a zero must not depend on the batch either.
    x[3], weight[5] = 0.0, -1.0
    tile = tile_for(70, 600, dtype)
    assert tile.split_k > 1
    spread = matmul(x, weight, bias * 0)
    monkeypatch.setattr(module, "tile_for", lambda *_: tile)
    monkeypatch.setattr(module, "PROGRAMS", 2)
    together = matmul(x, weight, bias * 0)
    assert torch.equal(together.view(torch.uint8), spread.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_stays_by_itself() -> None:
    x, weight = normal(9, 300), normal(33, 300, seed=1)
    clean = matmul(x, weight)
    x[4], x[7, 0] = torch.nan, torch.inf
    spoiled = matmul(x, weight)
    kept = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal(spoiled[kept], clean[kept])
    assert not spoiled[[4, 7]].isfinite().any()


def test_activations_of_another_dtype_are_rounded_to_the_weights_first() -> None:
    x, weight = normal(3, 64), normal(20, 64, dtype=torch.float16, seed=1)
    actual = matmul(x, weight)
    assert actual.dtype == torch.float32
    assert_is_product(actual, x.half(), weight)


def test_rows_past_two_to_the_31_elements_are_found() -> None:
    # The distance of two rows fits in 32 bits, but that of three does not.
    distance = 2**30 + 48
    x, weight = normal(3, 16, dtype=torch.float16), normal(3, 16, dtype=torch.float16, seed=1)
    spread = torch.empty(2 * distance + 16, dtype=torch.float16, device=DEVICE)
    spread = spread.as_strided((3, 16), (distance, 1))
    assert torch.equal(matmul(spread.copy_(x), weight), matmul(x, weight))
    assert torch.equal(matmul(x, spread.copy_(weight)), matmul(x, weight))


def test_no_tokens_give_no_rows() -> None:
    assert matmul(normal(0, 512), normal(7, 512)).shape == (0, 7)


@given(st.integers(1, 200_000), st.integers(1, 40_000), st.sampled_from(DTYPES))
def test_every_part_of_k_is_given_something_to_add(n: int, k: int, dtype: torch.dtype) -> None:
    tile: Tile = tile_for(n, k, dtype)
    steps = -(-k // tile.block_k)
    per_part = -(-steps // tile.split_k)
    assert (tile.split_k - 1) * per_part < steps <= tile.split_k * per_part
    assert tile.split_k <= module.MAX_SPLIT_K
