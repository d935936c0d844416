"""Packed linear layers and experts in transformers' own modules, for models that are not fused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from logitengine.model.network.experts import PackedExperts, expert_biases, expert_names, gate_of, is_stacked
from logitengine.model.network.fuse import Packer
from logitengine.model.network.fused_linear import FusedLinear
from logitengine.model.weight_sources import WeightSource


def modules_to_pack(model: PreTrainedModel, source: WeightSource) -> dict[str, nn.Module]:
    """Return the model's linear layers and experts by name if ``source`` has blocks for any of them, else none."""
    found = dict(_layers(model))
    return found if any(_has_blocks(name, module, source) for name, module in found.items()) else {}


def pack_modules(model: PreTrainedModel, modules: dict[str, nn.Module], packer: Packer) -> None:
    """Replace linear layers and experts of the model, if any are named, by packed ones.

    ``modules`` is emptied, so that each one's own weights are freed before the next one is packed. The residual stream
    becomes float32, like that of fused models: so do the parameters that remain, and what the embedding returns.

    Raises ValueError for experts of an unknown kind.
    """
    if not modules:
        return
    for name in list(modules):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _packed(name, modules.pop(name), packer))
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(_widen)
    for module in model.modules():
        if module is not embedding:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _packed(name: str, module: nn.Module, packer: Packer) -> nn.Module:
    if isinstance(module, nn.Linear):
        return FusedLinear(packer.pack({name: module}))
    return _pack_experts(name, module, packer)


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield what multiplies weights: linear layers of the decoder, its experts, and the language model's head."""
    prefix, head = model.base_model_prefix, model.get_output_embeddings()
    for name, module in model.named_modules():
        is_served = name.startswith(f"{prefix}.") or module is head
        # A class derived from nn.Linear, such as a router, may compute something else.
        if is_served and (type(module) is nn.Linear or is_stacked(module)):
            yield name, module


def _has_blocks(name: str, module: nn.Module, source: WeightSource) -> bool:
    if isinstance(module, nn.Linear):
        return source.has_blocks(f"{name}.weight")
    gate_up, down = expert_names(name, 0)
    return any(source.has_blocks(matrix) for matrix in (*gate_up, down))


def _pack_experts(name: str, module: Any, packer: Packer) -> PackedExperts:
    gate = gate_of(module, packer.kernels)
    layers = []
    for index in range(module.num_experts):
        gate_up, down = expert_names(name, index)
        biases = expert_biases(module, index)
        layers.append((packer.stack(gate_up, biases[0]), packer.stack([down], biases[1])))
    return PackedExperts(layers, gate)


def _widen(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return output.float()
