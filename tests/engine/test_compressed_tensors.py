"""Checkpoints that the package compressed-tensors writes, by the calls that llm-compressor makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from logitengine.config import EngineConfig
from logitengine.model.checkpoint.files import check_directory
from logitengine.model.loader import load
from packed_checkpoints import tiny_llama
from support import EVERY_ROW, greedy, make_engine, reference_logits, run
from torch import Tensor
from transformers import PreTrainedModel

PROMPT = list(range(60, 92))
HEAD = ("lm_head",)
GROUPS_OF_32 = {"strategy": "group", "group_size": 32}


def save_compressed(
    directory: Path,
    model: PreTrainedModel,
    groups: dict[str, dict[str, Any]],
    ignore: tuple[str, ...] = HEAD,
) -> PreTrainedModel:
    """Save the model in 4 bits, with arguments of quantisation by the layers that they are for.

    Returns a model with the weights that the package decompresses, in float32.
    """
    schemes = {
        f"group_{place}": QuantizationScheme(targets=[target], weights=QuantizationArgs(num_bits=4, **group))
        for place, (target, group) in enumerate(groups.items())
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=schemes, ignore=list(ignore)))
    for module in model.modules():
        if is_module_quantized(module):
            calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    (directory / "tokenizer.json").write_text("{}")  # the engine is given token ids
    compressor.decompress_model(model)
    plain: PreTrainedModel = type(model)(model.config)
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    plain.eval()
    return plain


def calibrate(module: Any) -> None:
    """Set scales and zeros by the least and the greatest weight of a group."""
    weights: Tensor = module.weight.data
    grouped = weights.unflatten(1, (module.weight_scale.shape[1], -1))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), module.quantization_scheme.weights)
    module.weight_scale.data.copy_(scale)
    if not module.quantization_scheme.weights.symmetric:
        module.weight_zero_point.data.copy_(zero)
    module.quantization_status = QuantizationStatus.FROZEN


def assert_served(directory: Path, reference: PreTrainedModel, form: str) -> None:
    """Reference: transformers in float32. Tolerance: 1e-3 absolute."""
    check_directory(directory)
    config = {"model": str(directory), "dtype": "float32", "kv_cache_bytes": 1 << 24, "num_threads": 1}
    loaded = load(EngineConfig.model_validate(config))
    assert loaded.info.weights == form
    rows = run(make_engine(loaded), [greedy("a", PROMPT, 0, EVERY_ROW)])["a", 0].prompt_rows
    assert np.abs(rows - reference_logits(reference, PROMPT)).max() <= 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group", "form"),
    [
        (GROUPS_OF_32, "INT4_32"),
        ({"strategy": "group", "group_size": 64, "actorder": "weight"}, "INT4_64"),
        ({"strategy": "group", "group_size": 128, "actorder": "static"}, "INT4_128"),
        ({"strategy": "channel"}, "INT4_128"),
    ],
)
def test_rows_are_those_of_the_decompressed_model(
    tmp_path: Path, group: dict[str, Any], form: str, *, symmetric: bool
) -> None:
    groups = {"Linear": group | {"symmetric": symmetric}}
    assert_served(tmp_path, save_compressed(tmp_path, tiny_llama(), groups), f"stored ({form}), dense")


def test_groups_of_layers_may_differ_and_the_head_be_packed(tmp_path: Path) -> None:
    groups = {
        "re:.*self_attn.*": {"strategy": "channel", "symmetric": False},
        "re:.*mlp.*": GROUPS_OF_32,
        "re:lm_head": {"strategy": "group", "group_size": 64},
    }
    reference = save_compressed(tmp_path, tiny_llama(), groups, ("re:.*down_proj",))
    assert_served(tmp_path, reference, "stored (INT4_128, INT4_32, INT4_64), dense")
