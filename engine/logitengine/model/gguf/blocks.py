"""Numbers of tensors in a mapped GGUF file."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor as Numbers

from logitengine.model.gguf.header import Tensor

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types whose numbers torch has itself."""

CHUNK_BYTES = 1 << 22
"""Bytes of blocks that are dequantised at a time."""


def mapped(tensor: Tensor) -> Numbers:
    """Map the tensor's bytes, uint8 [rows, bytes of a row]; a view of the file until something writes to it.

    Pages leave the process with the last reference to what this returns.
    """
    rows = tensor.nbytes // row_bytes(tensor)
    # Mode "c" reads like "r", and torch takes it without a warning.
    raw = np.memmap(tensor.path, np.uint8, "c", tensor.offset, (rows, row_bytes(tensor)))
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
    kind = GGMLQuantizationType[type_name]
    rows = max(1, CHUNK_BYTES // raw.shape[1])
    out: Numbers | None = None
    for start in range(0, len(raw), rows):
        part = torch.from_numpy(dequantize(raw[start : start + rows].numpy(), kind))
        if out is None:
            out = torch.empty(len(raw), part.shape[1], dtype=dtype)
        out[start : start + rows] = part
    assert out is not None  # noqa: S101 - a tensor has a row
    return out


def in_head_order(raw: Numbers, heads: int) -> Numbers:
    """Return rows of rotary pairs in the order of transformers: the first of each pair before the second ones."""
    order = torch.arange(len(raw)).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    return raw[order]
