"""The header of a GGUF file: metadata, and where its tensors lie. Free of torch.

A file comes from anywhere. Every count, length, offset and dimension is checked against the file's size before
anything is allocated for it, and long arrays stay in the file until they are asked for.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from logitengine.errors import CheckpointError
from logitengine.model.gguf.tensor_types import TENSOR_TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
START = struct.Struct("<4sIQQ")
"""Magic, version, number of tensors, number of metadata entries."""

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
STRING, ARRAY = 8, 9
NUMBERS = {
    number: np.dtype(name)
    for number, name in enumerate(
        ["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8"]
    )
    if name is not None
}
"""Types of metadata values that are numbers, by their numbers in the file."""

LEAST_ENTRY_BYTES = 8 + 4 + 1
LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
MOST_DIMENSIONS = 4
MOST_NAME_BYTES = 65535
DEFAULT_ALIGNMENT, MOST_ALIGNMENT = 32, 1 << 20
MOST_WEIGHTS = 1 << 62
MOST_PARTS = 9999
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class StringArray:
    """Array of strings that stays in the file until it is read."""

    data: mmap.mmap
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        """Yield the strings. Bytes that are no UTF-8 are replaced."""
        place, data, read_length = self.start, self.data, U64.unpack_from
        for _ in range(self.count):
            (length,) = read_length(data, place)
            place += 8 + length
            yield data[place - length : place].decode("utf-8", "replace")


Value = bool | int | float | str | NDArray[np.generic] | StringArray


@dataclass(frozen=True, slots=True)
class Tensor:
    """Place of a tensor: ``shape`` as torch has it (rows before columns), ``offset`` from the start of ``path``."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata and tensors of a model; ``paths`` are its files, in order, if it is split."""

    paths: list[Path]
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]

    @property
    def path(self) -> Path:
        """The file that the model is named by."""
        return self.paths[0]


def read_header(path: Path) -> Header:
    """Read the header of ``path``, and of the other parts of a split model. Raises CheckpointError."""
    header = _read_part(path)
    count = _integer(header, "split.count", 1)
    if count <= 1:
        _check_not_empty(header)
        return header
    if count > MOST_PARTS:
        raise CheckpointError(f"{path} is damaged: split.count is {count}, above {MOST_PARTS}")
    parts = [header]
    for index, part_path in enumerate(_part_paths(path, count)):
        if index == 0:
            if _integer(header, "split.no", 0) != 0:
                raise CheckpointError(f"{path} is not the first part of its model: name {part_path}")
            continue
        if not part_path.is_file():
            raise CheckpointError(f"{path} is the first of {count} parts, and there is no file {part_path}")
        part = _read_part(part_path)
        if (found := (_integer(part, "split.no", 0), _integer(part, "split.count", 1))) != (index, count):
            raise CheckpointError(
                f"{part_path} says that it is part {found[0] + 1} of {found[1]}; its name says {index + 1} of {count}"
            )
        parts.append(part)
    return _join(parts)


