"""Lookup of token ids in an embedding as a GGUF file stores it, or as it is packed for the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from logitkernels.cpu.arguments import as_integers, threads_for
from logitkernels.cpu.library import Library
from logitkernels.cpu.linear import STORED, CpuLinear, GgufType, check_raw
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
        rows, columns = self._shape
        return _look_up(
            partial(self._library.embed, self._raw.data_ptr(), self._type, rows, columns), ids, rows, columns
        )


class CpuPackedEmbedding:
    """The same rows in the memory of a layer that is one weight in blocks."""

    def __init__(self, library: Library, linear: CpuLinear) -> None:
        self._library = library
        self._linear = linear

    def __call__(self, ids: Tensor) -> Tensor:
        """Raise IndexError for an id outside [0, V)."""
        linear = self._linear
        embed = partial(self._library.embed_packed, linear.struct.parts, linear.in_features)
        return _look_up(embed, ids, linear.out_features, linear.in_features)


def _look_up(embed: Callable[..., int], ids: Tensor, rows: int, columns: int) -> Tensor:
    """Call ``embed`` with ids, their number, the place for the rows, and threads. It returns the place of a bad id."""
    ids = as_integers(ids, torch.int64, "ids")
    (count,) = ids.shape
    out = torch.empty(count, columns)
    bad = embed(ids.data_ptr(), count, out.data_ptr(), threads_for(count))
    if bad >= 0:
        raise IndexError(f"token id {int(ids[bad])} is outside an embedding of {rows} rows")
    return out
