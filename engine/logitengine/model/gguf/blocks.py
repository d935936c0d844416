"""Numbers of tensors in a mapped GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray
from torch import Tensor as Numbers

from logitengine.model.gguf.header import Tensor
from logitengine.model.gguf.tensor_types import TENSOR_TYPES

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose numbers torch has itself."""

TYPES = {kind.name: kind for kind in TENSOR_TYPES.values()}

CHUNK_BYTES = 1 << 22
"""Bytes of blocks that are dequantised at a time."""

FEW_BYTES = 1 << 15
"""Bytes of blocks of a few rows, whose numbers fit a cache."""


def mapped(tensor: Tensor, rows: slice | None = None) -> Numbers:
    """Map the bytes of the tensor or of ``rows`` of it, uint8 [rows, bytes of a row]; a view of the file until something writes to it.

    Pages leave the process with the last reference to what this returns.
    """
    start, stop, _ = (rows or slice(None)).indices(tensor.nbytes // row_bytes(tensor))
    offset = tensor.offset + start * row_bytes(tensor)
    # Mode "c" reads like "r", and torch takes it without a warning.
    raw = np.memmap(tensor.path, np.uint8, "c", offset, (stop - start, row_bytes(tensor)))
    return torch.from_numpy(raw)


def row_bytes(tensor: Tensor) -> int:
    return tensor.shape[-1] // tensor.type.weights * tensor.type.nbytes


def to_dense(raw: Numbers, type_name: str, dtype: torch.dtype) -> Numbers:
    """Return the weights of blocks, uint8 [rows, bytes of a row] -> ``dtype`` [rows, columns].

    They are computed in float32, as gguf's own code does, and rounded once.
    """
    if type_name in FLOATS:
        # The copy is aligned; a file need not be.
        return raw.contiguous().clone().view(FLOATS[type_name]).to(dtype)
    if raw.numel() <= FEW_BYTES:
        return torch.from_numpy(_few_rows(raw.numpy(), type_name)).to(dtype)
    kind, rows = TYPES[type_name], max(1, CHUNK_BYTES // raw.shape[1])
    out = torch.empty(len(raw), raw.shape[1] // kind.nbytes * kind.weights, dtype=dtype)
    for start in range(0, len(raw), rows):
        with np.errstate(all="ignore"):  # a block may hold any bits
            part = quants.dequantize(raw[start : start + rows].numpy(), GGMLQuantizationType[type_name])
        out[start : start + rows] = torch.from_numpy(part)
    return out


def _few_rows(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """Dequantise by gguf's code for arrays of blocks, without its loop over groups of rows: half the time for one row."""
    kind: Any = getattr(quants, type_name)
    kind.init_grid()
    with np.errstate(all="ignore"):
        blocks: NDArray[np.float32] = kind.dequantize_blocks(raw.reshape(-1, TYPES[type_name].nbytes))
    return blocks.reshape(len(raw), -1)


def head_order(rows: int, heads: int) -> Numbers:
    """Return the places of rows of rotary pairs in the order of transformers, int64 [rows]: the first of each pair
    before the second ones.
    """
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
