"""Weights of a checkpoint with packed linear layers: as blocks of our own, or dequantised."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import count, takewhile

import torch
from logitkernels import DenseWeight, Weight
from logitkernels.int4 import int4_blocks
from torch import Tensor

from logitengine.model.int4.config import Int4Config
from logitengine.model.int4.tensors import PackedParameter, Parameter
from logitengine.model.int4.unpacking import Groups, read_groups, read_tensor
from logitengine.model.network.experts import expert_names

logger = logging.getLogger(__name__)


class PackedWeights:
    """Parameters by the names of transformers' model, read when they are asked for."""

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        config: Int4Config,
        dtype: torch.dtype,
        device: torch.device,
        block_formats: frozenset[str] = frozenset(),
        told: set[str] | None = None,
    ) -> None:
        """Hand out packed weights as blocks if those are among ``block_formats``, and all others in ``dtype`` on ``device``.

        ``told`` holds the forms of weights of which the log has said that they are dequantised.
        """
        self._parameters = parameters
        self._config = config
        self._dtype = dtype
        self._device = device
        self._block_formats = block_formats
        self._told = set() if told is None else told

    def has_blocks(self, name: str) -> bool:
        """Whether `get` returns this weight as blocks, if the order of its columns allows it."""
        return bool(self._block_formats) and isinstance(self._parameters.get(name), PackedParameter)

    def get(self, name: str) -> Weight:
        """Return a weight [N, K]. Raises KeyError for a name that the model does not have."""
        parameter = self._parameters[name]
        if not isinstance(parameter, PackedParameter):
            return DenseWeight(name, self.dense(name))
        groups = read_groups(parameter, self._config)
        if groups.of_column is None and self._block_formats:
            blocks = int4_blocks(name, groups.nibbles, groups.scales, groups.zeros)
            if blocks.format in self._block_formats:
                return blocks
        return DenseWeight(name, self._dequantised(groups, self._dtype))

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter of any shape in numbers, in the model's dtype unless another is named."""
        dtype = dtype or self._dtype
        if name not in self._parameters and name.endswith((".gate_up_proj", ".down_proj")):
            return self._stacked(name, dtype)
        parameter = self._parameters[name]
        if isinstance(parameter, PackedParameter):
            return self._dequantised(read_groups(parameter, self._config), dtype)
        return read_tensor(parameter.tensor).to(self._device, dtype)

    def _stacked(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the matrices of all experts of a layer, [E, N, K], gates above ups."""
        module = name.rpartition(".")[0]

        def matrices(index: int) -> list[str]:
            gate_up, down = expert_names(module, index)
            return gate_up if name.endswith(".gate_up_proj") else [down]

        experts = takewhile(lambda names: names[0] in self._parameters, map(matrices, count()))
        return torch.stack([torch.cat([self.dense(own, dtype) for own in names]) for names in experts])

    def _dequantised(self, groups: Groups, dtype: torch.dtype) -> Tensor:
        kind = self._config.method + (
            " with columns in the order of activations" * (groups.of_column is not None)
        )
        if kind not in self._told:
            self._told.add(kind)
            logger.info("weights in %s are dequantised to %s", kind, str(dtype).removeprefix("torch."))
        return groups.dense(dtype).to(self._device)
