"""Code of processors without AVX-512, built for AVX2 on any machine: its bits are those of the native kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_layers import HIDDEN, KV_HEADS, SIZE, layer_of, tables
from logitkernels import AttentionMetadata, AttentionOptions, BlockWeight, DenseWeight
from logitkernels.cpu import CpuKernels
from logitkernels.cpu.errors import BuildError
from logitkernels.cpu.linear import BLOCK_TYPES, STORED
from logitkernels.cpu.processor import AVX2
from random_blocks import random_blocks
from torch import Tensor

try:
    NATIVE = CpuKernels()
    PORTABLE = CpuKernels(target=AVX2)
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float32]
WEIGHT_DTYPES = [*DTYPES, torch.float16]
ROWS = [1, 2, 3, 4, 5, 6, 7, 13, 40]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(("out", "depth"), [(96, 64), (77, 123), (1, 1), (33, 577)])
def test_exact_linears_have_the_bits_of_the_native_ones(dtype: torch.dtype, out: int, depth: int) -> None:
    weight, bias, x = random(out, depth, seed=1, dtype=dtype), random(out, seed=2), random(40, depth, seed=3)
    native, portable = (
        kernels.pack([DenseWeight("w", weight)], bias, exact=True) for kernels in (NATIVE, PORTABLE)
    )
    for rows in ROWS:
        assert torch.equal(portable(x[:rows]), native(x[:rows]))


@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_products_of_blocks_have_the_bits_of_the_native_ones(name: str, *, exact: bool) -> None:
    raw, weights = random_blocks(name, 77, 5 * STORED[BLOCK_TYPES[name]][0])
    x = random(40, weights.shape[1], seed=3)
    weight = BlockWeight("w", raw, name, (77, weights.shape[1]))
    native, portable = (kernels.pack([weight], exact=exact) for kernels in (NATIVE, PORTABLE))
    for rows in ROWS:
        assert torch.equal(portable(x[:rows]), native(x[:rows]))


def test_a_rounded_linear_is_the_exact_one_on_rounded_activations() -> None:
    weight, x = random(77, 123, seed=1, dtype=torch.bfloat16), random(40, 123, seed=3)
    rounded, exact = (PORTABLE.pack([DenseWeight("w", weight)], exact=is_exact) for is_exact in (False, True))
    expected = exact(x.bfloat16().float())
    for rows in ROWS:
        assert torch.equal(rounded(x[:rows]), expected[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 40, 64, 72])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"sliding_window": 50}])
def test_attention_has_the_bits_of_the_native_one(
    dtype: torch.dtype, size: int, options: dict[str, Any]
) -> None:
    tokens, length = 30, 200
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.randperm(13).to(torch.int32)[None],
        slot_mapping=torch.arange(tokens),
        max_query_len=tokens,
        max_seq_len=length,
    )
    query = random(tokens, 6, size, seed=1) * 3
    keys, values = (random(13, 2, 16, size, seed=seed, dtype=dtype) for seed in (2, 3))
    attention = AttentionOptions(0.2, sinks=random(6, seed=4), **options)
    native, portable = (
        kernels.paged_attention(query, keys, values, metadata, attention) for kernels in (NATIVE, PORTABLE)
    )
    assert native.isfinite().all()
    assert torch.equal(portable, native)


@pytest.mark.parametrize("size", [2, 32, 100, 101])
def test_pointwise_operations_have_the_bits_of_the_native_ones(size: int) -> None:
    x, weight = random(7, size, seed=1) * 3, random(size, seed=2)
    assert torch.equal(PORTABLE.rms_norm(x, weight, 1e-5), NATIVE.rms_norm(x, weight, 1e-5))
    gate_up = random(7, 2 * size, seed=3) * 40
    assert torch.equal(PORTABLE.silu_and_mul(gate_up), NATIVE.silu_and_mul(gate_up))
    for scale in (1e-3, 0.1, 1):
        gates = gate_up * scale
        assert torch.equal(PORTABLE.gelu_and_mul(gates), NATIVE.gelu_and_mul(gates))
    heads, angles = random(7, 3, size, seed=4), random(7, size // 2, seed=5).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    assert torch.equal(PORTABLE.rope(heads, cos, sin), NATIVE.rope(heads, cos, sin))


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
def test_layers_have_the_bits_of_the_native_ones(*, gemma: bool) -> None:
    tokens = 40
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, tokens], dtype=torch.int32),
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        block_tables=torch.tensor([[2, 0, 3]], dtype=torch.int32),
        slot_mapping=torch.tensor([*range(32, 48), *range(16), *range(48, 56)]),
        max_query_len=tokens,
        max_seq_len=tokens,
    )
    hidden = random(tokens, HIDDEN, seed=1)
    cos, sin = tables(torch.arange(tokens))
    native, portable = (
        kernels.bind_layers(
            [layer_of(kernels, torch.float32, exact=True, qk_norm=gemma, gemma=gemma) for _ in range(2)],
            *([torch.zeros(4, KV_HEADS, 16, SIZE) for _ in range(2)] for _ in range(2)),
        )(hidden, cos, sin, metadata)
        for kernels in (NATIVE, PORTABLE)
    )
    assert native.isfinite().all()
    assert torch.equal(portable, native)


@pytest.mark.parametrize("size", [5, 64])
def test_stored_values_are_rounded_as_the_native_ones(size: int) -> None:
    values = random(6, 1, size, seed=1)
    values[0], values[1], values[2], values[3] = torch.inf, -1e-40, 3.3961775e38, 1.00390625
    caches = [torch.zeros(1, 1, 16, size, dtype=torch.bfloat16) for _ in range(4)]
    NATIVE.store_kv(values, values, caches[0], caches[1], torch.arange(6))
    PORTABLE.store_kv(values, values, caches[2], caches[3], torch.arange(6))
    assert torch.equal(caches[0].view(torch.int16), caches[2].view(torch.int16))


def test_operations_on_logits_have_the_bits_of_the_native_ones() -> None:
    logits = (random(4, 1003, seed=1) * 4).round()
    logits[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])
    for native, portable in zip(
        NATIVE.top_k_logits(logits, 50), PORTABLE.top_k_logits(logits, 50), strict=True
    ):
        assert torch.equal(portable.nan_to_num(), native.nan_to_num())
    capped = logits.nan_to_num()
    assert torch.equal(PORTABLE.softcap(capped, 3.0), NATIVE.softcap(capped, 3.0))
    assert torch.equal(PORTABLE.logsumexp(logits)[1:], NATIVE.logsumexp(logits)[1:])
    assert PORTABLE.logsumexp(logits)[0].isnan()
