"""Safetensors files of a model's directory, and the index that names the file of each tensor. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from logitengine.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file; ``dtype`` is the format's name of it, such as BF16."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]


def tensors_of(directory: Path) -> dict[str, FileTensor]:
    """Return the tensors of a model by name, as the headers of its files have them.

    Raises CheckpointError for a header that its file does not fit, an index that is no index, and one that names
    a file or a tensor that is not there.
    """
    if (directory / WEIGHTS).is_file():
        return {tensor.name: tensor for tensor in _header(directory / WEIGHTS)}
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}")
    places = _places(index)
    headers = {
        file: {tensor.name: tensor for tensor in _header(directory / file)} for file in set(places.values())
    }
    for name, file in places.items():
        if name not in headers[file]:
            raise CheckpointError(f"{index} is damaged: {file} holds no tensor {name}")
    return {name: headers[file][name] for name, file in places.items()}


def _places(index: Path) -> dict[str, str]:
    """Read the index: names of files, by the names of tensors."""
    try:
        fields = json.loads(index.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{index} is not valid JSON: {error}") from error
    places = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} is damaged: it holds no weight_map")
    for name, file in places.items():
        if not isinstance(file, str) or file in {"", ".", ".."} or Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{index} is damaged: {file!r}, for {name}, is no file of its directory")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index} names {file}, which is not there")
    return places


def _header(path: Path) -> Iterator[FileTensor]:
    """Read the header, which the library checks against the file's size."""
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                part = file.get_slice(name)
                yield FileTensor(name, path, part.get_dtype(), tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
