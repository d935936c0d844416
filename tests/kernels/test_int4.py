"""Int4 blocks of our own: rounding to them, and what they keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitkernels.int4 import int4_blocks, pack_nibbles, round_to_int4, unpack_nibbles
from random_blocks import dequantized


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    exponent=st.integers(-30, 30),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_no_weight_moves_by_more_than_half_a_step(
    rows: int, blocks: int, exponent: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, 32 * blocks, generator=generator) + shift) * 10.0**exponent
    block = round_to_int4("w", weight)
    assert (block.format, block.shape) == ("INT4_32", (rows, 32 * blocks))
    groups = weight.double().unflatten(-1, (-1, 32))
    least, greatest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    moved = (dequantized(block.format, block.raw).view(groups.shape) - groups).abs().amax(-1)
    assert (moved <= (greatest - least) / 15 / 2 * (1 + 1e-5)).all()


def test_zeros_stay_zeros_and_a_group_of_them_has_no_scale() -> None:
    weight = torch.randn(3, 64)
    weight[:, ::3] = 0
    weight[1] = 0
    block = round_to_int4("w", weight)
    rounded = dequantized(block.format, block.raw)
    assert (rounded[weight == 0] == 0).all()


def test_ties_and_single_values_are_within_half_a_step() -> None:
    """Half steps at both ends would take 17 integers if both were rounded away from 0."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = -1.5, 13.5
    block = round_to_int4("w", weight)
    assert (dequantized(block.format, block.raw) - weight).abs().max() <= 0.5
    weight = torch.full((1, 32), -7.25)
    block = round_to_int4("w", weight)
    torch.testing.assert_close(dequantized(block.format, block.raw), weight.double(), rtol=1e-6, atol=0)


def test_rounding_is_finer_than_with_a_zero_in_the_middle() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    block = round_to_int4("w", weight)
    groups = weight.view(64, -1, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    symmetric = (groups / (largest / -8)).round().clamp(-8, 7) * (largest / -8)

    def error(rounded: torch.Tensor) -> float:
        return (rounded.view_as(weight) - weight).square().mean().sqrt().item()

    assert error(dequantized(block.format, block.raw)) < 0.97 * error(symmetric)


@pytest.mark.parametrize(
    ("depth", "num_groups", "size"), [(256, 8, 32), (256, 4, 64), (256, 2, 128), (256, 1, 128), (96, 1, 32)]
)
def test_blocks_are_in_the_widest_groups_that_keep_each_scale(depth: int, num_groups: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 16, (5, depth), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (5, num_groups), generator=generator, dtype=torch.uint8)
    scales = torch.randn(5, num_groups, generator=generator)
    block = int4_blocks("w", pack_nibbles(integers), scales, zeros)
    assert block.format == f"INT4_{size}"
    groups = integers.view(5, num_groups, -1).double()
    expected = scales.double()[..., None] * (groups - zeros[..., None])
    assert torch.equal(dequantized(block.format, block.raw), expected.view(5, depth))
    without = int4_blocks("w", pack_nibbles(integers), scales)
    assert torch.equal(
        dequantized(without.format, without.raw), (scales.double()[..., None] * (groups - 8)).view(5, depth)
    )


def test_nibbles_are_read_as_they_were_packed() -> None:
    integers = torch.randint(0, 16, (3, 4, 64), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(integers)), integers)


def test_groups_that_do_not_fit_are_refused() -> None:
    nibbles = torch.zeros(4, 24, dtype=torch.uint8)
    with pytest.raises(ValueError, match="groups of 48 weights; int4 takes multiples of 32"):
        int4_blocks("w", nibbles, torch.ones(4, 1))
    with pytest.raises(ValueError, match="do not fit it"):
        int4_blocks("w", nibbles, torch.ones(4, 5))
    with pytest.raises(ValueError, match="do not fit it"):
        int4_blocks("w", nibbles, torch.ones(3, 1))
