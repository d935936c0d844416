"""Sources of weights for a model's linear layers: its own parameters, or another source's rounded to blocks."""

from __future__ import annotations

from typing import Protocol

import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from logitkernels import BlockWeight, DenseWeight, Weight
from logitkernels.int4 import round_to_int4
from torch import Tensor, nn

from logitengine.model.network.experts import is_stacked, parse_expert, stacked_weight

BLOCK_WEIGHTS = 32


class WeightSource(Protocol):
    """Weights [N, K] by the name of the model's parameter, or of an expert's matrix (see ``experts.py``)."""

    def has_blocks(self, name: str) -> bool:
        """Whether `get` returns this weight in blocks."""

    def get(self, name: str) -> Weight: ...


class ModelWeights:
    """A model's own parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def has_blocks(self, name: str) -> bool:  # noqa: ARG002 - it has none at all
        return False

    def get(self, name: str) -> DenseWeight:
        """Return the weight. Raises AttributeError for a name that the model does not have."""
        expert = parse_expert(name)
        if expert is not None and is_stacked(module := self._model.get_submodule(expert.module)):
            return DenseWeight(name, stacked_weight(module, expert).detach())
        return DenseWeight(name, self._model.get_parameter(name).detach())


class Int8Weights:
    """Weights of another source in blocks of Q8_0: 32 int8 along K under one float16 scale. Made on request."""

    def __init__(self, source: WeightSource) -> None:
        """Round the weights of ``source``, which are dense."""
        self._source = source

    def has_blocks(self, name: str) -> bool:  # noqa: ARG002 - it has nothing else
        return True

    def get(self, name: str) -> BlockWeight:
        """Return the blocks. Raises ValueError for a weight whose rows are not a whole number of blocks."""
        numbers = _whole_blocks(self._source.get(name), "int8")
        rows, columns = numbers.shape
        raw = quantize(numbers.float().cpu().numpy(), GGMLQuantizationType.Q8_0)
        return BlockWeight(name, torch.from_numpy(raw), "Q8_0", (rows, columns))


class Int4Weights:
    """Weights of another source in blocks of INT4_32: 32 int4 along K, a float32 scale and a zero. Made on request."""

    def __init__(self, source: WeightSource) -> None:
        """Round the weights of ``source``, which are dense."""
        self._source = source

    def has_blocks(self, name: str) -> bool:  # noqa: ARG002 - it has nothing else
        return True

    def get(self, name: str) -> BlockWeight:
        """Return the blocks. Raises ValueError for a weight whose rows are not a whole number of blocks."""
        return round_to_int4(name, _whole_blocks(self._source.get(name), "int4").cpu(), BLOCK_WEIGHTS)


def _whole_blocks(weight: Weight, form: str) -> Tensor:
    """Return the numbers of a dense weight that blocks divide."""
    if not isinstance(weight, DenseWeight):
        raise TypeError(f"{weight.name} is in blocks of {weight.format}; {form} is made of dense weights")
    columns = weight.shape[1]
    if columns % BLOCK_WEIGHTS:
        raise ValueError(
            f"{weight.name} has {columns} input features; {form} takes multiples of {BLOCK_WEIGHTS}"
        )
    return weight.tensor
