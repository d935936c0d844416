"""Weights of a GGUF file's linear layers and embedding, as the file has them or dequantised."""

from __future__ import annotations

import logging
from functools import partial

import torch
from logitkernels import BlockWeight, DenseWeight, Kernels, Weight
from torch import Tensor as Numbers

from logitengine.model.gguf.blocks import FLOATS, head_order, mapped, to_dense
from logitengine.model.gguf.header import Tensor
from logitengine.model.gguf.tensors import Parameter

logger = logging.getLogger(__name__)


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

    def get(self, name: str) -> Weight:
        """Return a weight [N, K]. Raises KeyError for a name that the model does not have."""
        parameter = self._parameters[name]
        kind = parameter.tensor.type.name
        if kind not in self._block_formats:
            self._tell(kind)
            return DenseWeight(name, self.dense(name))
        rows, columns = parameter.shape
        order = head_order(rows, parameter.pairs) if parameter.pairs else None
        return BlockWeight(name, mapped(parameter.tensor), kind, (rows, columns), order)

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Numbers:
        """Return a parameter of any shape in numbers, in the model's dtype unless another is named."""
        parameter = self._parameters[name]
        dtype = dtype or self._dtype
        parts = []
        for tensor in parameter.tensors:
            numbers = to_dense(
                _raw(parameter, tensor), tensor.type.name, torch.float32 if parameter.shift else dtype
            )
            parts.append((numbers - parameter.shift).to(dtype).view(tensor.shape))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, -2)
        return joined.to(self._device)

    def _tell(self, kind: str) -> None:
        if kind in FLOATS or kind in self._told:
            return
        self._told.add(kind)
        logger.info("weights in %s are dequantised to %s", kind, str(self._dtype).removeprefix("torch."))


class BlockEmbedding:
    """Lookup of token ids in an embedding that stays in the mapped file: [T] -> float32 [T, H]."""

    def __init__(self, parameter: Parameter, kernels: Kernels, scale: float = 1.0) -> None:
        """Multiply what is looked up by ``scale``. Rows in a format that the kernels do not read are dequantised here."""
        raw, kind = mapped(parameter.tensor), parameter.tensor.type.name
        rows, columns = parameter.shape
        self._rows = (
            kernels.embedding(BlockWeight("embedding", raw, kind, (rows, columns)))
            if kind in kernels.embedding_formats
            else partial(_dense_rows, raw, kind)
        )
        self._scale = scale

    def __call__(self, ids: Numbers) -> Numbers:
        rows = self._rows(ids)
        return rows if self._scale == 1 else rows * self._scale


def _dense_rows(raw: Numbers, kind: str, ids: Numbers) -> Numbers:
    return to_dense(raw.index_select(0, ids), kind, torch.float32)


def _raw(parameter: Parameter, tensor: Tensor) -> Numbers:
    """Return the tensor's bytes, the rows (of a bias: the numbers) in the model's order."""
    raw = mapped(tensor)
    if not parameter.pairs:
        return raw
    raw = raw.view(tensor.shape[0], -1)
    return raw[head_order(len(raw), parameter.pairs)]
