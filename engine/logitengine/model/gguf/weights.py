"""Weights of a GGUF file's linear layers and embedding, as the file has them or dequantised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from logitkernels import BlockWeight, DenseWeight, Kernels, Linear, Weight
from torch import Tensor as Numbers

from logitengine.model.gguf.blocks import FLOATS, head_order, mapped, to_dense
from logitengine.model.gguf.header import Tensor
from logitengine.model.gguf.tensors import Layout, Parameter
from logitengine.model.network.experts import parse_expert

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix of the file: a parameter's first tensor, or the ``rows`` of one expert in one of them."""

    parameter: Parameter
    tensor: Tensor
    rows: slice | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the tensor has all rows of the matrix."""
        is_one = len(self.parameter.tensors) == 1 and self.parameter.layout is Layout.JOINED
        return is_one or self.rows is not None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor.shape[-2:]
        return rows, columns

    @property
    def order(self) -> Numbers | None:
        """For each row of the matrix its place in the file, where they differ."""
        return head_order(self.shape[0], self.parameter.pairs) if self.parameter.pairs else None

    def raw(self) -> Numbers:
        """Return the bytes, uint8, the rows in the model's order."""
        return _raw(self.parameter, self.tensor, self.rows)


class GgufWeights:
    """Parameters by the names of transformers' model, read when they are asked for."""

    def __init__(
        self,
        parameters: dict[str, Parameter],
        dtype: torch.dtype,
        device: torch.device,
        block_formats: frozenset[str] = frozenset(),
        told: set[str] | None = None,
    ) -> None:
        """Hand out blocks in ``block_formats`` as they are, and all other weights in ``dtype`` on ``device``.

        ``told`` holds the formats of which the log has said that they are dequantised.
        """
        self._told = set() if told is None else told
        self._parameters = parameters
        self._dtype = dtype
        self._device = device
        self._block_formats = block_formats

    def has_blocks(self, name: str) -> bool:
        """Whether `get` returns the weight in blocks. Raises KeyError for a name that the model does not have."""
        found = self._find(name)
        return found.is_whole and found.tensor.type.name in self._block_formats

    def get(self, name: str) -> Weight:
        """Return a weight [N, K], of the model's parameters or of an expert in one.

        Raises KeyError for a name that the model does not have.
        """
        found = self._find(name)
        kind = found.tensor.type.name
        if self.has_blocks(name):
            return BlockWeight(name, mapped(found.tensor, found.rows), kind, found.shape, found.order)
        if name in self._parameters:
            return DenseWeight(name, self.dense(name))
        self._tell(kind, self._dtype)
        return DenseWeight(name, to_dense(found.raw(), kind, self._dtype).to(self._device))

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Numbers:
        """Return a parameter of any shape in numbers, in the model's dtype unless another is named."""
        parameter = self._parameters[name]
        dtype = dtype or self._dtype
        parts = []
        for tensor in parameter.tensors:
            self._tell(tensor.type.name, dtype)
            numbers = to_dense(
                _raw(parameter, tensor), tensor.type.name, torch.float32 if parameter.shift else dtype
            )
            parts.append((numbers - parameter.shift).to(dtype).view(tensor.shape))
        return _arranged(parts, parameter.layout).to(self._device)

    def _find(self, name: str) -> _Matrix:
        expert = parse_expert(name)
        if expert is None or name in self._parameters:
            parameter = self._parameters[name]
            return _Matrix(parameter, parameter.tensor)
        parameter = self._parameters[f"{expert.module}.{expert.stack}"]
        tensor = parameter.tensors[expert.place]
        rows = tensor.shape[-2]
        return _Matrix(parameter, tensor, slice(expert.index * rows, (expert.index + 1) * rows))

    def _tell(self, kind: str, dtype: torch.dtype) -> None:
        if kind in FLOATS or kind in self._told:
            return
        self._told.add(kind)
        logger.info("weights in %s are dequantised to %s", kind, str(dtype).removeprefix("torch."))


class BlockEmbedding:
    """Lookup of token ids in an embedding that stays in the mapped file: [T] -> float32 [T, H]."""

    def __init__(
        self, parameter: Parameter, kernels: Kernels, scale: float = 1.0, head: Linear | None = None
    ) -> None:
        """Multiply what is looked up by ``scale``. Rows in a format that the kernels do not read are dequantised here.

        ``head`` is the model's head if its weight is the embedding's. What it keeps in blocks is read there, and the
        file's pages are not.
        """
        self._rows = _rows_of(parameter, kernels, head)
        self._scale = scale

    def __call__(self, ids: Numbers) -> Numbers:
        rows = self._rows(ids)
        return rows if self._scale == 1 else rows * self._scale


def _rows_of(parameter: Parameter, kernels: Kernels, head: Linear | None) -> Callable[[Numbers], Numbers]:
    kind = parameter.tensor.type.name
    if head is not None and head.block_format == kind:
        return kernels.embedding(head)
    raw, (rows, columns) = mapped(parameter.tensor), parameter.shape
    if kind in kernels.embedding_formats:
        return kernels.embedding(BlockWeight("embedding", raw, kind, (rows, columns)))
    return partial(_dense_rows, raw, kind)


def _dense_rows(raw: Numbers, kind: str, ids: Numbers) -> Numbers:
    return to_dense(raw.index_select(0, ids), kind, torch.float32)


def _raw(parameter: Parameter, tensor: Tensor, rows: slice | None = None) -> Numbers:
    """Return the tensor's bytes, the rows (of a bias: the numbers) in the model's order."""
    raw = mapped(tensor, rows)
    if not parameter.pairs:
        return raw
    raw = raw.view(tensor.shape[0], -1)
    return raw[head_order(len(raw), parameter.pairs)]


def _arranged(parts: list[Numbers], layout: Layout) -> Numbers:
    """Return the numbers of a parameter, made of those of its tensors."""
    if layout is Layout.LATENT:
        keys, values = parts
        return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)
    if layout is Layout.WOVEN:
        woven = torch.stack(parts, 2).flatten(1, 2)
        return woven.transpose(1, 2).contiguous() if woven.ndim > 2 else woven
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)
