"""Safetensors files of a model's directory, checked by their headers and by the index of several. Free of torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from logitengine.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMES_SHOWN = 5
HEADER_SIZE_BYTES = 8
"""Bytes at the beginning of a file that hold the size of its header."""

COPIED_BUFFERS = re.compile(
    r"(.+\.)?(rotary_emb\.inv_freq|position_ids|causal_mask|(attn|attention)\.(masked_)?bias)"
)
"""What old checkpoints copied from buffers that follow from the config: frequencies, positions, causal masks."""

UNQUANTISED = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
"""Types of parameters, and of the counters and masks that some models have as buffers."""


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file, from the byte ``offset`` on; ``dtype`` is the format's name of it, such as BF16."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the model's weights, by name. Raises CheckpointError where they cannot be found.

    As transformers does, takes one file where there is one, and else those of the index. These lie in the directory.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    return [directory / name for name in sorted(set(_weight_map(directory).values()))]


def tensors_of(directory: Path) -> dict[str, FileTensor]:
    """Return the tensors of a model by name, as the headers of its files have them.

    Raises CheckpointError for a file that is cut off or is none of safetensors, and for an index that is wrong.
    """
    if (directory / WEIGHTS).is_file():
        return _header(directory / WEIGHTS)
    places = _weight_map(directory)
    held = {file: _header(directory / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in held[file]:
            raise CheckpointError(f"{directory / INDEX} says that {name} is in {file}, and it is not")
    return {name: held[file][name] for name, file in places.items()}


def refuse_quantised(tensors: Mapping[str, FileTensor]) -> None:
    """Raise CheckpointError for a tensor that is quantised, where no config says how.

    transformers would take its integers, or its 8-bit numbers without their scales, for the weights.
    """
    for tensor in tensors.values():
        if tensor.dtype not in UNQUANTISED and not COPIED_BUFFERS.fullmatch(tensor.name):
            raise CheckpointError(
                f"{tensor.path} cannot be served: {tensor.name} is {tensor.dtype}, and config.json has no "
                "quantization_config"
            )


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


def _header(path: Path) -> dict[str, FileTensor]:
    """Read the header, which the library checks against the file's size."""
    try:
        with safe_open(path, "numpy"), path.open("rb") as file:
            nbytes = int.from_bytes(file.read(HEADER_SIZE_BYTES), "little")
            header = json.loads(file.read(nbytes))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    header.pop("__metadata__", None)
    start = HEADER_SIZE_BYTES + nbytes
    return {
        name: FileTensor(name, path, part["dtype"], tuple(part["shape"]), start + part["data_offsets"][0])
        for name, part in header.items()
    }
