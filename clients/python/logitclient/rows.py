"""Rows of numbers, from the wire's blocks to numpy and torch."""

from __future__ import annotations

import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logitclient.errors import DecodeError, MissingDependencyError

if TYPE_CHECKING:
    import torch

STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    # The bits of bfloat16, which numpy lacks.
    "bfloat16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
}
FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows ``values`` [rows, columns]. Where columns were chosen, ``token_ids`` int32 [rows, columns] names them.

    ``dtype`` is the wire's: "float32", "float16" or "bfloat16". bfloat16 is held as float32, which loses nothing.
    ``offset`` is the prompt position of the first row, 0 for generated rows.
    """

    values: NDArray[Any]
    token_ids: NDArray[np.int32] | None = None
    offset: int = 0
    dtype: str = "float32"

    def __len__(self) -> int:
        return len(self.values)

    def to_torch(self) -> torch.Tensor:
        """Return a copy of ``values`` as a tensor of ``dtype``. Raises MissingDependencyError without torch."""
        try:
            import torch
        except ImportError as error:
            raise MissingDependencyError("torch", "torch") from error
        tensor = torch.from_numpy(self.values.astype(self.values.dtype.newbyteorder("=")))
        return tensor.to(torch.bfloat16) if self.dtype == "bfloat16" else tensor


def decode_block(block: Any, *, null: float = math.nan) -> Rows:
    """Return the rows of one block of the wire. ``null`` replaces a null in a list.

    Raises DecodeError when the block contradicts itself. The shape alone allocates nothing.
    """
    if not isinstance(block, Mapping):
        raise DecodeError(f"a block is {type(block).__name__}, not an object")
    shape, dtype = _shape(block.get("shape")), block.get("dtype")
    if dtype not in FLOATS:
        raise DecodeError(f"a block's dtype is {dtype!r}, not one of {', '.join(FLOATS)}")
    offset = block.get("offset", 0)
    if not _is_count(offset):
        raise DecodeError(f"a block's offset is {offset!r}")
    has_columns = "values" in block
    data = block.get("values" if has_columns else "data")
    match block.get("encoding"):
        case "base64":
            values = from_base64(data, dtype, shape)
            token_ids = from_base64(block.get("token_ids"), "int32", shape) if has_columns else None
        case "list":
            values = _floats(data, dtype, shape, null)
            token_ids = _integers(block.get("token_ids"), shape) if has_columns else None
        case encoding:
            raise DecodeError(f"a block's encoding is {encoding!r}, not base64 or list")
    return Rows(values, token_ids, offset, dtype)


def from_base64(data: Any, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the array in little-endian, row-major base64. It is read-only, but for bfloat16. Raises DecodeError."""
    if not isinstance(data, str):
        raise DecodeError(f"base64 data is {type(data).__name__}, not a string")
    try:
        raw = binascii.a2b_base64(data, strict_mode=True)
    except ValueError as error:
        raise DecodeError(f"base64 data is malformed: {error}") from error
    storage = STORAGE[dtype]
    wanted = math.prod(shape) * storage.itemsize
    if len(raw) != wanted:
        raise DecodeError(f"{list(shape)} of {dtype} is {wanted} bytes, but {len(raw)} came")
    return widen(np.frombuffer(raw, storage).reshape(shape), dtype)


def widen(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return ``stored`` itself, or float32 for the bits of bfloat16."""
    if dtype != "bfloat16":
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


def _shape(shape: Any) -> tuple[int, int]:
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_count, shape)):
        raise DecodeError(f"a block's shape is {shape!r}, not [rows, columns]")
    return shape[0], shape[1]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _floats(data: Any, dtype: str, shape: tuple[int, int], null: float) -> NDArray[Any]:
    # A list of bfloat16 holds decimals of their float32 values.
    target = np.dtype(np.float16 if dtype == "float16" else np.float32)
    try:
        wide = np.asarray(data, np.float64)
        with np.errstate(over="raise"):
            values = wide.astype(target)
    except (TypeError, ValueError, FloatingPointError) as error:
        raise DecodeError(f"a list of {dtype} is malformed: {error}") from error
    values = _shaped(values, shape)
    # JSON lacks NaN, so every NaN here was a null.
    values[np.isnan(values)] = null
    return values


def _integers(data: Any, shape: tuple[int, int]) -> NDArray[np.int32]:
    try:
        wide = np.asarray(data)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"a list of token ids is malformed: {error}") from error
    if wide.size and (wide.dtype.kind not in "iu" or wide.min() < 0 or wide.max() > np.iinfo(np.int32).max):
        raise DecodeError("a list of token ids holds something else")
    return _shaped(wide.astype(np.int32), shape)


def _shaped(array: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    # No rows are written as [], without their columns.
    if shape[0] == 0 and array.shape == (0,):
        return array.reshape(shape)
    if array.shape != shape:
        raise DecodeError(f"a list has the shape {list(array.shape)}, and says {list(shape)}")
    return array
