"""Layers that GPTQModel, AutoGPTQ and AutoAWQ packed: packed_layers/make.py made the file, and names the versions."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from logitengine.config import EngineConfig
from logitengine.model.loader import load
from packed_checkpoints import Packing, save_packed, tiny_llama
from safetensors.torch import load_file, save_file
from support import EVERY_ROW, greedy, make_engine, reference_logits, run
from torch import Tensor, nn
from transformers import PreTrainedModel

LAYERS = Path(__file__).parent / "packed_layers" / "layers.safetensors"
PROMPT = list(range(60, 92))
PLACE = "model.layers.0.self_attn.k_proj"


def golden(name: str) -> dict[str, Tensor]:
    """Return the tensors of a layer, and its ``weight`` as the package dequantises it."""
    tensors = load_file(LAYERS)
    return {
        own.removeprefix(f"{name}."): tensor for own, tensor in tensors.items() if own.startswith(f"{name}.")
    }


def save_with(directory: Path, packing: Packing, name: str) -> PreTrainedModel:
    """Save a model with the layer as its first k_proj. Returns it with the weights that it has by the package."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model, _ = save_packed(
        directory, packing, tiny_llama(**sizes, num_attention_heads=2, num_key_value_heads=1)
    )
    layer = golden(name)
    weight = layer.pop("weight").float()
    path = directory / "model.safetensors"
    tensors = {own: tensor.clone() for own, tensor in load_file(path).items()}
    assert {f"{PLACE}.{own}" for own in layer} == {own for own in tensors if own.startswith(PLACE)}
    save_file(tensors | {f"{PLACE}.{own}": tensor for own, tensor in layer.items()}, path)
    model.get_submodule(PLACE).weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    ("packing", "name"),
    [
        (Packing("gptq"), "gptqmodel-gptq"),
        (Packing("gptq", checkpoint_format="gptq_v2"), "gptqmodel-gptq_v2"),
        (Packing("gptq"), "autogptq-gptq"),
        (Packing("awq"), "autoawq-gemm"),
    ],
)
def test_rows_are_those_of_the_weights_by_the_package(
    tmp_path: Path, packing: Packing, name: str, kernels: str
) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    model = save_with(tmp_path, packing, name)
    config = {"model": str(tmp_path), "dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1}
    loaded = load(EngineConfig.model_validate(config | {"kernels": kernels}))
    rows = run(make_engine(loaded), [greedy("a", PROMPT, 0, EVERY_ROW)])["a", 0].prompt_rows
    assert np.abs(rows - reference_logits(model, PROMPT)).max() <= 1e-3
    # The rows are those of this layer: without it they differ by far more.
    other = deepcopy(model)
    other.get_submodule(PLACE).weight.data = torch.zeros(32, 64)
    assert np.abs(rows - reference_logits(other, PROMPT)).max() > 1e-2
