"""Linear layers on GGUF blocks as stored, against the dequantised weights in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels.cpu import CpuKernels, GgufType
from logitkernels.cpu.build import BuildError
from logitkernels.cpu.linear import STORED_BYTES
from torch import Tensor

try:
    KERNELS = CpuKernels()
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)


def blocks_of(gguf_type: GgufType, rows: int, depth: int) -> tuple[Tensor, Tensor]:
    """Random blocks, and the weights that they stand for in float64."""
    generator = np.random.default_rng(rows * 1000 + depth)
    raw = generator.integers(0, 256, (rows, depth // 32, STORED_BYTES[gguf_type]), dtype=np.uint8)
    scales = generator.normal(0, 0.05, (rows, depth // 32, 2)).astype(np.float16).view(np.uint8)
    header = 4 if gguf_type == GgufType.Q4_1 else 2
    raw[:, :, :header] = scales[:, :, :header]
    flat = raw.reshape(rows, -1)
    weights = dequantize(flat, GGMLQuantizationType(int(gguf_type)))
    return torch.from_numpy(flat), torch.from_numpy(weights.astype(np.float64))


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
    packed = KERNELS.pack_gguf(raw, (out, blocks * 32), gguf_type, bias, exact=exact)
    read = x if exact else x.bfloat16()
    expected = read.double() @ weights.T + (0 if bias is None else bias.double())
    error = (KERNELS.linear(x, packed) - expected).abs() / (
        expected.abs() + read.double().abs() @ weights.T.abs()
    )
    assert error.max() < 1e-6


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("gguf_type", GgufType)
def test_a_row_has_the_same_bits_in_every_batch(gguf_type: GgufType, *, exact: bool) -> None:
    raw, _ = blocks_of(gguf_type, 77, 96)
    packed = KERNELS.pack_gguf(raw, (77, 96), gguf_type, exact=exact)
    x = torch.randn(31, 96, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([KERNELS.linear(row[None], packed) for row in x])
    for size in (*range(2, 20), 31):
        for start in range(0, 31, size):
            assert torch.equal(KERNELS.linear(x[start : start + size], packed), alone[start : start + size])


def test_packed_weights_are_as_small_as_in_the_file() -> None:
    for gguf_type in GgufType:
        raw, _ = blocks_of(gguf_type, 64, 64)
        assert KERNELS.pack_gguf(raw, (64, 64), gguf_type).nbytes == raw.nbytes


def test_bytes_that_do_not_fit_are_refused() -> None:
    raw, _ = blocks_of(GgufType.Q4_1, 4, 64)
    with pytest.raises(ValueError, match="160 bytes"):
        KERNELS.pack_gguf(raw, (4, 96), GgufType.Q4_1)
    with pytest.raises(ValueError, match="multiple of 32"):
        KERNELS.pack_gguf(raw, (4, 40), GgufType.Q4_1)
    with pytest.raises(TypeError, match="uint8"):
        KERNELS.pack_gguf(raw.float(), (4, 64), GgufType.Q4_1)
    with pytest.raises(ValueError, match="bias"):
        KERNELS.pack_gguf(raw, (4, 64), GgufType.Q4_1, torch.zeros(3))
