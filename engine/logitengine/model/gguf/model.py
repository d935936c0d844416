"""A GGUF file as a model of transformers whose weights stay in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from logitengine.errors import CheckpointError
from logitengine.model.attention import ATTENTION_NAME, register_attention
from logitengine.model.gguf.blocks import mapped, to_dense
from logitengine.model.gguf.config import model_config
from logitengine.model.gguf.header import read_header
from logitengine.model.gguf.tensors import ROPE_FACTORS, parameters_of
from logitengine.model.gguf.weights import BlockEmbedding, GgufWeights
from logitengine.model.pretrained import MISFITS, refuse_unsupported

EMBEDDING = "model.embed_tokens.weight"


class GgufModel:
    """The model of a file: a skeleton on the meta device, and what fills it.

    Attributes:
        paths: the files, in order.
        members: members of transformers' config, as the file's metadata give them.
        config: that config.
        skeleton: the model, without a number in it until it is filled.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Read the header and build the skeleton. Raises CheckpointError for a file that cannot be served."""
        header = read_header(path)
        self.paths = header.paths
        self.members = model_config(header)
        self._header = header
        self._parameters = parameters_of(header, self.members)
        self._dtype = dtype
        self._device = device
        self._told: set[str] = set()
        self._dense = self.weights()
        try:
            self.config: PretrainedConfig = AutoConfig.for_model(**self.members)
            refuse_unsupported(self.config)
            self.skeleton = _build_skeleton(self.config, dtype)
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

    def fill_small(self, bias_dtype: torch.dtype) -> None:
        """Give the skeleton its buffers, norms (float32) and biases: all but matrices."""
        self._fill_buffers()
        for name, module in self.skeleton.named_modules():
            for own, _ in list(module.named_parameters(recurse=False)):
                if not (isinstance(module, nn.Linear | nn.Embedding) and own == "weight"):
                    self._fill(module, own, f"{name}.{own}", bias_dtype if own == "bias" else torch.float32)

    def fill(self) -> None:
        """Give the skeleton its buffers and every parameter, in the model's dtype. Tied ones share their numbers."""
        self._fill_buffers()
        filled: dict[int, nn.Parameter] = {}
        for name, module in self.skeleton.named_modules():
            for own, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in filled:
                    setattr(module, own, filled[id(parameter)])
                else:
                    filled[id(parameter)] = self._fill(module, own, f"{name}.{own}", self._dtype)

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """Return the lookup of token ids, [T] -> [T, H]: in the file itself, or in a copy on another device."""
        module = self.skeleton.get_input_embeddings()
        if self._device.type == "cpu":
            scale = float(getattr(module, "scalar_embed_scale", 1.0))
            return BlockEmbedding(self._parameters[EMBEDDING], scale)
        self._fill(module, "weight", EMBEDDING, self._dtype)
        return module

    def _fill(self, module: nn.Module, own: str, name: str, dtype: torch.dtype) -> nn.Parameter:
        filled = nn.Parameter(self._dense.dense(name, dtype), requires_grad=False)
        setattr(module, own, filled)
        return filled

    @torch.no_grad()
    def _fill_buffers(self) -> None:
        """Compute what is no parameter: rotary frequencies, scales of embeddings."""
        for module in self.skeleton.modules():
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
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.isfinite().all():
                    raise CheckpointError(
                        f"{type(module).__name__} has a buffer {name}, which is not supported"
                    )

    def _check_shapes(self) -> None:
        """Check that the file has each parameter of the model in its shape, and no other."""
        path, parameters, tied = self.paths[0], self._parameters, self.skeleton.all_tied_weights_keys
        expected = {
            name: tuple(tensor.shape)
            for name, tensor in self.skeleton.named_parameters(remove_duplicate=False)
        }
        for name, shape in expected.items():
            if name not in parameters and name not in tied:
                raise CheckpointError(f"{path} is damaged: it has no tensor for {name}")
            if name in parameters and parameters[name].shape != shape:
                raise CheckpointError(
                    f"{path} is damaged: {parameters[name].tensor.name} is {list(parameters[name].shape)}, and by the "
                    f"metadata {name} is {list(shape)}"
                )
        for name in parameters.keys() - expected.keys():
            raise CheckpointError(
                f"{path} cannot be served: {parameters[name].tensor.name} would be {name}, which "
                f"{type(self.skeleton).__name__} does not have"
            )

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


def _build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model with the project's attention function, all of it on the meta device."""
    register_attention()
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    model.eval().requires_grad_(False)
    return model
