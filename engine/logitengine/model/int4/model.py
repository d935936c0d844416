"""A checkpoint with packed linear layers as a model of transformers whose weights stay in the files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from logitkernels import Kernels, Linear
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.files import CONFIG
from logitengine.model.checkpoint.safetensors_files import COPIED_BUFFERS
from logitengine.model.image_text.families import FAMILIES
from logitengine.model.int4.config import QUANTIZATION_CONFIGS
from logitengine.model.int4.names import names_in
from logitengine.model.int4.tensors import DenseParameter, PackedFiles, PackedParameter, Parameter
from logitengine.model.int4.unpacking import read_tensor
from logitengine.model.int4.weights import PackedWeights
from logitengine.model.parameter_names import EMBEDDING_PARAMETER
from logitengine.model.pretrained import MISFITS, refuse_unsupported
from logitengine.model.skeleton import StoredModel

GENERATION_CONFIG = "generation_config.json"


class Int4Model(StoredModel):
    """The model of a directory: a skeleton on the meta device, and what fills it.

    Attributes:
        members: members of config.json.
    """

    config_place = CONFIG
    _parameters: dict[str, Parameter]

    def __init__(self, directory: Path, files: PackedFiles, dtype: torch.dtype, device: torch.device) -> None:
        """Build the skeleton by what ``files`` say. Raises CheckpointError for a model that cannot be served."""
        self.members = files.members
        self._packing = files.packing
        self._told: set[str] = set()
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            refuse_unsupported(config)
            _refuse_other_models(config.model_type, config.architectures or [])
            # Packing is read here, and transformers would want the packages that wrote it.
            for holder, key in product((config, config.get_text_config()), QUANTIZATION_CONFIGS):
                vars(holder).pop(key, None)
            super().__init__(files.paths, config, dict(files.parameters), dtype, device)
            self._rename()
            if (directory / GENERATION_CONFIG).is_file():
                self.skeleton.generation_config = GenerationConfig.from_pretrained(directory)
        except (*MISFITS, OSError) as error:
            raise CheckpointError(f"{directory} could not be loaded: {error}") from error
        self._drop_unread()
        for name, target in self.skeleton.all_tied_weights_keys.items():
            if target in self._parameters:
                self._parameters.setdefault(name, self._parameters[target])
        self._check_shapes()

    def weights(
        self, block_formats: frozenset[str] = frozenset(), dtype: torch.dtype | None = None
    ) -> PackedWeights:
        """Return the weights: packed ones as blocks if those are in ``block_formats``, others in the model's dtype or ``dtype``."""
        return PackedWeights(
            self._parameters, self._packing, dtype or self._dtype, self._device, block_formats, self._told
        )

    def _lookup(
        self,
        kernels: Kernels,  # noqa: ARG002 - torch looks it up
        scale: float,
        head: Linear | None,  # noqa: ARG002 - an embedding is not packed
    ) -> Callable[[Tensor], Tensor]:
        parameter = self._parameters[EMBEDDING_PARAMETER]
        if not isinstance(parameter, DenseParameter):
            raise CheckpointError(f"{parameter.integers.path} cannot be served: its embedding is packed")
        numbers = read_tensor(parameter.tensor)
        return lambda ids: numbers.index_select(0, ids).float() * scale

    def _rename(self) -> None:
        """Give the parameters their names in the skeleton."""
        names = names_in(self.skeleton, self._parameters)
        renamed = {names[name]: parameter for name, parameter in self._parameters.items()}
        self._parameters.clear()
        self._parameters.update(renamed)

    def _drop_unread(self) -> None:
        """Forget tensors that cannot change a number: copied buffers, and biases of 0 where a model has none."""
        expected = {name for name, _ in self.skeleton.named_parameters(remove_duplicate=False)}
        for name, parameter in list(self._parameters.items()):
            module, _, own = name.rpartition(".")
            is_added = (
                isinstance(parameter, DenseParameter)
                and name not in expected
                and own == "bias"
                and isinstance(self._parameters.get(f"{module}.weight"), PackedParameter)
                and not read_tensor(parameter.tensor).any()
            )
            if is_added or (name not in expected and COPIED_BUFFERS.fullmatch(name)):
                del self._parameters[name]


def _refuse_other_models(model_type: str, architectures: list[str]) -> None:
    """Refuse models that are no language models. Raises ValueError."""
    if model_type in FAMILIES:
        raise ValueError(
            f"{model_type} reads images, and its linear layers are packed, which is not supported"
        )
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        raise ValueError(f"{architectures[0]} has packed linear layers, which is not supported")
