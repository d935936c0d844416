"""Checkpoints with packed layers that are refused, by name: of other kinds, or at odds with their config, index or files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from logitengine.errors import CheckpointError
from logitengine.model.checkpoint.files import check_directory
from logitengine.model.int4.config import int4_config
from packed_checkpoints import Packing, edit_tensors, quantization_config, save_packed
from support import served

DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("packing", "edits", "reason"),
    [
        (
            Packing("bitsandbytes"),
            {},
            "quantised by bitsandbytes; awq, gptq, compressed-tensors in 4 bits are",
        ),
        (Packing("fp8"), {}, "quantised by fp8"),
        (Packing("quark"), {"quant_method": None}, "quantised by none"),
        (Packing("awq"), {"bits": 8}, "bits 8; 4 is served"),
        (Packing("awq"), {"version": "gemv"}, "version 'gemv'; gemm"),
        (Packing("awq"), {"version": "marlin"}, "version 'marlin'"),
        (Packing("awq"), {"version": None, "format": "gemv_fast"}, "format 'gemv_fast'; gemm"),
        (Packing("awq"), {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (Packing("awq"), {"dynamic": {"+:lm_head": {"bits": 8}}}, "dynamic"),
        (Packing("awq"), {"rotation": "random"}, "rotation 'random'"),
        (Packing("awq"), {"group_size": 16}, "group_size 16; multiples of 32"),
        (Packing("gptq"), {"bits": 3}, "bits 3"),
        (Packing("gptq"), {"bits": 2}, "bits 2"),
        (Packing("gptq"), {"bits": True}, "bits True"),
        (Packing("gptq"), {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; gptq or gptq_v2"),
        (Packing("gptq"), {"is_marlin_format": True}, "is_marlin_format True"),
        (Packing("gptq"), {"dynamic": {"+:lm_head": {"bits": 8}}}, "dynamic"),
        (Packing("gptq"), {"checkpoint_format": None, "format": "gptq_p"}, "format 'gptq_p'"),
        (Packing("gptq"), {"rotation": "hadamard"}, "rotation 'hadamard'"),
        (Packing("gptq"), {"activation": {"mode": "w4afp8"}}, "activation {'mode': 'w4afp8'}"),
        (Packing("gptq"), {"group_size": "128"}, "group_size '128'"),
        (Packing("compressed-tensors"), {"format": "float-quantized"}, "format 'float-quantized'"),
        (Packing("compressed-tensors"), {"format": "marlin-24"}, "format 'marlin-24'"),
        (Packing("compressed-tensors"), {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (Packing("compressed-tensors"), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        (Packing("compressed-tensors"), {"transform_config": {"R1": {}}}, "transform_config"),
        (Packing("compressed-tensors"), {"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config"),
        (Packing("compressed-tensors"), {"config_groups": {}}, "no config_groups"),
        (Packing("compressed-tensors"), {"config_groups": [1]}, "no JSON object"),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 8}}}},
            "config_groups.a.weights.num_bits 8; 4 is served",
        ),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}},
            "weights.type 'float'; int is served",
        ),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "tensor"}}}},
            "weights.strategy 'tensor'",
        ),
        (
            Packing("compressed-tensors"),
            {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
            "config_groups.a.input_activations",
        ),
    ],
)
def test_other_ways_of_quantisation_are_refused_by_name(
    packing: Packing, edits: dict[str, Any], reason: str
) -> None:
    own = quantization_config(packing) | edits
    fields = {"quantization_config": {name: value for name, value in own.items() if value is not None}}
    with pytest.raises(CheckpointError, match="model cannot be served") as refusal:
        int4_config(fields, "model")
    assert reason in str(refusal.value)


def test_floats_and_mxfp4_are_left_to_transformers() -> None:
    assert int4_config({}, "model") is None
    assert int4_config({"quantization_config": {"quant_method": "mxfp4"}}, "model") is None
    with pytest.raises(CheckpointError, match="no JSON object"):
        int4_config({"quantization_config": "awq"}, "model")


def without(name: str) -> Any:
    return lambda tensors: {own: tensor for own, tensor in tensors.items() if own != name}


def changed(name: str, change: Any) -> Any:
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("packing", "edit", "reason"),
    [
        (Packing("awq"), without(f"{DOWN}.qzeros"), f"{DOWN} is packed, and it has no qzeros"),
        (Packing("gptq"), without(f"{DOWN}.scales"), "it has no scales"),
        (Packing("gptq"), without(f"{DOWN}.qweight"), "it has no qweight"),
        (Packing("awq"), changed(f"{DOWN}.scales", lambda t: t[:, :8]), "its scales is F16 [8, 8]"),
        (Packing("awq"), changed(f"{DOWN}.scales", lambda t: t[:3]), "its 256 columns are in 3 groups"),
        (Packing("awq"), changed(f"{DOWN}.qweight", lambda t: t[0]), "its qweight is I32 [16]"),
        (Packing("awq"), changed(f"{DOWN}.qweight", lambda t: t.short()), "its qweight is I16"),
        (Packing("gptq"), changed(f"{DOWN}.g_idx", lambda t: t[1:]), "its g_idx is I32 [255]"),
        (
            Packing("compressed-tensors"),
            without(f"{DOWN}.weight_zero_point"),
            "it has no weight_zero_point",
        ),
        (
            Packing("gptq"),
            lambda tensors: {name: t for name, t in tensors.items() if name.endswith("norm.weight")},
            "no layer is packed",
        ),
    ],
)
def test_packed_layers_whose_tensors_do_not_fit_are_refused_by_name(
    tmp_path: Path, packing: Packing, edit: Any, reason: str
) -> None:
    save_packed(tmp_path, packing)
    edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError) as refusal:
        check_directory(tmp_path)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("packing", "edit", "reason"),
    [
        (Packing("awq"), without("model.norm.weight"), "it has no tensor for model.norm.weight"),
        (
            Packing("awq"),
            changed("lm_head.weight", lambda t: t[:7]),
            "lm_head.weight is [7, 128], and by config.json lm_head.weight is [304, 128]",
        ),
        (
            Packing("awq"),
            lambda tensors: tensors | {"model.layers.0.self_attn.k_scale": torch.ones(1)},
            "k_scale, which LlamaForCausalLM does not have",
        ),
        (
            Packing("awq"),
            changed("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)),
            "lm_head.weight is F8_E4M3",
        ),
        (Packing("gptq"), changed(f"{DOWN}.g_idx", lambda t: t + 1), "names groups beyond the 8 there are"),
        (
            Packing("gptq"),
            changed(f"{DOWN}.scales", lambda t: t * torch.inf),
            "holds numbers that are not finite",
        ),
        (
            Packing("compressed-tensors"),
            changed(f"{DOWN}.weight_shape", lambda t: t.flip(0)),
            "weight_shape is [256, 128] for [128, 256]",
        ),
    ],
)
def test_a_model_that_its_files_contradict_is_refused_by_name(
    tmp_path: Path, packing: Packing, edit: Any, reason: str
) -> None:
    save_packed(tmp_path, packing)
    edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError) as refusal:
        served(tmp_path)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "is not an index of weights"),
        (b"[]", "is not an index of weights"),
        ({"weight_map": {}}, "it names none"),
        ({"weight_map": {"a": 3}}, "names 3 for a, which is no file in"),
        ({"weight_map": {"a": "../model.safetensors"}}, "which is no file in"),
        ({"weight_map": {"a": "/etc/passwd"}}, "which is no file in"),
        ({"weight_map": {"a": "a\0b"}}, "which is no file in"),
        ({"weight_map": {"a": "b.safetensors"}}, "names 'b.safetensors' for a, which is no file in"),
        (
            {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
            "says that a is in model-00001-of-00002.safetensors, and it is not",
        ),
    ],
)
@pytest.mark.parametrize("is_packed", [True, False])
def test_an_index_that_lies_is_refused_in_a_sentence(
    tmp_path: Path, index: bytes | dict[str, Any], reason: str, *, is_packed: bool
) -> None:
    save_packed(tmp_path, Packing("awq"), num_files=2)
    if not is_packed:
        config = json.loads((tmp_path / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        check_directory(tmp_path)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_cut_is_refused_by_name(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"), num_files=2)
    file = max(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
        check_directory(tmp_path)


@pytest.mark.parametrize("packing", [Packing("gptq"), Packing("compressed-tensors")], ids=str)
def test_packed_layers_without_a_word_in_the_config_are_refused(tmp_path: Path, packing: Packing) -> None:
    """Old GPTQ checkpoints have a file of its own for it."""
    save_packed(tmp_path, packing)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has no quantization_config"):
        check_directory(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}])
def test_a_config_that_makes_no_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_packed(tmp_path, Packing("awq"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="could not be loaded"):
        served(tmp_path)


def test_classifiers_are_refused_while_their_layers_are_packed(tmp_path: Path) -> None:
    save_packed(tmp_path, Packing("awq"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="LlamaForSequenceClassification has packed linear layers"):
        served(tmp_path)
