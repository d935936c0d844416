"""Int4 block formats of our own: groups of 32, 64 or 128 weights along K with a float32 scale and an integer zero.

A weight is ``scale * (q - zero)``, with q and zero from 0 to 15. A row of a `BlockWeight` in ``INT4_<group size>`` is group
after group: the scale as 4 bytes, little-endian; the zero as one byte; and for each 32 weights 16 bytes, whose lower nibbles
are the first 16 of them and whose upper nibbles are the others. That is 0.656, 0.578 or 0.539 bytes a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitkernels.weights import BlockWeight

GROUP_SIZES = (32, 64, 128)

HEAD_BYTES = 5
"""Bytes of a group's scale and zero."""

LEVELS = 16
SYMMETRIC_ZERO = 8
"""The zero of weights that are stored without one."""


def int4_format(group_size: int) -> str:
    """Return the format's name for groups of ``group_size``."""
    return f"INT4_{group_size}"


def group_bytes(group_size: int) -> int:
    return HEAD_BYTES + group_size // 2


def widest_group(group_size: int, depth: int) -> int | None:
    """Return the largest of `GROUP_SIZES` that divides a group and a row of ``depth`` weights; None if there is none."""
    fitting = [size for size in GROUP_SIZES if group_size % size == 0 and depth % size == 0]
    return max(fitting, default=None)


def int4_blocks(name: str, integers: Tensor, scales: Tensor, zeros: Tensor | None = None) -> BlockWeight:
    """Pack a weight into blocks, in the widest groups that keep each scale.

    Args:
        name: the weight's name.
        integers: [N, K], from 0 to 15, uint8.
        scales: [N, G], of G equal groups along K; kept as float32.
        zeros: [N, G], from 0 to 15, uint8; 8 if None.

    Raises ValueError for shapes that do not fit, and groups that are no multiple of 32.
    """
    rows, depth = integers.shape
    num_groups = scales.shape[1]
    zeros = torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8) if zeros is None else zeros
    if scales.shape[0] != rows or zeros.shape != scales.shape or depth % num_groups:
        raise ValueError(
            f"{name} is {[rows, depth]}; scales {list(scales.shape)} and zeros {list(zeros.shape)} do not fit it"
        )
    size = widest_group(depth // num_groups, depth)
    if size is None:
        raise ValueError(f"{name} has groups of {depth // num_groups} weights; int4 takes multiples of 32")
    repeats = depth // num_groups // size
    raw = torch.empty(rows, depth // size, group_bytes(size), dtype=torch.uint8)
    raw[..., :4] = _bytes_of(scales).repeat_interleave(repeats, dim=1)
    raw[..., 4] = zeros.repeat_interleave(repeats, dim=1)
    halves = integers.view(rows, depth // size, size // 32, 2, 16)
    packed = raw[..., HEAD_BYTES:].unflatten(-1, (-1, 16))
    torch.bitwise_or(halves[..., 0, :], halves[..., 1, :] << 4, out=packed)
    return BlockWeight(name, raw.view(rows, -1), int4_format(size), (rows, depth))


def round_to_int4(name: str, weight: Tensor, group_size: int = 32) -> BlockWeight:
    """Round a weight [N, K] to blocks whose scale spans the group's least and greatest weight and 0.

    No weight moves by more than half its group's scale. A group that is all zeros has scale 0.
    """
    rows, depth = weight.shape
    groups = weight.float().view(rows, depth // group_size, group_size)
    least, greatest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = (greatest - least) / (LEVELS - 1)
    divisors = scales.where(scales > 0, 1)
    zeros = (-least / divisors).round_()
    integers = (groups / divisors[..., None]).round_().add_(zeros[..., None]).clamp_(0, LEVELS - 1)
    return int4_blocks(name, integers.to(torch.uint8).view(rows, depth), scales, zeros.to(torch.uint8))


def dequantize_int4(weight: BlockWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weights [N, K], computed in ``dtype``."""
    rows, depth = weight.shape
    size = int(weight.format.removeprefix("INT4_"))
    raw = weight.raw.view(rows, depth // size, group_bytes(size))
    scales = raw[..., :4].contiguous().view(torch.float32)
    zeros = raw[..., 4:5].to(dtype)
    nibbles = raw[..., HEAD_BYTES:].unflatten(-1, (-1, 16))
    integers = torch.stack([nibbles & 15, nibbles >> 4], dim=-2).view(rows, depth // size, size)
    return ((integers.to(dtype) - zeros) * scales.to(dtype)).view(rows, depth)


def _bytes_of(scales: Tensor) -> Tensor:
    return scales.to(torch.float32).contiguous().unsqueeze(-1).view(torch.uint8)
