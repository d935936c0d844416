"""Which tensors of a file make up the packed weight of a linear layer. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.safetensors_files import FileTensor
from logitengine.model.int4.config import WHOLE_ROW, Int4Config, Method

PER_WORD = 8
"""Integers of four bits in an int32."""

WORDS, FLOATS = ("I32",), ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a packed weight's tensors, after the name of its module."""

    integers: str
    scales: str
    zeros: str
    groups: str
    shape: str | None = None

    @property
    def all(self) -> frozenset[str]:
        return frozenset(filter(None, (self.integers, self.scales, self.zeros, self.groups, self.shape)))


GPTQ = Names("qweight", "scales", "qzeros", "g_idx")
NAMES: dict[Method, Names] = {
    "awq": GPTQ,
    "gptq": GPTQ,
    "compressed-tensors": Names(
        "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"
    ),
}


@dataclass(frozen=True, slots=True)
class DenseParameter:
    """A parameter in floating-point numbers."""

    tensor: FileTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def origin(self) -> str:
        """Name of the tensor that holds it."""
        return self.tensor.name


@dataclass(frozen=True, slots=True)
class PackedParameter:
    """The packed weight of a linear layer, [N, K].

    Attributes:
        num_groups: groups of a row, all of one size.
        integers, scales, zeros, groups, stored_shape: its tensors; ``groups`` holds the group of each column,
            and a file need not have the last three.
    """

    shape: tuple[int, int]
    num_groups: int
    integers: FileTensor
    scales: FileTensor
    zeros: FileTensor | None
    groups: FileTensor | None
    stored_shape: FileTensor | None

    @property
    def origin(self) -> str:
        """Name of the tensor that holds its integers."""
        return self.integers.name


Parameter = DenseParameter | PackedParameter


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """What config.json and the headers of a model with packed layers say.

    Attributes:
        members: members of config.json.
        packing: how the layers are packed.
        paths: the files that hold tensors, in order.
        parameters: the parameters by transformers' names of them.
    """

    members: dict[str, Any]
    packing: Int4Config
    paths: tuple[Path, ...]
    parameters: Mapping[str, Parameter]

    @classmethod
    def of(
        cls, members: dict[str, Any], packing: Int4Config, tensors: Mapping[str, FileTensor]
    ) -> PackedFiles:
        """Take what was read. Raises CheckpointError for tensors that do not fit each other."""
        paths = tuple(sorted({tensor.path for tensor in tensors.values()}))
        return cls(members, packing, paths, parameters_of(tensors, packing))


def parameters_of(tensors: Mapping[str, FileTensor], config: Int4Config) -> dict[str, Parameter]:
    """Return the parameters by transformers' names of them. Raises CheckpointError for tensors that do not fit each other."""
    names = NAMES[config.method]
    found: dict[str, Parameter] = {}
    packed: dict[str, dict[str, FileTensor]] = {}
    for tensor in tensors.values():
        module, _, own = tensor.name.rpartition(".")
        if own in names.all:
            packed.setdefault(module, {})[own] = tensor
        else:
            found[tensor.name] = DenseParameter(tensor)
    if not packed:
        path = next(iter(tensors.values())).path if tensors else "the file"
        raise CheckpointError(f"{path} is damaged: no layer is packed as its quantization_config says")
    for module, parts in packed.items():
        found[f"{module}.weight"] = _Layer(module, parts, names, config).parameter()
    return found


class _Layer:
    """The tensors of one packed layer, which are checked against each other."""

    def __init__(self, module: str, parts: dict[str, FileTensor], names: Names, config: Int4Config) -> None:
        self._module = module
        self._parts = parts
        self._names = names
        self._config = config

    def parameter(self) -> PackedParameter:
        names, method = self._names, self._config.method
        integers, scales = (
            self._tensor(name, dtypes, 2)
            for name, dtypes in ((names.integers, WORDS), (names.scales, FLOATS))
        )
        first, second = integers.shape
        by_row = method == "compressed-tensors"
        rows, depth = {
            "awq": (PER_WORD * second, first),
            "gptq": (second, PER_WORD * first),
            "compressed-tensors": (first, PER_WORD * second),
        }[method]
        num_groups = scales.shape[1] if by_row else scales.shape[0]
        self._expect(scales, (rows, num_groups) if by_row else (num_groups, rows), FLOATS)
        self._check_groups(depth, num_groups)
        zeros, groups, stored_shape = (
            self._parts.get(name) if name is not None else None
            for name in (names.zeros, names.groups, names.shape)
        )
        words = -(-rows // PER_WORD)
        if zeros is not None and by_row:
            # Old files hold them unpacked.
            lines = rows if zeros.dtype == "I8" else words
            self._expect(zeros, (lines, num_groups), ("I8", *WORDS))
        elif zeros is not None:
            self._expect(zeros, (num_groups, words), WORDS)
        elif not by_row or self._config.has_zeros:
            raise self._damaged(f"it has no {names.zeros}")
        if groups is not None:
            self._expect(groups, (depth,), WORDS)
        if stored_shape is not None:
            self._expect(stored_shape, (2,), ("I64", "I32"))
        return PackedParameter((rows, depth), num_groups, integers, scales, zeros, groups, stored_shape)

    def _tensor(self, name: str, dtypes: Iterable[str], dimensions: int) -> FileTensor:
        tensor = self._parts.get(name)
        if tensor is None:
            raise self._damaged(f"it has no {name}")
        if len(tensor.shape) != dimensions or 0 in tensor.shape or tensor.dtype not in dtypes:
            raise self._damaged(f"its {name} is {tensor.dtype} {list(tensor.shape)}")
        return tensor

    def _expect(self, tensor: FileTensor, shape: tuple[int, ...], dtypes: Iterable[str]) -> None:
        if tensor.shape != shape or tensor.dtype not in dtypes:
            own = tensor.name.rpartition(".")[2]
            raise self._damaged(
                f"its {own} is {tensor.dtype} {list(tensor.shape)}; {' or '.join(dtypes)} {list(shape)} fits "
                f"its {self._names.integers}"
            )

    def _check_groups(self, depth: int, num_groups: int) -> None:
        sizes = {depth if size == WHOLE_ROW else size for size in self._config.group_sizes}
        size = next((size for size in sizes if -(-depth // size) == num_groups), None)
        if size is None:
            listed = " or ".join(str(size) for size in sorted(sizes))
            raise self._damaged(
                f"its {depth} columns are in {num_groups} groups, and groups have {listed} columns by the "
                "quantization_config"
            )
        if depth % size or size % 32:
            raise CheckpointError(
                f"{self._path} cannot be served: {self._module} has {depth} columns in groups of {size}; groups "
                "of one size are served, in multiples of 32"
            )

    @property
    def _path(self) -> str:
        return str(next(iter(self._parts.values())).path)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged: {self._module} is packed, and {why}")
