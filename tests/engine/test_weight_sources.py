"""Weights multiplied in a GGUF file's stored form are the weights that transformers reads from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from logitengine.config import EngineConfig
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.resolve import Checkpoint
from logitengine.model.gguf.model import GgufModel
from logitengine.model.loader import load
from logitengine.model.weight_sources import Int4Weights, Int8Weights, ModelWeights
from logitkernels import BlockWeight
from random_blocks import dequantized
from second_device import DEVICE, SecondDevice
from support import EVERY_ROW, english_tokens, greedy, make_engine, reference_logits, run
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def test_every_linear_layer_is_stored_and_dequantises_to_its_weight(
    smollm2: Checkpoint, smollm2_float32: PreTrainedModel
) -> None:
    """Queries and keys too, whose rows the file has in another order. The weights are transformers', to the bit."""
    formats = frozenset({"Q4_1", "Q8_0"})
    stored = GgufModel(smollm2.path, torch.float32, torch.device("cpu")).weights(formats)
    parameters = smollm2_float32.state_dict()
    linears = [name for name in parameters if name.endswith("_proj.weight")] + ["lm_head.weight"]
    assert len(linears) == 30 * 7 + 1
    for name in linears:
        weight = stored.get(name)
        assert isinstance(weight, BlockWeight)
        assert weight.name == name
        assert weight.shape == tuple(parameters[name].shape)
        dense = dequantize(weight.raw.numpy(), GGMLQuantizationType[weight.format])
        ordered = dense if weight.order is None else dense[weight.order.numpy()]
        np.testing.assert_array_equal(ordered, parameters[name].numpy())


@pytest.mark.parametrize("weights", ["stored", "dense"])
def test_rows_are_the_models_in_either_form(
    smollm2: Checkpoint, smollm2_float32: PreTrainedModel, weights: str
) -> None:
    """Tolerance in float32: 2e-3 absolute, 1e-4 mean."""
    config = {"weights": weights, "dtype": "float32", "kv_cache_bytes": 1 << 26, "num_threads": 1}
    loaded = load(EngineConfig.model_validate(config))
    prompt = english_tokens(str(smollm2.tokenizer_path), 90, 40)
    rows = run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows
    error = np.abs(rows - reference_logits(smollm2_float32, prompt))
    assert error.max() <= 2e-3
    assert error.mean() <= 1e-4


def test_bfloat16_over_stored_weights_halves_transformers_error(
    smollm2: Checkpoint, smollm2_directory: Path, smollm2_float32: PreTrainedModel
) -> None:
    """Compares mean absolute errors: exact weights and a float32 residual stream against bfloat16 throughout."""
    loaded = load(EngineConfig(weights="stored", kv_cache_bytes=1 << 26, num_threads=1))
    theirs = LlamaForCausalLM.from_pretrained(
        smollm2_directory, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    prompt = english_tokens(str(smollm2.tokenizer_path), 200, 1000)
    expected = reference_logits(smollm2_float32, prompt)
    ours = run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows
    our_error, their_error = (
        np.abs(ours - expected).mean(),
        np.abs(reference_logits(theirs, prompt) - expected).mean(),
    )
    assert our_error <= 0.5 * their_error, (our_error, their_error)


def test_int8_rows_are_those_of_the_rounded_weights(tiny_llama: Path) -> None:
    """Multiplies a checkpoint's linear layers as int8 blocks; reference: transformers in float32, 5e-4 absolute."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    prompt = list(range(300, 340))
    unrounded = reference_logits(model, prompt)
    rounded = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            blocks = quantize(module.weight.detach().numpy(), GGMLQuantizationType.Q8_0)
            module.weight = torch.nn.Parameter(
                torch.from_numpy(dequantize(blocks, GGMLQuantizationType.Q8_0))
            )
    loaded = load(
        EngineConfig(
            model=str(tiny_llama), weights="int8", dtype="float32", kv_cache_bytes=1 << 24, num_threads=1
        )
    )
    rows = run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows
    assert np.abs(rows - reference_logits(rounded, prompt)).max() <= 5e-4
    assert np.abs(rows - unrounded).max() > 1e-2, "they were rounded"


def test_int4_rows_are_those_of_the_rounded_weights(tiny_llama: Path) -> None:
    """Multiplies a checkpoint's linear layers, the head too, as int4 blocks; reference: transformers in float32, 1e-3 absolute."""
    prompt = list(range(300, 340))
    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    unrounded = reference_logits(model, prompt)
    rounded = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    own = ModelWeights(model)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear):
            blocks = Int4Weights(own).get(f"{name}.weight")
            assert blocks.format == "INT4_32"
            module.weight = torch.nn.Parameter(dequantized(blocks.format, blocks.raw).float())
    loaded = load(
        EngineConfig(
            model=str(tiny_llama), weights="int4", dtype="float32", kv_cache_bytes=1 << 24, num_threads=1
        )
    )
    assert loaded.info.weights == "int4 (INT4_32)"
    rows = run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows
    assert np.abs(rows - reference_logits(rounded, prompt)).max() <= 1e-3
    assert np.abs(rows - unrounded).max() > 1e-1, "they were rounded"


@pytest.mark.parametrize(("rounded", "form"), [(Int8Weights, "Q8_0"), (Int4Weights, "INT4_32")])
def test_blocks_are_made_on_the_host_wherever_the_model_lies(
    monkeypatch: pytest.MonkeyPatch, rounded: type[Int8Weights | Int4Weights], form: str
) -> None:
    model = torch.nn.Linear(64, 3)
    expected = rounded(ModelWeights(model)).get("weight")
    with SecondDevice():
        placed = {"weight": model.weight.detach().to(DEVICE)}
        monkeypatch.setattr(model, "get_parameter", placed.__getitem__)
        weight = rounded(ModelWeights(model)).get("weight")
    assert torch.equal(weight.raw, expected.raw)
    assert (weight.name, weight.format, weight.shape) == ("weight", form, (3, 64))


def test_int8_is_refused_where_it_cannot_be_had(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="reference kernels do not multiply weights=int8"):
        load(EngineConfig(model=str(tiny_llama), weights="int8", kernels="reference"))
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    with pytest.raises(CheckpointError, match="24 input features; int8 takes multiples of 32"):
        load(EngineConfig(model=str(tmp_path), weights="int8"))
    with pytest.raises(CheckpointError, match="24 input features; int4 takes multiples of 32"):
        load(EngineConfig(model=str(tmp_path), weights="int4"))


def test_a_directory_without_blocks_cannot_be_served_as_stored(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match="weights=stored needs a GGUF file"):
        load(EngineConfig(model=str(tiny_llama), weights="stored", kv_cache_bytes=1 << 24))
