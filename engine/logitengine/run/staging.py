"""Several small host arrays in one buffer, so that one copy moves a step's inputs to the device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Alignment in bytes that vector loads of the kernels may rely on."""

Arrays = Mapping[str, NDArray[Any]]


class Layout:
    """Places of arrays of certain shapes and dtypes in a buffer of ``nbytes`` bytes."""

    def __init__(self, arrays: Arrays) -> None:
        self._fields: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        self.nbytes = 0
        for name, array in arrays.items():
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            nbytes = math.prod(array.shape) * array.itemsize
            self._fields[name] = (self.nbytes, nbytes, array.shape, dtype)
            self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def pack(self, arrays: Arrays, buffer: Tensor) -> None:
        """Copy the arrays into ``buffer``, a uint8 host tensor. Raises ValueError for an array of another shape."""
        target = buffer.numpy()
        for name, (start, nbytes, shape, _) in self._fields.items():
            array = arrays[name]
            if array.shape != shape:
                raise ValueError(f"{name} is {list(array.shape)}, the layout has {list(shape)}")
            target[start : start + nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the arrays as tensors that share ``buffer``, a uint8 tensor on any device."""
        return {
            name: buffer[start : start + nbytes].view(dtype).view(shape)
            for name, (start, nbytes, shape, dtype) in self._fields.items()
        }
