"""Native CPU operations against the same formulas in float64, and bit for bit against themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitkernels import AttentionOptions, DenseWeight
from logitkernels.cpu import CpuKernels
from logitkernels.cpu.errors import BuildError
from logitkernels.cpu.linear import Bf16Sums, CpuLinear
from torch import Tensor
from torch.nn import functional

try:
    KERNELS = CpuKernels()
except BuildError as error:  # pragma: no cover
    pytest.skip(f"no native kernels here: {error}", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float32]
WEIGHT_DTYPES = [*DTYPES, torch.float16]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class WithoutTiles:
    """The library as it is where the system grants no tile registers: bfloat16 is multiplied in pairs."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def bf16_sums(self) -> int:
        return min(int(self._library.bf16_sums()), int(Bf16Sums.IN_PAIRS))


def kernels_without_tiles() -> CpuKernels:
    kernels = CpuKernels()
    kernels._library = WithoutTiles(kernels._library)  # type: ignore[assignment]
    return kernels


WITHOUT_TILES = kernels_without_tiles()


def pack(
    weight: Tensor, bias: Tensor | None = None, *, exact: bool = False, kernels: CpuKernels = KERNELS
) -> CpuLinear:
    return kernels.pack([DenseWeight("w", weight)], bias, exact=exact)


