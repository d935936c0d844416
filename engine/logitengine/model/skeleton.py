"""Models whose weights stay in files: transformers' model on the meta device, and what fills it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from logitkernels import Kernels, Linear, Weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from logitengine.errors import CheckpointError
from logitengine.model.network.attention import ATTENTION_NAME, register_attention
from logitengine.model.network.experts import expert_names, is_stacked, shapes_by_expert
from logitengine.model.parameter_names import EMBEDDING_PARAMETER, HEAD_PARAMETER


class StoredParameter(Protocol):
    """What a file says of a parameter."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def origin(self) -> str:
        """Name of the tensor that it is read from."""


class StoredWeights(Protocol):
    """Parameters in files, by the names of transformers' model."""

    def has_blocks(self, name: str) -> bool:
        """Whether `get` returns this weight in blocks."""

    def get(self, name: str) -> Weight:
        """Return a weight [N, K], in blocks or dense."""

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter of any shape in numbers, in the model's dtype unless another is named."""


class StoredModel(ABC):
    """The model of some files: a skeleton on the meta device, and what fills it.

    Attributes:
        config_place: where the files have the config, as messages name it.
        paths: the files, in order.
        members: members of the config that decide about numbers.
        config: transformers' config.
        skeleton: the model, without a number in it until it is filled.
    """

    config_place: ClassVar[str]
    members: dict[str, Any]
    _factors: Tensor | None = None  # divisors of the rotary frequencies, where files have them

    def __init__(
        self,
        paths: Sequence[Path],
        config: PretrainedConfig,
        parameters: Mapping[str, StoredParameter],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Build the skeleton. Raises whatever transformers does for a config that makes no model."""
        self.paths = paths
        self.config = config
        self._parameters = parameters
        self._dtype = dtype
        self._device = device
        self._dense = self.weights()
        self.skeleton = _build_skeleton(self.config, dtype)
        embedding = self.skeleton.get_input_embeddings()
        self._embedding_scale = float(getattr(embedding, "scalar_embed_scale", 1.0))

    @abstractmethod
    def weights(
        self, block_formats: frozenset[str] = frozenset(), dtype: torch.dtype | None = None
    ) -> StoredWeights:
        """Return the weights: those in ``block_formats`` in blocks, others in the model's dtype or ``dtype``."""

    @abstractmethod
    def _lookup(self, kernels: Kernels, scale: float, head: Linear | None) -> Callable[[Tensor], Tensor]:
        """Return the lookup of token ids in the files or in ``head``, [T] -> float32 [T, H], times ``scale``."""

    def fill_small(self, bias_dtype: torch.dtype) -> None:
        """Give the skeleton its buffers, norms (float32) and biases: all but matrices."""
        self._fill_buffers()
        for name, module in self.skeleton.named_modules():
            for own, _ in list(module.named_parameters(recurse=False)):
                if not (isinstance(module, nn.Linear | nn.Embedding) and own == "weight"):
                    self._fill(module, own, f"{name}.{own}", bias_dtype if own == "bias" else torch.float32)

    def fill(self, kernels: Kernels, packed: Collection[str] = ()) -> None:
        """Give the skeleton its buffers and its parameters. Tied ones share their numbers.

        Of the modules named by ``packed``, which are about to be packed, only the biases are filled. With any such
        modules everything is in float32, else in the model's dtype. The embedding stays in the file if the model runs
        on the CPU.
        """
        dtype = torch.float32 if packed else self._dtype
        self._fill_buffers()
        embedding = self.skeleton.get_input_embeddings()
        if self._device.type == "cpu" and (
            type(embedding) is nn.Embedding or hasattr(embedding, "scalar_embed_scale")
        ):
            self.skeleton.set_input_embeddings(FileEmbedding(self.embedding(kernels), dtype))
        filled: dict[int, nn.Parameter] = {}
        for name, module in self.skeleton.named_modules():
            for own, parameter in list(module.named_parameters(recurse=False)):
                if name in packed and not own.endswith("bias"):
                    continue
                if id(parameter) in filled:
                    setattr(module, own, filled[id(parameter)])
                else:
                    filled[id(parameter)] = self._fill(module, own, f"{name}.{own}", dtype)

    @property
    def ties_head(self) -> bool:
        """Whether the head has the weight of the embedding."""
        return self.skeleton.all_tied_weights_keys.get(HEAD_PARAMETER) == EMBEDDING_PARAMETER

    def embedding(self, kernels: Kernels, head: Linear | None = None) -> Callable[[Tensor], Tensor]:
        """Return the lookup of token ids, [T] -> [T, H]: in the file itself, or in a copy on another device.

        ``head`` is the packed head if it has the weight of the embedding, which is then looked up there if it can be.
        """
        if self._device.type == "cpu":
            return self._lookup(kernels, self._embedding_scale, head)
        module = self.skeleton.get_input_embeddings()
        self._fill(module, "weight", EMBEDDING_PARAMETER, self._dtype)
        return module

    def embed_through(self, kernels: Kernels, head: Linear) -> None:
        """Have a filled skeleton look token ids up in ``head``, which is packed and has the embedding's weight, if it can be."""
        module = self.skeleton.get_input_embeddings()
        if isinstance(module, FileEmbedding):
            module.lookup = self.embedding(kernels, head)

    def _fill(self, module: nn.Module, own: str, name: str, dtype: torch.dtype) -> nn.Parameter:
        filled = nn.Parameter(self._dense.dense(name, dtype), requires_grad=False)
        setattr(module, own, filled)
        return filled

    @torch.no_grad()
    def _fill_buffers(self) -> None:
        """Give the skeleton what is no parameter: rotary frequencies, scales of embeddings, biases of routers."""
        for path, module in self.skeleton.named_modules():
            buffers = dict(module.named_buffers(recurse=False))
            for name, buffer in buffers.items():
                # A number that nothing computes is found below.
                unknown = torch.full_like(buffer, float("nan"), device=self._device)
                module.register_buffer(name, unknown, persistent=False)
            if not buffers:
                continue
            self.skeleton._init_weights(module)  # noqa: SLF001 - computes them as after transformers' own loading
            if self._factors is not None and "inv_freq" in buffers:
                module.inv_freq = module.get_buffer("inv_freq") / self._factors.to(self._device)
                module.original_inv_freq = module.inv_freq
            for name, buffer in list(module.named_buffers(recurse=False)):
                if f"{path}.{name}" in self._parameters:
                    numbers = self._dense.dense(f"{path}.{name}", torch.float32)
                    module.register_buffer(name, numbers, persistent=False)
                elif not buffer.isfinite().all():
                    raise CheckpointError(
                        f"{type(module).__name__} has a buffer {name}, which is not supported"
                    )

    def _check_shapes(self) -> None:
        """Check that the file has each parameter of the model in its shape, and no other; buffers may be missing."""
        path, parameters, tied = self.paths[0], self._parameters, self.skeleton.all_tied_weights_keys
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in self.skeleton.named_parameters(remove_duplicate=False)
        }
        optional = {
            name: tuple(tensor.shape)
            for name, tensor in self.skeleton.state_dict().items()
            if name not in expected
        }
        for name, module in self.skeleton.named_modules():
            if expert_names(name, 0)[1] in parameters and is_stacked(module):
                if module.num_experts > len(parameters):
                    raise CheckpointError(
                        f"{path} is damaged: {name} has not all {module.num_experts} experts"
                    )
                expected = {own: shape for own, shape in expected.items() if not own.startswith(f"{name}.")}
                expected |= shapes_by_expert(name, module)
        for name, shape in (expected | optional).items():
            if name not in parameters and name not in tied and name not in optional:
                raise CheckpointError(f"{path} is damaged: it has no tensor for {name}")
            if name in parameters and parameters[name].shape != shape:
                raise CheckpointError(
                    f"{path} is damaged: {parameters[name].origin} is {list(parameters[name].shape)}, and by "
                    f"{self.config_place} {name} is {list(shape)}"
                )
        for name in parameters.keys() - expected.keys() - optional.keys():
            raise CheckpointError(
                f"{path} cannot be served: {parameters[name].origin} would be {name}, which "
                f"{type(self.skeleton).__name__} does not have"
            )


class FileEmbedding(nn.Module):
    """Lookup of token ids as a module, in the place of a model's own embedding."""

    def __init__(self, lookup: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.lookup = lookup
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return embeddings [..., H] of ``ids`` int64 [...]."""
        rows = self.lookup(ids.flatten()).to(self._dtype)
        return rows.view(*ids.shape, -1)


def _build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with the project's attention function, all of it on the meta device."""
    register_attention()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    model.eval().requires_grad_(False)
    return model
