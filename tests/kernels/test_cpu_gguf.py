"""Linear layers on GGUF blocks as stored, against the dequantised weights in float64.

Activations are rounded to 16-bit integers with a power of two for every 32. ``PORTABLE`` is the code of
processors without AVX-512; its products have the same bits.
"""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels import BlockWeight
from logitkernels.cpu import CpuKernels, GgufType
from logitkernels.cpu.errors import BuildError
from logitkernels.cpu.linear import STORED_BYTES, CpuLinear
from logitkernels.cpu.processor import TARGETS
from torch import Tensor

try:
    KERNELS = CpuKernels()
    PORTABLE = CpuKernels(target=TARGETS[platform.machine()][-1])
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)


def blocks_of(gguf_type: GgufType, rows: int, depth: int) -> tuple[Tensor, Tensor]:
    """Return random blocks and their weights in float64."""
    generator = np.random.default_rng(rows * 1000 + depth)
    raw = generator.integers(0, 256, (rows, depth // 32, STORED_BYTES[gguf_type]), dtype=np.uint8)
    scales = generator.normal(0, 0.05, (rows, depth // 32, 2)).astype(np.float16).view(np.uint8)
    header = 4 if gguf_type == GgufType.Q4_1 else 2
    raw[:, :, :header] = scales[:, :, :header]
    flat = raw.reshape(rows, -1)
    weights = dequantize(flat, GGMLQuantizationType(int(gguf_type)))
    return torch.from_numpy(flat), torch.from_numpy(weights.astype(np.float64))


def pack(
    raw: Tensor,
    shape: tuple[int, int],
    gguf_type: GgufType,
    bias: Tensor | None = None,
    *,
    kernels: CpuKernels = KERNELS,
    exact: bool = False,
) -> CpuLinear:
    return kernels.pack([BlockWeight("w", raw, gguf_type.name, shape)], bias, exact=exact)


def as_int16_blocks(x: Tensor) -> Tensor:
    """Round each 32 activations to integers below 32,640 times the smallest sufficient power of two, in float64."""
    blocks: Tensor = x.double().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest)
    scale = torch.exp2((exponent - 15).double())
    scale = torch.where((largest / scale).round() < 32640, scale, 2 * scale)
    return ((blocks / scale).round() * scale).flatten(-2)


def relative_error(output: Tensor, read: Tensor, weights: Tensor, bias: Tensor | None) -> float:
    """Return the largest error of ``read @ weights.T + bias``, relative to the sum of the added magnitudes."""
    expected = read.double() @ weights.T + (0 if bias is None else bias.double())
    magnitude = expected.abs() + read.double().abs() @ weights.T.abs()
    return ((output - expected).abs() / magnitude).max().item()


@settings(max_examples=40, deadline=None)
@given(
    gguf_type=st.sampled_from(GgufType),
    exact=st.booleans(),
    rows=st.integers(1, 30),
    out=st.integers(1, 80),
    blocks=st.integers(1, 6),
    has_bias=st.booleans(),
)
def test_products_are_those_of_the_dequantised_weights(
    gguf_type: GgufType, *, exact: bool, rows: int, out: int, blocks: int, has_bias: bool
) -> None:
    raw, weights = blocks_of(gguf_type, out, blocks * 32)
    x = torch.randn(rows, blocks * 32, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(out) if has_bias else None

    native, portable = (
        pack(raw, (out, blocks * 32), gguf_type, bias, kernels=kernels, exact=exact)(x)
        for kernels in (KERNELS, PORTABLE)
    )
    assert relative_error(native, x if exact else as_int16_blocks(x), weights, bias) < 1e-6
    assert torch.equal(native, portable)


@pytest.mark.parametrize(("outlier", "ratio"), [(1, 40), (30, 20)])
@pytest.mark.parametrize("gguf_type", GgufType)
def test_rounding_to_int16_is_far_finer_than_to_bfloat16(
    gguf_type: GgufType, outlier: float, ratio: float
) -> None:
    """Compares root mean square errors against unrounded activations, also with outliers in every other block."""
    raw, weights = blocks_of(gguf_type, 64, 256)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    x[:, ::64] *= outlier
    exact = x.double() @ weights.T
    error = (pack(raw, (64, 256), gguf_type)(x) - exact).pow(2).mean().sqrt()
    of_bfloat16 = (x.bfloat16().double() @ weights.T - exact).pow(2).mean().sqrt()
    assert error < of_bfloat16 / ratio


def test_the_largest_of_a_block_may_be_any_number() -> None:
    """Covers numbers around those that would round to 32,640 or more with the smaller of two scales."""
    raw, weights = blocks_of(GgufType.Q4_1, 40, 32)
    largest = torch.arange(32630, 32780, dtype=torch.float64)[:, None] + torch.tensor(
        [-0.5, -0.25, 0.0, 0.25]
    )
    x = torch.randn(largest.numel(), 32, generator=torch.Generator().manual_seed(1)) * 1000
    x[:, 5] = largest.flatten() * torch.tensor([1, -1]).repeat(largest.numel() // 2)
    out = pack(raw, (40, 32), GgufType.Q4_1)(x)
    assert relative_error(out, as_int16_blocks(x), weights, None) < 1e-6


@pytest.mark.parametrize("gguf_type", GgufType)
@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-37, 1e-20, 1e30, 1e34])
def test_activations_of_any_magnitude_are_multiplied(gguf_type: GgufType, magnitude: float) -> None:
    """An error of 1e-38 of an activation is allowed."""
    raw, weights = blocks_of(gguf_type, 40, 64)
    x = torch.rand(3, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[:, 0] = 1
    x = (x.double() * magnitude).float()
    out = pack(raw, (40, 64), gguf_type)(x).double()
    error = (out - as_int16_blocks(x) @ weights.T).abs()
    assert (error <= (1e-6 * x.double().abs() + 1e-38) @ weights.T.abs()).all()


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others(*, exact: bool, bad: float) -> None:
    raw, _ = blocks_of(GgufType.Q4_1, 40, 64)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    for kernels in (KERNELS, PORTABLE):
        linear = pack(raw, (40, 64), GgufType.Q4_1, kernels=kernels, exact=exact)
        for rows in (2, 9):
            clean, spoilt = x[:rows], x[:rows].clone()
            spoilt[1, 40] = bad
            out = linear(spoilt)
            assert not out[1].isfinite().any()
            rest = [row for row in range(rows) if row != 1]
            assert torch.equal(out[rest], linear(clean)[rest])


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("gguf_type", GgufType)
def test_a_row_has_the_same_bits_in_every_batch(gguf_type: GgufType, *, exact: bool) -> None:
    raw, _ = blocks_of(gguf_type, 77, 96)
    x = torch.randn(31, 96, generator=torch.Generator().manual_seed(1))
    for kernels in (KERNELS, PORTABLE):
        linear = pack(raw, (77, 96), gguf_type, kernels=kernels, exact=exact)
        alone = torch.cat([linear(row[None]) for row in x])
        for size in (*range(2, 20), 31):
            for start in range(0, 31, size):
                rows = slice(start, start + size)
                assert torch.equal(linear(x[rows]), alone[rows])


def test_packed_weights_are_as_small_as_in_the_file() -> None:
    for gguf_type in GgufType:
        raw, _ = blocks_of(gguf_type, 64, 64)
        assert pack(raw, (64, 64), gguf_type).nbytes == raw.nbytes


def test_bytes_that_do_not_fit_are_refused() -> None:
    raw, _ = blocks_of(GgufType.Q4_1, 4, 64)
    with pytest.raises(ValueError, match="160 bytes"):
        pack(raw, (4, 96), GgufType.Q4_1)
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(raw, (4, 40), GgufType.Q4_1)
    with pytest.raises(TypeError, match="uint8"):
        pack(raw.float(), (4, 64), GgufType.Q4_1)
    with pytest.raises(ValueError, match="bias"):
        pack(raw, (4, 64), GgufType.Q4_1, torch.zeros(3))
