"""Packed linear layers and experts in transformers' own modules, for models that are not fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from logitengine.model.experts import PackedExperts, expert_biases, expert_names, gate_of, is_stacked
from logitengine.model.fuse import Packer
from logitengine.model.fused_linear import FusedLinear
from logitengine.model.weight_sources import WeightSource


def modules_in_blocks(model: PreTrainedModel, source: WeightSource) -> dict[str, nn.Module]:
    """Return the linear layers and experts, by name, for which ``source`` has weights in blocks.

    Raises ValueError for a module of which blocks are asked and that is not known.
    """
    return {name: module for name, module in _layers(model) if _has_blocks(name, module, source)}


def pack_modules(model: PreTrainedModel, modules: Mapping[str, nn.Module], packer: Packer) -> None:
    """Replace modules of the model by packed ones. Nothing else keeps their weights."""
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        packed = (
            FusedLinear(packer.pack({name: module}))
            if isinstance(module, nn.Linear)
            else _pack_experts(name, module, packer)
        )
        setattr(model.get_submodule(parent), own, packed)
    if modules and any(True for _ in _layers(model)):
        packer.formats.add("dense")


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield what multiplies weights: linear layers of the decoder, its experts, and the language model's head."""
    prefix, head = model.base_model_prefix, model.get_output_embeddings()
    for name, module in model.named_modules():
        is_served = name.startswith(f"{prefix}.") or module is head
        if is_served and (isinstance(module, nn.Linear) or is_stacked(module)):
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
