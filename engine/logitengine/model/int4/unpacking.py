"""Numbers of packed weights: from the words of AWQ, GPTQ and compressed-tensors to rows of nibbles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from logitkernels.int4 import SYMMETRIC_ZERO, unpack_nibbles
from torch import Tensor

from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.safetensors_files import FileTensor
from logitengine.model.int4.config import Int4Config, Method
from logitengine.model.int4.tensors import PackedParameter

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
"""Types of tensors that are read, by the format's names."""

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]
"""Columns that the nibbles of AWQ's words hold, from the lowest nibble on."""

AWQ_WORDS = 32
"""Words of a row that are unpacked at a time: their columns fit a cache."""

ONE_IN_EACH = 0x11111111
"""A word of ones."""

CHUNK_WEIGHTS = 1 << 20
"""Weights that are dequantised at a time."""


@dataclass(frozen=True, slots=True)
class Groups:
    """A weight [N, K]: ``scale * (q - zero)``, with G scales and zeros of a row.

    Attributes:
        nibbles: q, uint8 [N, K / 2], the first of two in the lower nibble.
        scales: [N, G].
        zeros: uint8 [N, G]; 8 if None.
        of_column: int64 [K], the group of each column; None where groups are neighbours.
    """

    nibbles: Tensor
    scales: Tensor
    zeros: Tensor | None
    of_column: Tensor | None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, computed in float32 and rounded once."""
        rows, depth = self.nibbles.shape[0], 2 * self.nibbles.shape[1]
        out = torch.empty(rows, depth, dtype=dtype)
        at_once = max(1, CHUNK_WEIGHTS // depth)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            integers = unpack_nibbles(self.nibbles[part]).float()
            zeros = SYMMETRIC_ZERO if self.zeros is None else self._by_column(self.zeros[part].float(), depth)
            out[part] = (integers - zeros) * self._by_column(self.scales[part].float(), depth)
        return out

    def _by_column(self, by_group: Tensor, depth: int) -> Tensor:
        if self.of_column is not None:
            return by_group[:, self.of_column]
        return by_group.repeat_interleave(depth // by_group.shape[1], dim=1)


def read_tensor(tensor: FileTensor) -> Tensor:
    """Map a tensor; pages leave the process with the last reference to it. Raises CheckpointError if it cannot be read.

    The library would read the file's header again, which takes 13 ms where experts make it 14,000 tensors long.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise CheckpointError(f"{tensor.path} cannot be served: {tensor.name} is {tensor.dtype}")
    nbytes = prod(tensor.shape) * dtype.itemsize
    if not nbytes:  # which cannot be mapped
        return torch.empty(tensor.shape, dtype=dtype)
    try:
        raw = np.memmap(tensor.path, np.uint8, "c", tensor.offset, (nbytes,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tensor.path} cannot be read: {error}") from error
    is_aligned = tensor.offset % dtype.itemsize == 0
    return torch.from_numpy(raw if is_aligned else raw.copy()).view(dtype).view(tensor.shape)


def read_groups(parameter: PackedParameter, config: Int4Config) -> Groups:
    """Read a packed weight. Raises CheckpointError for one whose tensors contradict each other."""
    nibbles, scales, zeros = READERS[config.method](parameter, config)
    if not scales.isfinite().all():
        raise _damaged(parameter, f"{parameter.scales.name} holds numbers that are not finite")
    if parameter.stored_shape is not None:
        shape = tuple(read_tensor(parameter.stored_shape).tolist())
        if shape != parameter.shape:
            raise _damaged(
                parameter, f"{parameter.stored_shape.name} is {list(shape)} for {list(parameter.shape)}"
            )
    return Groups(nibbles, scales, zeros, _groups_of_columns(parameter))


def _groups_of_columns(parameter: PackedParameter) -> Tensor | None:
    if parameter.groups is None:
        return None
    groups = read_tensor(parameter.groups).long()
    depth, num_groups = parameter.shape[1], parameter.num_groups
    in_turn = torch.arange(depth) // (depth // num_groups)
    if torch.equal(groups, in_turn) or (groups == -1).all():  # -1: it is not used
        return None
    if groups.min() < 0 or groups.max() >= num_groups:
        raise _damaged(parameter, f"{parameter.groups.name} names groups beyond the {num_groups} there are")
    return groups


def _awq(parameter: PackedParameter, config: Int4Config) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words [K, N / 8] hold eight columns of the transposed weight, and so do those of the zeros, [G, N / 8]."""
    del config
    rows, depth = parameter.shape
    words = read_tensor(parameter.integers)
    nibbles = torch.empty(rows // 8, 8, depth // 2, dtype=torch.uint8)
    for first in range(0, rows // 8, AWQ_WORDS):
        at = slice(first, first + AWQ_WORDS)
        # A byte is two rows of the weight, at one k. Turned so that k runs along a row, 16 bits are two rows at two k.
        turned = _bytes(words[:, at]).t().contiguous().view(torch.int16).view(-1, 4, depth // 2)
        lower = (turned & 15) | (turned >> 4 & 0xF0)
        upper = (turned >> 4 & 15) | (turned >> 8 & 0xF0)
        for nibble, column in enumerate(AWQ_COLUMNS):
            nibbles[at, column] = (upper if nibble % 2 else lower)[:, nibble // 2].to(torch.uint8)
    stored = _zeros(parameter).unflatten(-1, (-1, 8))
    zeros = torch.empty_like(stored)
    zeros[..., AWQ_COLUMNS] = stored
    return nibbles.view(rows, -1), read_tensor(parameter.scales).t(), zeros.flatten(1).t()


def _gptq(parameter: PackedParameter, config: Int4Config) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words [K / 8, N] hold eight rows of the transposed weight; those of the zeros, [G, N / 8], eight columns."""
    nibbles = _bytes(read_tensor(parameter.integers).t().contiguous())
    # The carry from a zero of 16 is what GPTQModel's code gives.
    zeros = _zeros(parameter, ONE_IN_EACH if config.zeros_less_one else 0)[:, : parameter.shape[0]]
    return nibbles, read_tensor(parameter.scales).t(), zeros.t()


def _compressed_tensors(
    parameter: PackedParameter, config: Int4Config
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Words [N, K / 8] hold eight columns; those of the zeros, [N / 8, G], eight rows. All are stored 8 above their values."""
    del config
    nibbles, scales = _bytes(read_tensor(parameter.integers)), read_tensor(parameter.scales)
    if parameter.zeros is None:
        return nibbles, scales, None
    zeros = read_tensor(parameter.zeros)
    if zeros.dtype == torch.int8:
        zeros = zeros.short() + SYMMETRIC_ZERO
        if zeros.min() < 0 or zeros.max() > 15:
            raise _damaged(parameter, f"{parameter.zeros.name} holds zeros beyond four bits")
        return nibbles, scales, zeros.to(torch.uint8)
    by_column = unpack_nibbles(_bytes(zeros.t().contiguous()))[:, : parameter.shape[0]]
    return nibbles, scales, by_column.t()


READERS: dict[Method, Callable[[PackedParameter, Int4Config], tuple[Tensor, Tensor, Tensor | None]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
}


def _zeros(parameter: PackedParameter, added: int = 0) -> Tensor:
    """Return the nibbles of the zeros' words in order, uint8 [G, 8 words], with ``added`` on each word."""
    assert parameter.zeros is not None  # noqa: S101 - tensors.py has checked
    return unpack_nibbles(_bytes(read_tensor(parameter.zeros) + added))


def _bytes(words: Tensor) -> Tensor:
    """Return the bytes of words int32 [..., W], uint8 [..., 4 W], lowest first."""
    # Flat, because a matrix of one column is contiguous with any stride, and torch sees no bytes in some of them.
    return words.flatten().view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])


def _damaged(parameter: PackedParameter, why: str) -> CheckpointError:
    return CheckpointError(f"{parameter.integers.path} is damaged: {why}")
