"""Weights multiplied as the GGUF file stores them are the weights that transformers reads from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from logitengine.checkpoint import Checkpoint, CheckpointError
from logitengine.config import EngineConfig
from logitengine.loader import load
from logitengine.stored_weights import StoredWeights
from support import EVERY_ROW, english_tokens, greedy, make_engine, reference_logits, run
from transformers import LlamaForCausalLM, PreTrainedModel


@pytest.fixture(scope="module")
def stored(smollm2: Checkpoint) -> StoredWeights:
    weights = StoredWeights.load(smollm2.path)
    assert weights is not None
    return weights


def test_every_linear_layer_is_stored_and_dequantises_to_its_weight(
    stored: StoredWeights, smollm2_float32: PreTrainedModel
) -> None:
    parameters = smollm2_float32.state_dict()
    linears = [name for name in parameters if name.endswith("_proj.weight")] + ["lm_head.weight"]
    assert len(linears) == 30 * 7 + 1
    for name in linears:
        weight = stored.get(name)
        assert weight is not None, name
        assert weight.shape == tuple(parameters[name].shape)
        dense = dequantize(weight.raw.numpy(), GGMLQuantizationType[weight.format])
        np.testing.assert_array_equal(dense, parameters[name].numpy())


@pytest.mark.parametrize("weights", ["stored", "dense"])
def test_rows_are_the_models_in_either_form(
    smollm2: Checkpoint, smollm2_float32: PreTrainedModel, weights: str
) -> None:
    """float32: 2e-3 absolute, 1e-4 mean."""
    config = {"weights": weights, "dtype": "float32", "kv_cache_bytes": 1 << 26, "num_threads": 1}
    loaded = load(EngineConfig.model_validate(config))
    prompt = english_tokens(str(smollm2.tokenizer_path), 90, 40)
    rows = run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows
    error = np.abs(rows - reference_logits(smollm2_float32, prompt))
    assert error.max() <= 2e-3
    assert error.mean() <= 1e-4


def test_bfloat16_over_stored_weights_halves_transformers_error(
    smollm2: Checkpoint, smollm2_float32: PreTrainedModel
) -> None:
    """Mean absolute error against float32: exact weights and a float32 residual stream against bfloat16 throughout."""
    loaded = load(EngineConfig(weights="stored", kv_cache_bytes=1 << 26, num_threads=1))
    theirs = LlamaForCausalLM.from_pretrained(
        smollm2.path, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    prompt = english_tokens(str(smollm2.tokenizer_path), 200, 1000)
    expected = reference_logits(smollm2_float32, prompt)
    ours = run(make_engine(loaded), [greedy("a", prompt, 0, EVERY_ROW)])["a", 0].prompt_rows
    our_error, their_error = (
        np.abs(ours - expected).mean(),
        np.abs(reference_logits(theirs, prompt) - expected).mean(),
    )
    assert our_error <= 0.5 * their_error, (our_error, their_error)


def test_a_directory_without_blocks_cannot_be_served_as_stored(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match="weights=stored needs a GGUF file"):
        load(EngineConfig(model=str(tiny_llama), weights="stored", kv_cache_bytes=1 << 24))