any_sums = pytest.mark.parametrize("kernels", [KERNELS, WITHOUT_TILES], ids=["best", "without tiles"])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare the error, relative to the root mean square of the expected values, with the tolerance."""
    assert actual.isfinite().all()
    error = (actual.double() - expected).abs().max() / expected.square().mean().sqrt().clamp(min=1e-30)
    assert error < tolerance, f"relative error {error:.2e}"


@any_sums
@quick
@given(
    rows=st.integers(0, 40),
    out=st.integers(1, 100),
    depth=st.integers(1, 150),
    dtype=st.sampled_from(WEIGHT_DTYPES),
    has_bias=st.booleans(),
)
def test_linear_is_the_product_with_the_stored_weights(
    kernels: CpuKernels, rows: int, out: int, depth: int, dtype: torch.dtype, *, has_bias: bool
) -> None:
    weight = random(out, depth, seed=1, dtype=dtype)
    bias = random(out, seed=2) if has_bias else None
    x = random(rows, depth, seed=3)
    read = x.bfloat16() if dtype == torch.bfloat16 else x
    expected = read.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = pack(weight, bias, kernels=kernels)(x)
    assert found.shape == expected.shape
    if rows:
        assert_close(found, expected, 5e-6)


@any_sums
@pytest.mark.parametrize("exact", [False, True], ids=["rounded", "exact"])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(("out", "depth"), [(96, 64), (77, 123), (1, 1), (33, 577)])
def test_a_row_of_a_linear_has_the_same_bits_in_every_batch(
    kernels: CpuKernels, exact: bool, dtype: torch.dtype, out: int, depth: int
) -> None:
    linear = pack(random(out, depth, seed=1, dtype=dtype), random(out, seed=2), exact=exact, kernels=kernels)
    x = random(43, depth, seed=3)
    alone = torch.cat([linear(row[None]) for row in x])
    for size in (*range(2, 27), 32, 33, 43):
        for start in range(0, 43, size):
            batch = linear(x[start : start + size])
            assert torch.equal(batch, alone[start : start + size]), (size, start)


@any_sums
def test_rows_have_the_same_bits_past_a_block_of_activations(kernels: CpuKernels) -> None:
    linear = pack(random(64, 4096, seed=1, dtype=torch.bfloat16), kernels=kernels)
    x = random(150, 4096, seed=2)
    assert torch.equal(linear(x)[[0, 100, 149]], linear(x[[0, 100, 149]]))


def test_exact_products_of_bf16_weights_equal_those_of_the_widened_weights() -> None:
    weight, x = random(70, 131, seed=1, dtype=torch.bfloat16), random(9, 131, seed=2)
    narrow, wide = pack(weight, exact=True), pack(weight.float(), exact=True)
    unrepresentable = weight.float()
    unrepresentable[0, 0] += 1e-5
    full = pack(unrepresentable, exact=True)
    assert narrow.nbytes == wide.nbytes < full.nbytes
    assert torch.equal(narrow(x), wide(x))
    assert torch.equal(narrow(x)[:, 1:], full(x)[:, 1:])
    assert_close(narrow(x), x.double() @ weight.double().T, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_weights_of_another_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        pack(torch.ones(4, 4).to(dtype))


def test_shapes_that_do_not_fit_are_refused() -> None:
    linear = pack(torch.ones(4, 6))
    with pytest.raises(ValueError, match="6 features"):
        linear(torch.ones(2, 5))
    with pytest.raises(ValueError, match="bias"):
        pack(torch.ones(4, 6), torch.ones(5))
    with pytest.raises(ValueError, match="sliding_window"):
        KERNELS.paged_attention(
            torch.ones(1, 1, 32),
            torch.ones(1, 1, 16, 32),
            torch.ones(1, 1, 16, 32),
            None,  # type: ignore[arg-type]
            AttentionOptions(1.0, sliding_window=0),
        )


def test_bfloat16_activations_come_back_as_bfloat16() -> None:
    x = random(3, 64, dtype=torch.bfloat16)
    linear = pack(random(32, 64, seed=1, dtype=torch.bfloat16))
    assert torch.equal(linear(x), linear(x.float()).bfloat16())
    assert KERNELS.rms_norm(x, torch.ones(64), 1e-5).dtype == torch.bfloat16
    assert KERNELS.silu_and_mul(x).dtype == torch.bfloat16
    assert KERNELS.gelu_and_mul(x).dtype == torch.bfloat16


@quick
@given(rows=st.integers(1, 20), size=st.integers(1, 700), weight_dtype=st.sampled_from(DTYPES))
def test_rms_norm(rows: int, size: int, weight_dtype: torch.dtype) -> None:
    x, weight = random(rows, size, seed=1) * 3, random(size, seed=2, dtype=weight_dtype)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    actual = KERNELS.rms_norm(x, weight, 1e-5)
    assert_close(actual, expected, 2e-6)
    assert torch.equal(actual[-1:], KERNELS.rms_norm(x[-1:], weight, 1e-5))


@quick
@given(rows=st.integers(1, 20), size=st.integers(1, 300), scale=st.sampled_from([1.0, 30.0]))
def test_silu_and_mul(rows: int, size: int, scale: float) -> None:
    gate_up = random(rows, 2 * size, seed=1) * scale
    gate, up = gate_up.double().chunk(2, dim=-1)
    actual = KERNELS.silu_and_mul(gate_up)
    assert_close(actual, gate / (1 + (-gate).exp()) * up, 2e-6)
    assert torch.equal(actual[:1], KERNELS.silu_and_mul(gate_up[:1]))


@quick
@given(rows=st.integers(1, 20), size=st.integers(1, 300), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_gelu_and_mul_is_the_tanh_approximation(rows: int, size: int, scale: float) -> None:
    gate_up = random(rows, 2 * size, seed=1) * scale
    gate, up = gate_up.double().chunk(2, dim=-1)
    actual = KERNELS.gelu_and_mul(gate_up)
    assert_close(actual, functional.gelu(gate, approximate="tanh") * up, 2e-6)
    assert torch.equal(actual[:1], KERNELS.gelu_and_mul(gate_up[:1]))


def test_gelu_is_within_3e_6_of_its_own_size_as_far_as_it_is_above_1e_6() -> None:
    gate = torch.linspace(-5, 20, 100_001)
    gates = gate.double()
    inner = (2 / torch.pi) ** 0.5 * (gates + 0.044715 * gates**3)
    expected = gates / (1 + (-2 * inner).exp())
    actual = KERNELS.gelu_and_mul(torch.cat([gate, torch.ones_like(gate)])[None])[0].double()
    is_counted = expected.abs() > 1e-6
    assert ((actual - expected).abs() / expected.abs())[is_counted].max() < 3e-6
    assert (actual - expected).abs()[~is_counted].max() < 1e-11


@pytest.mark.parametrize("gate", ["silu_and_mul", "gelu_and_mul"])
def test_large_gates_are_the_gate_or_zero(gate: str) -> None:
    gate_up = torch.tensor([[200.0, -200.0, 1e30, -1e30, 1.0, 1.0, 1.0, 1.0]])
    actual = getattr(KERNELS, gate)(gate_up)
    assert torch.equal(actual, torch.tensor([[200.0, 0.0, 1e30, 0.0]]))
    assert getattr(KERNELS, gate)(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@quick
@given(tokens=st.integers(1, 9), heads=st.integers(1, 4), half=st.integers(1, 40), passed=st.integers(0, 9))
def test_rope(tokens: int, heads: int, half: int, passed: int) -> None:
    x = random(tokens, heads, 2 * half + passed, seed=1)
    angles = random(tokens, half, seed=2).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = x.double().split([half, half, passed], dim=-1)
    c, s = cos.double()[:, None, :half], sin.double()[:, None, :half]
    expected = torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)
    assert_close(KERNELS.rope(x, cos, sin), expected, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_writes_the_slots_and_nothing_else(dtype: torch.dtype) -> None:
    key, value = random(3, 2, 40, seed=1), random(3, 2, 24, seed=2)
    keys, values = torch.full((4, 2, 5, 40), 7.0).to(dtype), torch.full((4, 2, 5, 24), 7.0).to(dtype)
    slots = torch.tensor([13, 0, 6])
    KERNELS.store_kv(key, value, keys, values, slots)
    for cache, source in ((keys, key), (values, value)):
        by_slot = cache.transpose(1, 2).flatten(0, 1)
        assert torch.equal(by_slot[slots], source.to(dtype))
        others = [slot for slot in range(20) if slot not in slots.tolist()]
        assert (by_slot[others] == 7).all()


def test_store_follows_the_strides_of_a_cache_that_is_a_view() -> None:
    both = torch.zeros(4, 2, 2, 8, 16)
    keys, values = both[:, 0], both[:, 1]
    key, value = random(2, 2, 16, seed=1), random(2, 2, 16, seed=2)
    KERNELS.store_kv(key, value, keys, values, torch.tensor([9, 30]))
    assert torch.equal(keys[1, :, 1], key[0])
    assert torch.equal(values[3, :, 6], value[1])


PINNING = """
import json, os, sys, torch
from logitkernels import DenseWeight
from logitkernels.cpu import CpuKernels
torch.set_num_threads(int(sys.argv[1]))
kernels = CpuKernels()
kernels.pin_threads()
kernels.pack([DenseWeight("w", torch.ones(640, 64))])(torch.ones(9, 64))
print(json.dumps([sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")]))
"""


def affinities_after_pinning(num_threads: int) -> list[list[int]]:
    """Return the CPUs of each thread of a process that has multiplied with ``num_threads`` threads."""
    command = [sys.executable, "-c", PINNING, str(num_threads)]
    affinities: list[list[int]] = json.loads(subprocess.check_output(command, timeout=60))
    return affinities


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one CPU")
def test_as_many_pinned_threads_as_cpus_have_one_each() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    alone = [one for one in affinities_after_pinning(len(cpus)) if len(one) == 1]
    assert sorted(alone) == [[cpu] for cpu in cpus]
    # With fewer threads than CPUs, another server with as few would be pinned to the very same ones.
    assert all(one == cpus for one in affinities_after_pinning(len(cpus) - 1))
