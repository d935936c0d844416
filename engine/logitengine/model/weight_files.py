"""Files of a directory's weights, checked by their headers and their index. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from logitengine.errors import CheckpointError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
NAMES_SHOWN = 5


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the model's weights, by name. Raises CheckpointError where they cannot be found.

    As transformers does, takes one file where there is one, and else those of the index. These lie in the directory.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    return [directory / name for name in sorted(set(_weight_map(directory).values()))]


def check_weight_files(directory: Path) -> None:
    """Read the headers of the weights' files, and see that each tensor is where the index says.

    Raises CheckpointError for a file that is cut off or is none of safetensors, and for an index that is wrong.
    """
    held = {file: _tensor_names(file) for file in weight_files(directory)}
    if (directory / WEIGHTS).is_file():
        return
    for name, file in _weight_map(directory).items():
        if name not in held[directory / file]:
            raise CheckpointError(f"{directory / INDEX} says that {name} is in {file}, and it is not")


def some(names: Collection[str]) -> str:
    """Return the first names, and how many there are beside them."""
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(sorted(names)[:NAMES_SHOWN]) + rest


def _weight_map(directory: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index has it."""
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}: other formats of weights are not read"
        )
    try:
        found = json.loads(index.read_bytes())["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of weights: {error!r}") from error
    for tensor, name in found:
        if not isinstance(name, str) or Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{index} names {name!r} for {tensor}, which is no file in {directory}")
    if not found:
        raise CheckpointError(f"{index} is not an index of weights: it names none")
    return dict(found)


def _tensor_names(file: Path) -> frozenset[str]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return frozenset(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
