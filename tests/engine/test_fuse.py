"""Which models become fused networks, and which weights their linear layers remember."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from logitengine.model.network.attention import ATTENTION_NAME, register_attention
from logitengine.model.network.fuse import FusedNetwork, Packer, fuse, is_known
from logitengine.model.network.layer_shapes import probe_layers
from logitengine.model.weight_sources import Int8Weights, ModelWeights, WeightSource
from logitkernels import BlockWeight, DenseWeight, Kernels, Linear, ReferenceKernels, Weight
from logitkernels.backend import load_kernels
from logitkernels.cpu.errors import BuildError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

KERNELS = ReferenceKernels()
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def model_of(model_type: str, **options: Any) -> PreTrainedModel:
    register_attention()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **options})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    model.eval().requires_grad_(requires_grad=False)
    return model


def network_of(
    model: PreTrainedModel, kernels: Kernels = KERNELS, source: WeightSource | None = None
) -> FusedNetwork:
    packer = Packer(kernels, source or ModelWeights(model), exact=True)
    return fuse(model, packer, probe_layers(model, kernels))


def linear_names(model: PreTrainedModel) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@dataclass(frozen=True, slots=True)
class Probe:
    """Reads a linear layer's weights through its products with the unit vectors."""

    linear: Linear

    def weight(self, name: str) -> torch.Tensor:
        outputs = self.linear(torch.eye(self.linear.in_features))
        bias = self.linear(torch.zeros(1, self.linear.in_features))
        return (outputs - bias).T[self.linear.parts[name]]


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
    ],
)
def test_known_architectures_are_fused_and_their_layers_know_their_weights(
    model_type: str, options: dict[str, Any]
) -> None:
    model = model_of(model_type, **options)
    expected = {name: model.get_parameter(name).clone() for name in linear_names(model)}
    network = network_of(model)
    assert network.linears.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(Probe(network.linears[name]).weight(name), weight, rtol=1e-4, atol=1e-5)
    stacked = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    assert network.linears[stacked[0]].names == tuple(stacked)
    assert len({id(network.linears[name]) for name in stacked}) == 1
    assert model.base_model is None, "nothing else keeps what was packed"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_layers_own_weights_are_freed_before_the_next_layer_is_packed(model_type: str) -> None:
    model = model_of(model_type)
    layer = model.get_submodule("model.layers.0")
    owned = [weakref.ref(parameter) for parameter in layer.parameters() if parameter.ndim > 1]
    del layer
    left: list[int] = []

    class Watched(ModelWeights):
        def get(self, name: str) -> DenseWeight:
            if name == "model.layers.1.self_attn.q_proj.weight":
                left.append(sum(parameter() is not None for parameter in owned))
            return super().get(name)

    network_of(model, source=Watched(model))
    assert left == [0]


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("phi3", {}),
        ("olmo2", {}),
        ("llama", {"hidden_act": "relu"}),
    ],
)
def test_variations_of_a_known_architecture_are_not_fused(model_type: str, options: dict[str, Any]) -> None:
    assert not is_known(model_of(model_type, **options))
    assert is_known(model_of("llama"))


def test_biases_of_some_layers_of_a_stack_are_refused() -> None:
    model = model_of("qwen2")
    model.get_submodule("model.layers.0.self_attn.v_proj").register_parameter("bias", None)
    with pytest.raises(ValueError, match="some have a bias and some have none"):
        network_of(model)


def native() -> Kernels:
    try:
        return load_kernels("cpu", "cpu")
    except BuildError as error:  # pragma: no cover
        pytest.skip(f"no native kernels here: {error}")


class SomeBlocks:
    """Blocks by name, and a model's own parameters for all other names."""

    def __init__(self, blocks: dict[str, BlockWeight], model: PreTrainedModel) -> None:
        self._blocks = blocks
        self._own = ModelWeights(model)

    def has_blocks(self, name: str) -> bool:
        return name in self._blocks

    def get(self, name: str) -> Weight:
        return self._blocks.get(name) or self._own.get(name)


def test_weights_of_one_layer_are_packed_as_the_source_has_each() -> None:
    model = model_of("llama")
    int8 = Int8Weights(ModelWeights(model))
    q, k, v = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
    blocks = {name: int8.get(name) for name in (q, v)}  # k is dense
    expected = {
        name: torch.from_numpy(dequantize(b.raw.numpy(), GGMLQuantizationType.Q8_0))
        for name, b in blocks.items()
    }
    expected[k] = model.get_parameter(k).clone()
    network = network_of(model, native(), SomeBlocks(blocks, model))
    for name in (q, k, v):
        weight = Probe(network.linears[name]).weight(name)
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_a_source_gives_its_weights_by_name() -> None:
    model = model_of("llama", tie_word_embeddings=True)
    own = ModelWeights(model)
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        weight = own.get(name)
        assert isinstance(weight, DenseWeight)
        assert (weight.name, weight.shape) == (name, tuple(model.get_parameter(name).shape))
        assert torch.equal(weight.tensor, model.get_parameter(name))
    with pytest.raises(AttributeError):
        own.get("model.layers.9.mlp.down_proj.weight")
