"""Linear layers on blocks as stored, of GGUF files and our own, against the dequantised weights in float64.

Activations are rounded to 16-bit integers with a power of two for every 32. ``PORTABLE`` is the code of
processors without AVX-512; its products have the same bits.
"""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels import BlockWeight, DenseWeight, ReferenceKernels, Weight
from logitkernels.cpu import CpuKernels, GgufType, Int4Type
from logitkernels.cpu.errors import BuildError
from logitkernels.cpu.linear import STORED, CpuLinear
from logitkernels.cpu.processor import TARGETS
from random_blocks import FLOAT16_AT, dequantized, random_blocks
from torch import Tensor

try:
    KERNELS = CpuKernels()
    PORTABLE = CpuKernels(target=TARGETS[platform.machine()][-1])
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)


BlockType = GgufType | Int4Type
BLOCK_TYPES: list[BlockType] = [*GgufType, *Int4Type]


def random(block_type: BlockType, rows: int, blocks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random weights of as many blocks or superblocks along K, and their values in float64."""
    return random_blocks(block_type.name, rows, blocks * STORED[block_type][0], seed=seed)


def pack(
    raw: Tensor,
    block_type: BlockType,
    bias: Tensor | None = None,
    *,
    kernels: CpuKernels = KERNELS,
    exact: bool = False,
) -> CpuLinear:
    block, size = STORED[block_type]
    weight = BlockWeight("w", raw, block_type.name, (raw.shape[0], raw.shape[1] // size * block))
    return kernels.pack([weight], bias, exact=exact)


def as_int16_blocks(x: Tensor) -> Tensor:
    """Round each 32 activations to integers below 32,640 times the smallest sufficient power of two, in float64."""
    blocks: Tensor = x.double().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    _, exponent = torch.frexp(largest)
    scale = torch.exp2((exponent - 15).double())
    scale = torch.where((largest / scale).round() < 32640, scale, 2 * scale)
    return ((blocks / scale).round() * scale).flatten(-2)


MINIMA = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}


def relative_error(output: Tensor, read: Tensor, weights: Tensor, bias: Tensor | None) -> float:
    """Return the largest error of ``read @ weights.T + bias``, relative to the sum of the added magnitudes."""
    expected = read.double() @ weights.T + (0 if bias is None else bias.double())
    magnitude = expected.abs() + read.double().abs() @ weights.T.abs()
    return ((output - expected).abs() / magnitude.clamp_min(1e-30)).max().item()


@settings(max_examples=100, deadline=None)
@given(
    block_type=st.sampled_from(BLOCK_TYPES),
    exact=st.booleans(),
    rows=st.integers(1, 30),
    out=st.integers(1, 80),
    blocks=st.integers(1, 6),
    has_bias=st.booleans(),
)
def test_products_are_those_of_the_dequantised_weights(
    block_type: BlockType, *, exact: bool, rows: int, out: int, blocks: int, has_bias: bool
) -> None:
    raw, weights = random(block_type, out, blocks)
    x = torch.randn(rows, weights.shape[1], generator=torch.Generator().manual_seed(1))
    bias = torch.randn(out) if has_bias else None

    native, portable = (
        pack(raw, block_type, bias, kernels=kernels, exact=exact)(x) for kernels in (KERNELS, PORTABLE)
    )
    assert relative_error(native, x if exact else as_int16_blocks(x), weights, bias) < 1e-6
    assert torch.equal(native, portable)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
def test_long_products_are_those_of_the_dequantised_weights(block_type: BlockType, *, exact: bool) -> None:
    raw, weights = random(block_type, 45, 4864 // STORED[block_type][0])
    x = torch.randn(7, weights.shape[1], generator=torch.Generator().manual_seed(1))
    out = pack(raw, block_type, exact=exact)(x)
    assert relative_error(out, x if exact else as_int16_blocks(x), weights, None) < 1e-6


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_each_stored_integer_and_scale_is_kept(block_type: BlockType, *, exact: bool) -> None:
    """Reads the weights back one by one: a product with a row of the unit matrix is exact but for the sum with a minimum."""
    raw, weights = random(block_type, 40, 2)
    out = pack(raw, block_type, exact=exact)(torch.eye(weights.shape[1])).double()
    # The minimum of int4 weights is a rounded product, at most 8 times the scale.
    units = 2 if isinstance(block_type, Int4Type) else 1 if block_type.name in MINIMA else 0
    assert (out - weights.T).abs().max() <= units * 2**-24 * weights.abs().amax()


def test_every_exponent_of_mxfp4_is_kept() -> None:
    raw, _ = random_blocks("MXFP4", 64, 4 * 32)
    raw.view(64, 4, 17)[:, :, 0] = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(64, 4)
    raw.view(64, 4, 17)[:, :, 1:] &= 0b10011001  # 0, 1 and -1: the greatest scale is 2^127
    weights = torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType.MXFP4))
    assert weights.isfinite().all()
    for exact in (False, True):
        assert torch.equal(pack(raw, GgufType.MXFP4, exact=exact)(torch.eye(128)), weights.T)


@pytest.mark.parametrize(("outlier", "ratio"), [(1, 40), (30, 20)])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_rounding_to_int16_is_far_finer_than_to_bfloat16(
    block_type: BlockType, outlier: float, ratio: float
) -> None:
    """Compares root mean square errors against unrounded activations, also with outliers in every other block."""
    raw, weights = random(block_type, 64, 256 // STORED[block_type][0])
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(1))
    x[:, ::64] *= outlier
    exact = x.double() @ weights.T
    error = (pack(raw, block_type)(x) - exact).pow(2).mean().sqrt()
    of_bfloat16 = (x.bfloat16().double() @ weights.T - exact).pow(2).mean().sqrt()
    assert error < of_bfloat16 / ratio


def test_the_largest_of_a_block_may_be_any_number() -> None:
    """Covers numbers around those that would round to 32,640 or more with the smaller of two scales."""
    raw, weights = random(GgufType.Q4_1, 40, 1)
    largest = torch.arange(32630, 32780, dtype=torch.float64)[:, None] + torch.tensor(
        [-0.5, -0.25, 0.0, 0.25]
    )
    x = torch.randn(largest.numel(), 32, generator=torch.Generator().manual_seed(1)) * 1000
    x[:, 5] = largest.flatten() * torch.tensor([1, -1]).repeat(largest.numel() // 2)
    out = pack(raw, GgufType.Q4_1)(x)
    assert relative_error(out, as_int16_blocks(x), weights, None) < 1e-6


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_the_largest_integers_do_not_overflow(block_type: BlockType) -> None:
    """All bits of the integers are ones or all are zeros, and all activations are the largest that they are rounded to."""
    raw, _ = random(block_type, 40, 2)
    block, size = STORED[block_type]
    scales = {at + i for at in FLOAT16_AT.get(block_type.name, (0,)) for i in range(2)} & set(range(size))
    if block_type == GgufType.MXFP4:
        scales = {0}
    if isinstance(block_type, Int4Type):
        scales = set(range(5))
        raw.view(40, 2, size)[:, :, 4] = 3  # no weight is 0
    integers = sorted(set(range(size)) - scales)
    for byte in (0, 255):
        raw.view(40, 2, size)[:, :, integers] = byte
        weights = dequantized(block_type.name, raw)
        x = torch.full((7, 2 * block), 32639.0)
        x[1::2] *= -1
        out = pack(raw, block_type)(x)
        assert relative_error(out, x, weights, None) < 1e-6


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-44, 1e-37, 1e-20, 1e30, 1e33])
def test_activations_of_any_magnitude_are_multiplied(block_type: BlockType, magnitude: float) -> None:
    """An error of 1e-38 of an activation is allowed."""
    raw, weights = random(block_type, 40, 2)
    x = torch.rand(3, weights.shape[1], generator=torch.Generator().manual_seed(1)) * 2 - 1
    x[:, 0] = 1
    x = (x.double() * magnitude).float()
    out = pack(raw, block_type)(x).double()
    error = (out - as_int16_blocks(x) @ weights.T).abs()
    assert (error <= (1e-6 * x.double().abs() + 1e-38) @ weights.T.abs()).all()


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("block_type", [GgufType.Q4_1, GgufType.Q6_K, GgufType.Q2_K, Int4Type.INT4_64])
def test_a_row_that_is_not_finite_says_so_and_leaves_the_others(
    block_type: BlockType, *, exact: bool, bad: float
) -> None:
    raw, weights = random(block_type, 40, 2)
    x = torch.randn(9, weights.shape[1], generator=torch.Generator().manual_seed(1))
    for kernels in (KERNELS, PORTABLE):
        linear = pack(raw, block_type, kernels=kernels, exact=exact)
        for rows in (2, 9):
            clean, spoilt = x[:rows], x[:rows].clone()
            spoilt[1, 40] = bad
            out = linear(spoilt)
            assert not out[1].isfinite().any()
            rest = [row for row in range(rows) if row != 1]
            assert torch.equal(out[rest], linear(clean)[rest])


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_a_row_has_the_same_bits_in_every_batch(block_type: BlockType, *, exact: bool) -> None:
    raw, weights = random(block_type, 77, 3)
    x = torch.randn(31, weights.shape[1], generator=torch.Generator().manual_seed(1))
    for kernels in (KERNELS, PORTABLE):
        linear = pack(raw, block_type, kernels=kernels, exact=exact)
        alone = torch.cat([linear(row[None]) for row in x])
        for size in (*range(2, 20), 31):
            for start in range(0, 31, size):
                rows = slice(start, start + size)
                assert torch.equal(linear(x[rows]), alone[rows])


@settings(max_examples=60, deadline=None)
@given(
    block_type=st.sampled_from(BLOCK_TYPES),
    exact=st.booleans(),
    out=st.integers(1, 100),
    batches=st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=40), min_size=1, max_size=4),
)
def test_a_row_has_the_same_bits_wherever_batches_hold_it(
    block_type: BlockType, *, exact: bool, out: int, batches: list[list[int]]
) -> None:
    raw, weights = random(block_type, out, 2)
    x = torch.randn(12, weights.shape[1], generator=torch.Generator().manual_seed(1))
    linear = pack(raw, block_type, exact=exact)
    alone = torch.cat([linear(row[None]) for row in x])
    for batch in batches:
        assert torch.equal(linear(x[batch]), alone[batch])


ANY_WEIGHT = st.one_of(
    st.sampled_from(BLOCK_TYPES), st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.tuples(ANY_WEIGHT, st.integers(1, 70)), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    rows=st.integers(1, 20),
    exact=st.booleans(),
    has_bias=st.booleans(),
)
def test_weights_of_several_formats_are_multiplied_like_each_alone(
    kinds: list[tuple[BlockType | torch.dtype, int]], blocks: int, rows: int, *, exact: bool, has_bias: bool
) -> None:
    """To the bit. A dense weight beside blocks is multiplied as an exact one."""
    generator = torch.Generator().manual_seed(rows)
    depth, total = 256 * blocks, sum(out for _, out in kinds)
    has_blocks = any(isinstance(kind, BlockType) for kind, _ in kinds)
    if not has_blocks:  # dense weights are joined first
        kinds = [(kinds[0][0], out) for _, out in kinds]
    weights: list[Weight] = [
        BlockWeight(f"w{i}", random_blocks(kind.name, out, depth, seed=i)[0], kind.name, (out, depth))
        if isinstance(kind, BlockType)
        else DenseWeight(f"w{i}", torch.randn(out, depth, generator=generator).to(kind))
        for i, (kind, out) in enumerate(kinds)
    ]
    x = torch.randn(rows, depth, generator=generator)
    bias = torch.randn(total, generator=generator) if has_bias else None
    for kernels in (KERNELS, PORTABLE):
        linear = kernels.pack(weights, bias, exact=exact)
        alone = [
            kernels.pack(
                [weight],
                None if bias is None else bias[linear.parts[weight.name]],
                exact=exact or (has_blocks and isinstance(weight, DenseWeight)),
            )(x)
            for weight in weights
        ]
        assert torch.equal(linear(x), torch.cat(alone, dim=1))


@pytest.mark.parametrize("gguf_type", GgufType)
def test_rows_are_packed_in_the_order_that_a_weight_gives(gguf_type: GgufType) -> None:
    raw, weights = random(gguf_type, 71, 2)
    order = torch.randperm(71, generator=torch.Generator().manual_seed(1))
    shape = (71, weights.shape[1])
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1))
    ordered = KERNELS.pack([BlockWeight("w", raw, gguf_type.name, shape, order)])(x)
    assert torch.equal(ordered, pack(raw, gguf_type)(x)[:, order])
    for wrong in (order - 1, order[:-1], torch.zeros(71, dtype=torch.int64)):
        with pytest.raises(ValueError, match="each of the 71 rows once"):
            KERNELS.pack([BlockWeight("w", raw, gguf_type.name, shape, wrong)])


@pytest.mark.parametrize("name", [*(kind.name for kind in GgufType), "F32", "F16", "BF16"])
def test_rows_of_an_embedding_of_any_bits_are_those_that_gguf_dequantises(name: str) -> None:
    """To the bit, infinities and NaN among them, in the file's layout and in that of a packed layer."""
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 256, (50, 3 * (256 // block) * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(raw, kind)
    weight = BlockWeight("w", torch.from_numpy(raw), name, (50, 768))
    for kernels in (KERNELS, PORTABLE):
        assert name in kernels.embedding_formats
        embeddings = [kernels.embedding(weight)]
        if name in kernels.block_formats:
            embeddings += [kernels.embedding(kernels.pack([weight], exact=exact)) for exact in (False, True)]
        for embedding in embeddings:
            for ids in ([], [49], [3, 0, 49, 3], list(range(50))):
                rows = embedding(torch.tensor(ids, dtype=torch.int64))
                np.testing.assert_array_equal(rows.numpy(), expected[ids])
            for bad in (-1, 50):
                with pytest.raises(IndexError, match=f"token id {bad} is outside an embedding of 50 rows"):
                    embedding(torch.tensor([0, bad]))


def test_embeddings_that_cannot_be_read_are_refused() -> None:
    raw = torch.zeros(4, 34, dtype=torch.uint8)
    for weight, message in (
        (BlockWeight("w", raw, "IQ2_XXS", (4, 256)), "IQ2_XXS is not among BF16, F16"),
        (BlockWeight("w", raw, "Q8_0", (5, 32)), "136 bytes"),
        (BlockWeight("w", raw, "F16", (4, 16)), "136 bytes"),
        (BlockWeight("w", raw, "Q8_0", (4, 32), torch.arange(4)), "order of the file"),
    ):
        with pytest.raises(ValueError, match=message):
            KERNELS.embedding(weight)
    blocks, dense = BlockWeight("w", raw, "Q8_0", (4, 32)), DenseWeight("v", torch.ones(4, 32))
    unreadable: list[list[Weight]] = [
        [dense],
        [blocks, dense],
        [blocks, BlockWeight("v", raw, "Q8_0", (4, 32))],
    ]
    for weights in unreadable:
        with pytest.raises(ValueError, match="where it is one weight in blocks"):
            KERNELS.embedding(KERNELS.pack(weights))
    for source, described in ((blocks, "Q8_0"), (KERNELS.pack([blocks]), "a packed layer")):
        with pytest.raises(ValueError, match=f"do not read an embedding in {described}"):
            ReferenceKernels().embedding(source)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_packed_weights_are_hardly_larger_than_in_the_file(block_type: BlockType) -> None:
    """The scales of six bits take whole bytes, two to four bytes for each superblock."""
    raw, _ = random(block_type, 64, 4)
    most = 1.04 if block_type.name in {"Q3_K", "Q4_K", "Q5_K", "IQ4_XS"} else 1
    assert raw.nbytes <= pack(raw, block_type).nbytes <= raw.nbytes * most


def test_blocks_have_the_sizes_that_files_have() -> None:
    for gguf_type in GgufType:
        assert STORED[gguf_type] == GGML_QUANT_SIZES[GGMLQuantizationType(int(gguf_type))]
        assert gguf_type.name == GGMLQuantizationType(int(gguf_type)).name


def test_bytes_that_do_not_fit_are_refused() -> None:
    raw, _ = random(GgufType.Q4_1, 4, 2)

    def weight(shape: tuple[int, int], name: str = "Q4_1", data: Tensor = raw) -> list[BlockWeight]:
        return [BlockWeight("w", data, name, shape)]

    with pytest.raises(ValueError, match="160 bytes"):
        KERNELS.pack(weight((4, 96)))
    with pytest.raises(ValueError, match="multiple of 32"):
        KERNELS.pack(weight((4, 40)))
    with pytest.raises(ValueError, match="multiple of 256"):
        KERNELS.pack(weight((4, 64), "Q4_K"))
    with pytest.raises(TypeError, match="uint8"):
        KERNELS.pack(weight((4, 64), data=raw.float()))
    with pytest.raises(ValueError, match="bias"):
        KERNELS.pack(weight((4, 64)), torch.zeros(3))
