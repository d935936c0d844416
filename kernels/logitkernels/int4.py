"""Int4 block formats of our own: groups of 32, 64 or 128 weights along K with a float32 scale and an integer zero.

A weight is ``scale * (q - zero)``, with q and zero from 0 to 15. A row of a `BlockWeight` in ``INT4_<group size>`` is group
after group: the scale as 4 bytes, little-endian; the zero as a byte; the integers, two in a byte, the first in the lower
nibble. That is 0.656, 0.578 or 0.539 bytes a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logitkernels.weights import BlockWeight

GROUP_SIZES = (32, 64, 128)

HEAD_BYTES = 5
"""Bytes of a group's scale and zero."""

LARGEST = 15
SYMMETRIC_ZERO = 8
"""Zero of weights that are stored without one."""


def int4_format(group_size: int) -> str:
    """Return the format's name for groups of ``group_size``."""
    return f"INT4_{group_size}"


def group_bytes(group_size: int) -> int:
    return HEAD_BYTES + group_size // 2


def int4_blocks(name: str, nibbles: Tensor, scales: Tensor, zeros: Tensor | None = None) -> BlockWeight:
    """Pack a weight [N, K] into blocks, in the widest groups that keep each scale.

    Args:
        name: the weight's name.
        nibbles: its integers, uint8 [N, K / 2], the first of two in the lower nibble.
        scales: [N, G], of G equal groups along K; kept as float32.
        zeros: uint8 [N, G], from 0 to 15; 8 if None.

    Raises ValueError for shapes that do not fit, and for groups that are no multiple of 32.
    """
    rows, depth = nibbles.shape[0], 2 * nibbles.shape[1]
    zeros = torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8) if zeros is None else zeros
    num_groups = scales.shape[1]
    if scales.shape[0] != rows or zeros.shape != scales.shape or depth % num_groups:
        raise ValueError(
            f"{name} is {[rows, depth]}; scales {list(scales.shape)} and zeros {list(zeros.shape)} do not fit it"
        )
    own_size = depth // num_groups
    size = max((size for size in GROUP_SIZES if own_size % size == 0), default=None)
    if size is None:
        raise ValueError(f"{name} has groups of {own_size} weights; int4 takes multiples of 32")
    repeats = own_size // size
    raw = torch.empty(rows, depth // size, group_bytes(size), dtype=torch.uint8)
    bytes_of_scales = scales.to(torch.float32).contiguous().unsqueeze(-1).view(torch.uint8)
    raw[..., : HEAD_BYTES - 1] = bytes_of_scales.repeat_interleave(repeats, dim=1)
    raw[..., HEAD_BYTES - 1] = zeros.repeat_interleave(repeats, dim=1)
    raw[..., HEAD_BYTES:] = nibbles.reshape(rows, depth // size, size // 2)
    return BlockWeight(name, raw.view(rows, -1), int4_format(size), (rows, depth))


def round_to_int4(name: str, weight: Tensor, group_size: int = 32) -> BlockWeight:
    """Round a weight [N, K] to blocks whose scale spans the least and the greatest weight of a group, and 0.

    No weight moves by more than half its group's scale. A group of zeros has scale 0.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    least, greatest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scales = (greatest - least) / LARGEST
    divisors = scales.where(scales > 0, 1)
    zeros = (-least / divisors).round_()
    integers = (groups / divisors[..., None]).round_().add_(zeros[..., None]).clamp_(0, LARGEST)
    packed = pack_nibbles(integers.to(torch.uint8).flatten(-2))
    return int4_blocks(name, packed, scales, zeros.to(torch.uint8))


def pack_nibbles(integers: Tensor) -> Tensor:
    """Put neighbours of ``integers``, uint8 [..., K] from 0 to 15, into bytes [..., K / 2], the first in the lower nibble."""
    return integers[..., ::2] | integers[..., 1::2] << 4


def unpack_nibbles(nibbles: Tensor) -> Tensor:
    """Return the integers, uint8 [..., K], of bytes [..., K / 2]."""
    return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(-2)
