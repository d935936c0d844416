"""Lookup of token ids in an embedding as a GGUF file stores it."""

from __future__ import annotations

import torch
from torch import Tensor

from logitkernels.cpu.arguments import as_integers, threads_for
from logitkernels.cpu.library import Library
from logitkernels.cpu.linear import STORED, GgufType, check_raw
from logitkernels.weights import BlockWeight

NUMBERS = {"F32": (0, 4), "F16": (1, 2), "BF16": (30, 2)}
"""Types of numbers that are in no blocks: their numbers in the file, and bytes."""


class CpuEmbedding:
    """Rows of a weight [V, H] by their ids: int64 [T] -> float32 [T, H]. They are read from ``raw`` itself.

    The rows are those of gguf's own dequantisation, to the bit.
    """

    def __init__(self, library: Library, weight: BlockWeight) -> None:
        """Raise ValueError for bytes that do not fit the shape, or a format that is neither a number nor a `GgufType`."""
        if weight.format in NUMBERS:
            self._type, size = NUMBERS[weight.format]
            check_raw(weight, 1, size)
        elif weight.format in GgufType.__members__:
            self._type = GgufType[weight.format]
            check_raw(weight, *STORED[GgufType(self._type)])
        else:
            known = sorted({*NUMBERS, *GgufType.__members__})
            raise ValueError(f"{weight.format} is not among {', '.join(known)}")
        if weight.order is not None:
            raise ValueError("the rows of an embedding are read in the order of the file")
        self._library = library
        self._raw = weight.raw.contiguous()
        self._shape = weight.shape

    def __call__(self, ids: Tensor) -> Tensor:
        """Raise IndexError for an id outside [0, V)."""
        ids = as_integers(ids, torch.int64, "ids")
        (count,), (rows, columns) = ids.shape, self._shape
        out = torch.empty(count, columns)
        bad: int = self._library.embed(
            self._raw.data_ptr(),
            self._type,
            rows,
            columns,
            ids.data_ptr(),
            count,
            out.data_ptr(),
            threads_for(count),
        )
        if bad >= 0:
            raise IndexError(f"token id {int(ids[bad])} is outside an embedding of {rows} rows")
        return out
