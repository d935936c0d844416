"""A GGUF file as a model of transformers whose weights stay in the file."""

from __future__ import annotations

from pathlib import Path

import torch
from logitkernels import Kernels, Linear
from torch import Tensor
from transformers import AutoConfig

from logitengine.errors import CheckpointError
from logitengine.model.gguf.blocks import mapped, to_dense
from logitengine.model.gguf.config import model_config
from logitengine.model.gguf.header import read_header
from logitengine.model.gguf.tensors import ROPE_FACTORS, Parameter, parameters_of
from logitengine.model.gguf.weights import BlockEmbedding, GgufWeights
from logitengine.model.parameter_names import EMBEDDING_PARAMETER
from logitengine.model.pretrained import MISFITS, refuse_unsupported
from logitengine.model.skeleton import StoredModel


class GgufModel(StoredModel):
    """The model of a file: a skeleton on the meta device, and what fills it.

    Attributes:
        members: members of transformers' config, as the file's metadata give them.
    """

    config_place = "the metadata"
    _parameters: dict[str, Parameter]

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Read the header and build the skeleton. Raises CheckpointError for a file that cannot be served."""
        header = read_header(path)
        self.members = model_config(header)
        self._header = header
        self._told: set[str] = set()
        parameters = parameters_of(header, self.members)
        try:
            config = AutoConfig.for_model(**self.members)
            refuse_unsupported(config)
            super().__init__(header.paths, config, parameters, dtype, device)
        except MISFITS as error:
            raise CheckpointError(
                f"{path} is damaged: its metadata make no {self.members['model_type']}: {error}"
            ) from error
        self._check_shapes()
        self._factors = self._rope_factors()

    def weights(
        self, block_formats: frozenset[str] = frozenset(), dtype: torch.dtype | None = None
    ) -> GgufWeights:
        """Return the file's weights: blocks in ``block_formats`` as they are, others in the model's dtype or ``dtype``."""
        return GgufWeights(self._parameters, dtype or self._dtype, self._device, block_formats, self._told)

    def _lookup(self, kernels: Kernels, scale: float, head: Linear | None) -> BlockEmbedding:
        return BlockEmbedding(self._parameters[EMBEDDING_PARAMETER], kernels, scale, head)

    def _rope_factors(self) -> Tensor | None:
        """Return the divisors of the rotary frequencies, float32; None where the file has none."""
        tensor = self._header.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return None
        if "rope_type" not in self.members["rope_parameters"]:
            raise CheckpointError(
                f"{tensor.path} cannot be served: {ROPE_FACTORS} is not supported for a {self.config.model_type}"
            )
        factors = to_dense(mapped(tensor), tensor.type.name, torch.float32).flatten()
        expected = self.config.head_dim // 2
        if len(factors) != expected or not (factors.isfinite().all() and (factors > 0).all()):
            raise CheckpointError(
                f"{tensor.path} is damaged: {ROPE_FACTORS} is not {expected} numbers above 0"
            )
        return factors
