"""Weights by name, and the linear layers that a backend packs from them.

A layer remembers which of its rows belong to which weight, so that a weight can be replaced in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """Weight [N, K] as a tensor of floating-point numbers."""

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """Weight [N, K] in blocks along K, as GGUF files or int4.py lay them out: ``raw`` is uint8 [N, bytes of a row].

    ``format`` is GGUF's name of the type, such as Q4_K, or one of int4.py. A backend's ``block_formats`` are those that it
    multiplies. ``raw`` may be a mapped file: packing copies it. ``order``, int64 [N], holds for each row of the weight its
    place in ``raw``, where they differ.
    """

    name: str
    raw: Tensor
    format: str
    shape: tuple[int, int]
    order: Tensor | None = None


Weight = DenseWeight | BlockWeight


class Linear(ABC):
    """Linear layer ``x @ weight.T + bias``, [T, K] -> [T, N] in the dtype of ``x``, accumulated in float32 or better.

    Attributes:
        parts: rows of each weight, by its name, in the order in which the weights are stacked.
        in_features, out_features: K and N.
        input_dtype: dtype that ``x`` is converted to, or None if ``x`` is read unconverted.
        block_format: format of the weight if it is one weight that is kept in blocks, of which
            ``Kernels.embedding`` can look up rows; else None.
    """

    parts: dict[str, slice]
    in_features: int
    out_features: int
    input_dtype: torch.dtype | None = None
    block_format: str | None = None

    def __init__(self, weights: Sequence[Weight], bias: Tensor | None) -> None:
        """Raise ValueError for weights and a bias that do not fit each other."""
        if not weights or any(len(weight.shape) != 2 or 0 in weight.shape for weight in weights):
            shapes = [list(weight.shape) for weight in weights]
            raise ValueError(f"weights are {shapes}; they must be [N, K] with both above zero")
        if len({weight.shape[1] for weight in weights}) > 1 or len({w.name for w in weights}) < len(weights):
            described = ", ".join(f"{weight.name} {list(weight.shape)}" for weight in weights)
            raise ValueError(f"{described} cannot be stacked: they must have one K and a name each")
        self.parts, end = {}, 0
        for weight in weights:
            self.parts[weight.name] = slice(end, end + weight.shape[0])
            end += weight.shape[0]
        self.in_features, self.out_features = weights[0].shape[1], end
        if bias is not None and bias.shape != (end,):
            raise ValueError(f"bias is {list(bias.shape)}; {end} output features need [{end}]")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layer's weights, in order."""
        return tuple(self.parts)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


def stack_dense(weights: Sequence[Weight]) -> Tensor:
    """Stack the rows of dense weights, [N, K]. Raises ValueError for weights in blocks."""
    dense = [weight.tensor.detach() for weight in weights if isinstance(weight, DenseWeight)]
    if len(dense) < len(weights):
        blocks = ", ".join(weight.name for weight in weights if isinstance(weight, BlockWeight))
        raise ValueError(f"these kernels do not multiply weights in blocks, as {blocks} are")
    return dense[0] if len(dense) == 1 else torch.cat(dense)
