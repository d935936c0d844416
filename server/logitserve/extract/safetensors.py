"""A writer of parts as one safetensors file: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from logitserve.extract.errors import UsageError
from logitserve.extract.parquet import read_groups

LONGEST_HEADER = 100_000_000
"""Bytes of the largest header that readers of the format accept."""

NAMES = {pa.int64(): "I64", pa.int32(): "I32", pa.float32(): "F32", pa.float16(): "F16", pa.uint16(): "BF16"}
"""Names of the format's dtypes. uint16 columns are always the bits of bfloat16."""

FILLS = {"token_id": -1, "logprob": float("nan")}
"""Values that replace null, which tensors lack."""


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: list[int]
    itemsize: int

    @property
    def nbytes(self) -> int:
        nbytes = self.itemsize
        for size in self.shape:
            nbytes *= size
        return nbytes


def check_ids(ids: list[str]) -> None:
    """Check that all ids fit the header. Raises UsageError."""
    if len(orjson.dumps(ids)) > LONGEST_HEADER // 2:
        msg = "the ids are too many for a safetensors header: write .parquet"
        raise UsageError(msg)


def write_safetensors(parts: list[Path], schema: pa.Schema, ids: list[str], path: Path) -> None:
    """Write a tensor for each column but ``id``. The metadata holds ``ids`` as JSON. Memory holds one row group."""
    num_rows = sum(pq.read_metadata(part).num_rows for part in parts)
    # With the widest first, every tensor is aligned to its items.
    tensors = sorted(
        (_tensor(field, num_rows) for field in schema if field.name != "id"),
        key=lambda tensor: -tensor.itemsize,
    )
    with path.open("wb") as file:
        file.write(_header(tensors, schema, ids))
        for tensor in tensors:
            for batch in read_groups(parts, [tensor.name]):
                file.write(_values(batch.column(0), tensor).data)


def _tensor(field: pa.Field, num_rows: int) -> _Tensor:
    kind, shape = field.type, [num_rows]
    if pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return _Tensor(field.name, NAMES[kind], shape, kind.bit_width // 8)


def _header(tensors: list[_Tensor], schema: pa.Schema, ids: list[str]) -> bytes:
    """Return the JSON's length as eight bytes, and the JSON, padded so that the data is aligned."""
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    # Arrow's own copy of the schema does not describe tensors.
    metadata.pop("ARROW:schema", None)
    header: dict[str, Any] = {"__metadata__": {**metadata, "ids": orjson.dumps(ids).decode()}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _values(column: pa.Array, tensor: _Tensor) -> NDArray[Any]:
    """Return a column's numbers, little-endian. They are copied only where there are nulls."""
    if pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    elif tensor.name in FILLS:
        column = column.fill_null(pa.scalar(FILLS[tensor.name], column.type))
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))