def _part_paths(path: Path, count: int) -> list[Path]:
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match["parts"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model, which are found by their names: NAME-00001-of-{count:05}.gguf"
        )
    return [path.with_name(f"{match['stem']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]


def _join(parts: list[Header]) -> Header:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        _check_not_empty(part)
        if repeated := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{part.path} is damaged: {repeated[0]} is in another part too")
        tensors |= part.tensors
    expected = _integer(parts[0], "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{parts[0].path} is damaged: split.tensors.count is {expected}, and its parts have {len(tensors)}"
        )
    return Header([part.path for part in parts], parts[0].metadata, tensors)


def _integer(header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{header.path} is damaged: {key} is no count")
    return value


def _read_part(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < START.size:
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with a GGUF header")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _Reader(path, data).read()


class _Reader:
    """Reads one file's header from its start, never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._place = 0

    def read(self) -> Header:
        magic, version, num_tensors, num_entries = START.unpack_from(self._data)
        if magic != MAGIC:
            raise CheckpointError(f"{self._path} is no GGUF file: it does not begin with a GGUF header")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self._path} has GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} can be read"
            )
        self._place = START.size
        self._check_count(num_entries, LEAST_ENTRY_BYTES, "metadata entries")
        self._check_count(num_tensors, LEAST_TENSOR_BYTES, "tensors")
        metadata: dict[str, Value] = {}
        for _ in range(num_entries):
            key = self._name("a metadata key")
            if key in metadata:
                raise self._damaged(f"{key} is in its metadata twice")
            metadata[key] = self._value(key, self._u32())
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment not in {1 << power for power in range(21)}:
            raise self._damaged(f"general.alignment is no power of two up to {MOST_ALIGNMENT}")
        tensors: dict[str, Tensor] = {}
        for _ in range(num_tensors):
            tensor = self._tensor(alignment)
            if tensor.name in tensors:
                raise self._damaged(f"it has tensor {tensor.name} twice")
            tensors[tensor.name] = tensor
        start = -(-self._place // alignment) * alignment
        placed = {name: self._placed(tensor, start) for name, tensor in tensors.items()}
        self._check_places(placed, start, alignment)
        return Header([self._path], metadata, placed)

    def _value(self, key: str, kind: int) -> Value:
        if kind in NUMBERS:
            value: bool | int | float = self._numbers(NUMBERS[kind], 1)[0].item()
            return value
        if kind == STRING:
            return self._take(self._u64(), key).decode("utf-8", "replace")
        if kind != ARRAY:
            raise self._damaged(f"{key} has type {kind}, which is unknown")
        kind, count = self._u32(), self._u64()
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind], count)
        if kind != STRING:
            raise self._damaged(f"{key} is an array of type {kind}, which is not read")
        return self._strings(key, count)

    def _strings(self, key: str, count: int) -> StringArray:
        self._check_count(count, U64.size, f"strings in {key}")
        place, last, data, read_length = self._place, self._size - U64.size, self._data, U64.unpack_from
        for _ in range(count):
            if place > last:
                raise self._damaged(f"it ends within {key}")
            place += U64.size + read_length(data, place)[0]
        if place > self._size:
            raise self._damaged(f"it ends within {key}")
        strings = StringArray(self._data, self._place, count)
        self._place = place
        return strings

    def _tensor(self, alignment: int) -> Tensor:
        """Read a tensor's entry; its offset counts from the start of the tensors' data."""
        name = self._name("a tensor's name")
        num_dimensions = self._u32()
        if not 1 <= num_dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"{name} has {num_dimensions} dimensions; 1 to {MOST_DIMENSIONS} can be read")
        shape = tuple(self._u64() for _ in range(num_dimensions))[::-1]
        kind, offset = self._u32(), self._u64()
        if kind not in TENSOR_TYPES:
            raise CheckpointError(f"{self._path}: {name} has type {kind}, which cannot be read")
        tensor_type = TENSOR_TYPES[kind]
        if 0 in shape or prod(shape) > MOST_WEIGHTS or shape[-1] % tensor_type.weights:
            raise self._damaged(
                f"{name} is {list(shape)}, and rows of {tensor_type.name} are multiples of {tensor_type.weights}"
            )
        if offset % alignment:
            raise self._damaged(f"{name} is at {offset}, which is no multiple of {alignment}")
        nbytes = prod(shape) // tensor_type.weights * tensor_type.nbytes
        return Tensor(name, shape, tensor_type, self._path, offset, nbytes)

    def _placed(self, tensor: Tensor, start: int) -> Tensor:
        offset = start + tensor.offset
        if offset + tensor.nbytes > self._size:
            raise self._damaged(
                f"{tensor.name} takes {tensor.nbytes} bytes from {offset} on, and the file has {self._size}"
            )
        return Tensor(tensor.name, tensor.shape, tensor.type, tensor.path, offset, tensor.nbytes)

    def _check_places(self, tensors: dict[str, Tensor], start: int, alignment: int) -> None:
        """Check that tensors follow one another, as llama.cpp does: so a wrong type, shape or name shows itself."""
        end, before = start, "its header"
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            gap = tensor.offset - end
            if gap < 0:
                raise self._damaged(f"tensors {before} and {tensor.name} overlap")
            if gap >= alignment:
                raise self._damaged(f"{gap} bytes between {before} and {tensor.name} belong to no tensor")
            end, before = tensor.offset + tensor.nbytes, tensor.name

    def _name(self, what: str) -> str:
        length = self._u64()
        if not 0 < length <= MOST_NAME_BYTES:
            raise self._damaged(f"{what} has {length} bytes")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is no UTF-8") from error

    def _numbers(self, dtype: np.dtype[np.generic], count: int) -> NDArray[np.generic]:
        self._check_count(count, dtype.itemsize, "numbers")
        # A bool may hold any byte; numpy's may not.
        stored = np.dtype("u1") if dtype == np.bool_ else dtype
        numbers = np.frombuffer(self._data, stored, count, self._place)
        self._place += count * dtype.itemsize
        return numbers != 0 if dtype == np.bool_ else numbers

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self._size - self._place:
            raise self._damaged(f"it counts {count} {what}, and has {self._size} bytes")

    def _u32(self) -> int:
        number: int = U32.unpack(self._take(U32.size, "its header"))[0]
        return number

    def _u64(self) -> int:
        number: int = U64.unpack(self._take(U64.size, "its header"))[0]
        return number

    def _take(self, length: int, what: str) -> bytes:
        end = self._place + length
        if end > self._size:
            raise self._damaged(f"it ends within {what}")
        taken = self._data[self._place : end]
        self._place = end
        return taken

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged: {why}")


def _check_not_empty(header: Header) -> None:
    if not header.tensors and "split.count" not in header.metadata:
        raise CheckpointError(f"{header.path} is damaged: it has no tensors")
